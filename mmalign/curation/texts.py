"""Prompts and responses as plain text: for judges, and to tell whether two prompts are the same."""

import unicodedata

from mmalign.records import Content


def spoken(content: Content) -> str:
    """A prompt as one text: its text, or its messages with the role before each, a single message of the user as it is."""
    if not content.messages:
        return content.text or ""
    if len(content.messages) == 1 and content.messages[0].role == "user":
        return content.messages[0].text
    return "\n\n".join(f"{message.role}: {message.text}" for message in content.messages)


def normalised(text: str) -> str:
    """A text without what does not change its meaning: case, width and form of characters, runs of blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
