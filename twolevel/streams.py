"""Random numbers that depend on nothing but what they are for."""

import hashlib

import torch


def stream(*key: int | str) -> torch.Generator:
    """A CPU generator of random numbers, seeded by `key` alone.

    The seed is a SHA-256 of the key's text: neighbouring keys have unrelated streams, and every
    process the same ones (Python's own `hash` of a string differs between processes).
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
