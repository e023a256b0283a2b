from __future__ import annotations

import numpy as np
import pytest

from studytool.data.readers.chunksize import expanded_bytes

numcodecs = pytest.importorskip("numcodecs", reason="no zarr: pip install 'studytool[copick]'")
CODECS = ("blosc", "zstd", "lz4", "zlib", "gzip", "bz2", "lzma")


def encoded(codec, size):
    return bytes(numcodecs.get_codec({"id": codec}).encode(np.zeros(size, np.uint8)))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [100, 300, 70_000, 200_000])
def test_what_numcodecs_writes(codec, size):
    content = encoded(codec, size)
    assert expanded_bytes(codec, content, size) == size
    assert expanded_bytes(codec, content, size - 1) > size - 1


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_cut_off_says_nothing(codec):
    assert expanded_bytes(codec, encoded(codec, 70_000)[:3], 70_000) is None


@pytest.mark.parametrize("codec", ["zstd", "zlib", "gzip", "bz2", "lzma"])
def test_what_is_of_another_codec_says_nothing(codec):
    assert expanded_bytes(codec, b"\x07" + encoded(codec, 70_000)[1:], 70_000) is None


@pytest.mark.parametrize("codec", ["gzip", "bz2", "lzma"])
def test_a_second_stream_is_not_overlooked(codec):
    content = encoded(codec, 1000)
    assert expanded_bytes(codec, content + content, 1000) is None


def test_a_bomb_is_expanded_no_further_than_it_may():
    content = encoded("zlib", 50_000_000)
    assert expanded_bytes("zlib", content, 1000) == 1001
