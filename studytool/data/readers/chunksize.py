"""How large a compressed chunk gets, found out before it is expanded: a small file may claim to be gigabytes.

blosc, zstd and lz4 (as numcodecs writes them) say so in their first bytes; what cannot is expanded, but no further than
it may get. Layouts: https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst and RFC 8878, section 3.1.1.1.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Any

_BLOSC_HEADER = struct.Struct("<4BI")
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_LZMA_MEMORY = 2**28

_EXPANDERS: dict[str, Callable[[], Any]] = {
    "zlib": zlib.decompressobj,
    "gzip": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
    "bz2": bz2.BZ2Decompressor,
    "lzma": lambda: lzma.LZMADecompressor(memlimit=_LZMA_MEMORY),
}


def expanded_bytes(codec: str, content: bytes, most: int) -> int | None:
    """Bytes of a chunk once it is expanded, or some number above `most`; None where it does not say, or is damaged.

    `codec` is the name that numcodecs has for it.
    """
    try:
        if codec == "blosc":
            return int(_BLOSC_HEADER.unpack_from(content)[-1])
        if codec == "lz4":
            return int(struct.unpack_from("<I", content)[0])
        if codec == "zstd":
            return _zstd_bytes(content)
        expander = _EXPANDERS[codec]()
        size = len(expander.decompress(content, most + 1))
        return None if expander.unused_data or (not expander.eof and size <= most) else size
    except (struct.error, IndexError, OSError, zlib.error, lzma.LZMAError):
        return None


def _zstd_bytes(content: bytes) -> int | None:
    """What the header of the only frame says."""
    if content[:4] != _ZSTD_MAGIC:
        return None
    descriptor = content[4]
    single_segment = bool(descriptor & 32)
    start = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    length = (int(single_segment), 2, 4, 8)[descriptor >> 6]
    if length == 0 or len(content) < start + length:
        return None
    return int.from_bytes(content[start : start + length], "little") + (256 if length == 2 else 0)
