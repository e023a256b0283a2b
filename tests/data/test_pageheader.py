from __future__ import annotations

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from studytool.data.pageheader import read_page_header


def first_page(path, **options):
    table = pa.table({"volume": pa.array([bytes([n]) * 8 for n in range(50)], pa.binary(8))}, pa.schema(
        [pa.field("volume", pa.binary(8), nullable=False)]
    ))  # fmt: skip
    pq.write_table(table, path, **{"use_dictionary": False, "compression": "none", **options})
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    return path.read_bytes(), start, column


def test_header_ends_where_the_values_begin(tmp_path):
    content, start, column = first_page(tmp_path / "a.parquet", write_page_checksum=True)
    header = read_page_header(content[start : start + 500])
    assert header is not None
    assert (header.num_values, header.value_bytes) == (50, 400)
    values = content[start + header.header_bytes :][:400]
    assert values == b"".join(bytes([n]) * 8 for n in range(50))
    assert column.total_compressed_size == header.header_bytes + 400


def test_statistics_in_the_header_are_stepped_over(tmp_path):
    content, start, _ = first_page(tmp_path / "a.parquet", write_statistics=True)
    header = read_page_header(content[start : start + 500])
    assert header is not None
    assert content[start + header.header_bytes :][:16] == bytes(8) + bytes([1]) * 8


@pytest.mark.parametrize(
    "options", [{"use_dictionary": True}, {"compression": "snappy"}, {"data_page_version": "2.0"}], ids=str
)
def test_other_pages_are_not_taken_for_plain_ones(tmp_path, options):
    content, start, _ = first_page(tmp_path / "a.parquet", **options)
    assert read_page_header(content[start : start + 500]) is None


def test_a_page_cut_short_or_garbled_is_no_header(tmp_path):
    content, start, _ = first_page(tmp_path / "a.parquet")
    whole = content[start : start + 64]
    header = read_page_header(whole)
    assert header is not None
    for length in range(header.header_bytes):
        assert read_page_header(whole[:length]) is None
    rng = random.Random(0)
    for _ in range(3000):  # none of these may raise
        read_page_header(rng.randbytes(rng.randrange(80)))
    assert read_page_header(b"\x1c" * 500) is None  # structs in structs
