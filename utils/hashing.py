"""Numbers out of a text that are the same in every process, run and version of Python."""

import hashlib


def hash64(text: str) -> int:
    """A number from 0 to 2^64 - 1, by SHA-256.  Characters that are no text (half of a surrogate pair) count as "?"."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big")


def in_share(text: str, share: float) -> bool:
    """Whether a text falls into a share (0 to 1) of all texts."""
    return hash64(text) < share * 2**64
