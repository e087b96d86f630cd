"""The judging session, without a user interface: what is shown to whom, what was said of it, and that none of it gets lost."""
