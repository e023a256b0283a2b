"""One way to make seeds: every random decision has its own, derived from the study's seed and what it is for."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**32) that depends on every part and on their order, the same on every machine.

    `derive_seed(7, "order", 3)` and `derive_seed(7, "head")` are independent of one another, so that adding a
    random decision to the program never changes another one.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
