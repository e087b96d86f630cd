"""Language models as networks of token sequences: log-probabilities without logits, packed rows with shared contexts."""
