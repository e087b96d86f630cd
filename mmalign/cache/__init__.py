"""What is computed once and read many times: fixed-shape tensors on disk under content keys, read memory-mapped.

    store/header.json             what made the content (fingerprint), shape and dtype of each field
    store/part-00000/keys.txt     one key a line; line n is record n
    store/part-00000/<field>.bin  raw records, one after another
    store/part-00001/...          the part of a second writer

Each writing process has a part of its own; readers see all parts. Bytes reach the disk before their key does, so a
killed writer costs at most the records of its last `add`.
"""

from mmalign.cache.keys import content_key, weights_fingerprint
from mmalign.cache.store import TensorStore

__all__ = ["TensorStore", "content_key", "weights_fingerprint"]
