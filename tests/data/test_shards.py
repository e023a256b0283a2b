from __future__ import annotations

import dataclasses
import json
import random
import shutil
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from studytool.data.manifest import MANIFEST_NAME, ShardEntry, fingerprint_of, read_manifest, write_manifest
from studytool.data.shards import open_dataset, verify_dataset, write_dataset
from studytool.errors import DataError
from studytool.files import sha256_of


def gathered(dataset, rows):
    out = np.zeros((len(rows), *dataset.manifest.shape_dhw), dataset.manifest.dtype)
    dataset.gather(np.asarray(rows), out)
    return out


def write(particles, folder, dtype="float16", **options):
    return write_dataset(particles, folder, dtype=dtype, provenance={}, **{"volumes_per_shard": 400, **options})


def restate(folder):
    """Make the manifest agree with the shards as they are now, as one who forges a dataset would."""
    manifest = read_manifest(folder)
    shards = tuple(
        ShardEntry(shard.name, shard.rows, (folder / shard.name).stat().st_size, sha256_of(folder / shard.name))
        for shard in manifest.shards
    )
    write_manifest(folder, dataclasses.replace(manifest, shards=shards, fingerprint=fingerprint_of(shards)))


def rewrite(folder, change, **options):
    """Write every shard again with `change(table)`, through plain pyarrow, and restate the manifest."""
    for path in folder.glob("*.parquet"):
        with pq.ParquetFile(path) as parquet:
            table = parquet.read()
        pq.write_table(change(table), path, **options)
    restate(folder)


@pytest.fixture
def copied(dataset_folder, tmp_path):
    shutil.copytree(dataset_folder, tmp_path / "copy")
    return tmp_path / "copy"


# what is written is read


def test_everything_comes_back(dataset_folder, volumes, make_particles):
    dataset = open_dataset(dataset_folder)
    manifest = dataset.manifest
    assert manifest.classes == ("0012", "apoferritin", "ribosome")
    assert manifest.counts["ribosome"] == {"train": 120, "val": 40, "test": 40}
    assert manifest.tomograms == ("t0", "t1", "t2", "t3", "t4")
    assert (manifest.shape_dhw, manifest.dtype, manifest.voxel_size_angstrom) == ((6, 6, 6), "float16", 13.5)
    assert [shard.rows for shard in manifest.shards] == [400, 200]
    assert manifest.provenance == {"made": "here"}
    assert len(dataset) == 600
    particles = list(make_particles(600))
    assert [manifest.classes[label] for label in dataset.labels] == [p.label for p in particles]
    assert dataset.labels.dtype == np.int64
    assert dataset.splits.tolist() == [p.split for p in particles]
    assert dataset.tomograms.tolist() == [p.tomogram for p in particles]
    assert dataset.particle_ids.tolist() == [p.particle_id for p in particles]
    np.testing.assert_array_equal(dataset.snr[:2], [0.1, np.nan])
    np.testing.assert_array_equal(dataset.positions_zyx[3:5], [[np.nan] * 3, [4, 8, 0.5]])
    np.testing.assert_array_equal(gathered(dataset, np.arange(600)), volumes)


def test_any_rows_in_any_order_into_arrays_and_tensors(dataset_folder, volumes):
    dataset = open_dataset(dataset_folder)
    rows = np.random.default_rng(1).integers(0, 600, 1000)  # with repeats, over both shards and all row groups
    np.testing.assert_array_equal(gathered(dataset, rows), volumes[rows])
    out = torch.zeros((1000, 1, 6, 6, 6), dtype=torch.float16)
    dataset.announce(rows)
    dataset.gather(rows, out)
    np.testing.assert_array_equal(out.squeeze(1).numpy(), volumes[rows])
    dataset.gather(rows[:0], out[:0])


def test_float32_is_kept_exactly(tmp_path, make_particles):
    write(make_particles(30), tmp_path / "data", dtype="float32")
    expected = np.stack([p.volume_DHW for p in make_particles(30)])
    np.testing.assert_array_equal(gathered(open_dataset(tmp_path / "data"), np.arange(30)), expected)


def test_rows_of_a_split(dataset_folder):
    dataset = open_dataset(dataset_folder)
    assert dataset.rows("val").tolist() == list(range(3, 600, 5))
    with pytest.raises(DataError, match="unknown split 'vall'; did you mean 'val'"):
        dataset.rows("vall")


def test_a_missing_split_is_named_with_those_there_are(tmp_path, make_particles):
    write((p for p in make_particles(40) if p.split != "val"), tmp_path / "data")
    with pytest.raises(DataError, match=r"no volume is in the split 'val' \(found train: 24, test: 8\)"):
        open_dataset(tmp_path / "data").rows("val")


def test_gather_refuses_what_does_not_fit(dataset_folder):
    dataset = open_dataset(dataset_folder)
    rows = np.arange(4)
    for out in (
        np.zeros((4, 6, 6, 6), np.float32),
        np.zeros((3, 6, 6, 6), np.float16),
        np.zeros((4, 6, 6), np.float16),
        np.zeros((6, 6, 6, 4), np.float16).T,
    ):
        with pytest.raises(ValueError, match=r"out has to be|out is"):
            dataset.gather(rows, out)
    for bad in ([0, 600], [-1, 3]):
        with pytest.raises(IndexError, match="600 volumes"):
            dataset.gather(np.array(bad), np.zeros((2, 6, 6, 6), np.float16))


# the layout


def test_shards_are_plain_parquet_laid_out_for_reading_by_offset(dataset_folder, volumes):
    with pq.ParquetFile(dataset_folder / "part-00000.parquet", page_checksum_verification=True) as parquet:
        assert parquet.schema_arrow.field("volume").type == pa.binary(6 * 6 * 6 * 2)
        assert not parquet.schema_arrow.field("volume").nullable
        stated = {key.decode(): value.decode() for key, value in parquet.schema_arrow.metadata.items()}
        assert stated == {
            "studytool.format_version": "1",
            "studytool.shape_dhw": "6,6,6",
            "studytool.dtype": "float16",
            "studytool.voxel_size_angstrom": "13.5",
        }
        groups = [parquet.metadata.row_group(n) for n in range(parquet.metadata.num_row_groups)]
        assert [group.num_rows for group in groups] == [256, 144]
        column = groups[0].column(0)
        assert column.compression == "UNCOMPRESSED"
        assert not column.has_dictionary_page
        assert not column.is_stats_set
        values = parquet.read(columns=["volume"]).column("volume").to_pylist()
    assert b"".join(values) == volumes[:400].tobytes()
    dataset = open_dataset(dataset_folder)
    assert (dataset._starts > 0).all()  # every volume is reached by its offset


def nullable(table):
    return table.cast(pa.schema([field.with_nullable(True) for field in table.schema], table.schema.metadata))


def variable(table):
    return table.set_column(0, "volume", table.column("volume").cast(pa.binary()))


def large(table):
    return table.set_column(0, "volume", table.column("volume").cast(pa.large_binary()))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda table: table, {"compression": "zstd"}),
        (lambda table: table, {"compression": "none", "use_dictionary": True}),
        (lambda table: table, {"compression": "none", "use_dictionary": False, "max_rows_per_page": 100}),
        (lambda table: table, {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"}),
        (lambda table: table, {"compression": "none", "use_byte_stream_split": ["volume"], "use_dictionary": False}),
        (nullable, {"compression": "none", "use_dictionary": False}),
        (variable, {"compression": "snappy", "row_group_size": 90}),
        (large, {"compression": "none", "use_dictionary": ["label"]}),
    ],
    ids=["zstd", "dictionary", "pages", "page-v2", "byte-stream-split", "nullable", "binary", "large-binary"],
)
def test_other_layouts_give_the_same_volumes_with_a_warning(copied, volumes, change, options):
    rewrite(copied, change, **options)
    with pytest.warns(UserWarning, match="are decoded at every read"):
        dataset = open_dataset(copied)
    assert (dataset._starts < 0).all()
    rows = np.random.default_rng(2).permutation(600)
    np.testing.assert_array_equal(gathered(dataset, rows), volumes[rows])


def test_statistics_and_dictionary_text_change_nothing(copied, volumes):
    """A page header with statistics in it, and texts stored as a dictionary type."""

    def change(table):
        return table.set_column(1, "label", table.column("label").dictionary_encode())

    rewrite(copied, change, compression="none", use_dictionary=["label"], write_statistics=True)
    dataset = open_dataset(copied)
    assert (dataset._starts > 0).all()
    np.testing.assert_array_equal(gathered(dataset, np.arange(600)), volumes)


# writing


def test_nothing_stands_under_the_name_until_the_dataset_is_whole(tmp_path, make_particles):
    def interrupted():
        yield from make_particles(500)
        assert not (tmp_path / "data").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(interrupted(), tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path, make_particles):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        write(make_particles(10), tmp_path / "data")
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "mine.txt"]


def test_the_same_particles_give_the_same_fingerprint(tmp_path, make_particles):
    first = write(make_particles(20), tmp_path / "a")
    assert write(make_particles(20), tmp_path / "b").fingerprint == first.fingerprint
    assert write(make_particles(20, seed=1), tmp_path / "c").fingerprint != first.fingerprint


def with_voxel(particle, value):
    volume = particle.volume_DHW.copy()
    volume[1, 2, 3] = value
    return dataclasses.replace(particle, volume_DHW=volume)


UNFIT = {
    "1 voxels are NaN": lambda p: with_voxel(p, np.nan),
    "1 voxels are NaN or infinite": lambda p: with_voxel(p, -np.inf),
    "70000 does not fit into float16": lambda p: with_voxel(p, 70000),
    "shape \\[6, 6, 5\\]": lambda p: dataclasses.replace(p, volume_DHW=p.volume_DHW[:, :, :5]),
    "voxel size 10.0 Å": lambda p: dataclasses.replace(p, voxel_size_angstrom=10.0),
    "has no label": lambda p: dataclasses.replace(p, label=""),
    "unknown split 'training'": lambda p: dataclasses.replace(p, split="training"),
    "'p0000': the id occurs twice": lambda p: dataclasses.replace(p, particle_id="p0000"),
    "tomogram 't3' would stand in the splits 'val' and 'train'": lambda p: dataclasses.replace(p, tomogram="t3"),
}


@pytest.mark.parametrize("message", UNFIT)
def test_particles_that_do_not_fit_are_refused_by_name(tmp_path, make_particles, message):
    particles = list(make_particles(10))
    particles[5] = UNFIT[message](particles[5])
    with pytest.raises(DataError, match=message) as caught:
        write(particles, tmp_path / "data")
    assert str(caught.value).startswith(f"particle {particles[5].particle_id!r}")
    assert list(tmp_path.iterdir()) == []


def test_no_particles_and_unknown_dtype(tmp_path, make_particles):
    with pytest.raises(DataError, match="no particles"):
        write([], tmp_path / "data")
    with pytest.raises(DataError, match="unknown dtype of shards 'float61'; did you mean 'float16'"):
        write(make_particles(3), tmp_path / "data", dtype="float61")


# damage


def test_verify_accepts_a_whole_dataset(dataset_folder):
    assert verify_dataset(dataset_folder) == read_manifest(dataset_folder)


def test_verify_names_the_damaged_row_group(copied):
    path = copied / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[int(open_dataset(copied)._starts[300]) + 17] ^= 4  # one bit, in a volume of the second row group
    path.write_bytes(content)
    open_dataset(copied)  # nothing to be seen without reading all
    with pytest.raises(DataError, match=r"part-00000.parquet: row group 1 \(rows 256 to 399\) is damaged"):
        verify_dataset(copied)


def test_verify_names_a_file_that_was_exchanged(copied):
    path = copied / "part-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"apoferritin", b"apoferritim"))
    with pytest.raises(DataError, match=r"part-00001.parquet"):
        verify_dataset(copied)


def test_verify_names_the_row_of_a_volume_that_is_not_finite(copied):
    """A dataset whose checksums are right, but which was not made by this program's own hand."""

    def change(table):
        stored = table.column("volume").to_pylist()
        if len(stored) == 200:
            stored[150] = b"\x00\x7e" + stored[150][2:]  # the first voxel: not a number
        return table.set_column(0, "volume", pa.array(stored, pa.binary(432)))

    rewrite(copied, change)
    with (
        pytest.warns(UserWarning, match="decoded"),
        pytest.raises(DataError, match=r"part-00001.parquet: row 150: 1 voxels of its volume are NaN or infinite"),
    ):
        verify_dataset(copied)


def test_missing_and_cut_off_shards(copied):
    path = copied / "part-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"part-00001.parquet: has .* bytes, the manifest says"):
        open_dataset(copied)
    restate(copied)
    with pytest.raises(DataError, match=r"part-00001.parquet: not a whole Parquet file"):
        open_dataset(copied)
    path.unlink()
    with pytest.raises(DataError, match=r"part-00001.parquet: missing"):
        verify_dataset(copied)


# claims that contradict one another


def relabel(table, name, values):
    return table.set_column(table.schema.names.index(name), name, pa.array(values))


def stating(key, value):
    def change(table):
        return table.replace_schema_metadata({**table.schema.metadata, f"studytool.{key}".encode(): value})

    return change


CONTRADICTIONS = {
    "has 399 rows": lambda table: table.slice(0, table.num_rows - 1),
    "format_version is '2'": stating("format_version", b"2"),
    "shape_dhw is '6,6,7'": stating("shape_dhw", b"6,6,7"),
    "dtype is 'float32'": stating("dtype", b"float32"),
    "voxel_size_angstrom is '1.0'": stating("voxel_size_angstrom", b"1.0"),
    "format_version is None": lambda table: table.replace_schema_metadata(None),
    "has 0 columns 'label'": lambda table: table.drop_columns(["label"]),
    "column 'label' is of type int64": lambda table: relabel(table, "label", range(table.num_rows)),
    "column 'snr' is of type string": lambda table: relabel(table, "snr", ["0.1"] * table.num_rows),
    "column 'volume' is of type": lambda table: relabel(table, "volume", [[1.0]] * table.num_rows),
    "column 'tomogram' has 1 empty": lambda table: relabel(table, "tomogram", [None, *["t0"] * (table.num_rows - 1)]),
    "row 0 has the label 'virus'": lambda table: relabel(table, "label", ["virus"] * table.num_rows),
    "row 1 has the unknown split 'dev'": lambda table: relabel(
        table, "split", ["val", "dev", *["train"] * (table.num_rows - 2)]
    ),
    "class '0012' has .* volumes in split 'train'": lambda table: relabel(table, "split", ["val"] * table.num_rows),
    "volumes are of 3 bytes": lambda table: relabel(table, "volume", pa.array([b"abc"] * table.num_rows, pa.binary(3))),
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_shards_that_contradict_the_manifest_are_refused(copied, message):
    rewrite(copied, CONTRADICTIONS[message], compression="none", use_dictionary=False)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, b"abc"], ids=["missing", "short"])
def test_a_value_of_another_length_is_found_when_it_is_read(copied, value):
    def change(table):
        return relabel(table, "volume", [value, *table.column("volume").to_pylist()[1:]])

    rewrite(copied, change)
    with pytest.warns(UserWarning, match="decoded"):
        dataset = open_dataset(copied)
    with pytest.raises(DataError, match="row group 0 has volumes that are missing or not of 432 bytes"):
        gathered(dataset, [3])


def test_a_small_file_that_claims_to_be_large_is_refused_before_memory_is_taken(tmp_path, make_particles):
    write(make_particles(10), tmp_path / "data")
    zeros = pa.array([bytes(2**18)] * 200, pa.binary(2**18))
    path = tmp_path / "data" / "part-00000.parquet"
    texts = {name: ["a"] * 200 for name in ("label", "tomogram", "split", "particle_id")}
    numbers = {name: [1.0] * 200 for name in ("snr", "position_z", "position_y", "position_x")}
    stated = {"format_version": "1", "shape_dhw": "32,64,64", "dtype": "float16", "voxel_size_angstrom": "13.5"}
    table = pa.table({"volume": zeros, **texts, **numbers})
    table = table.replace_schema_metadata({f"studytool.{key}": value for key, value in stated.items()})
    pq.write_table(table, path, compression="zstd")
    entry = ShardEntry(path.name, 200, path.stat().st_size, sha256_of(path))
    manifest = read_manifest(tmp_path / "data")
    forged = dataclasses.replace(
        manifest, shape_dhw=(32, 64, 64), shards=(entry,), fingerprint=fingerprint_of([entry]),
        classes=("a",), counts={"a": {"train": 200}},
    )  # fmt: skip
    write_manifest(tmp_path / "data", forged)
    with pytest.raises(DataError, match="claims 200 volumes of 262144 bytes, in a file of"):
        open_dataset(tmp_path / "data")


# files of strangers


class Trap(pa.ExtensionType):
    """An extension type that notices when pyarrow reads what a file says of it."""

    sprung = False

    def __init__(self):
        super().__init__(pa.binary(), "studytool.test.trap")

    def __arrow_ext_serialize__(self):
        return b"anything"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        cls.sprung = True
        return cls()


def test_extension_types_are_refused_before_any_of_their_code_runs(copied):
    def change(table):
        storage = table.column("volume").combine_chunks().cast(pa.binary())
        return table.set_column(0, "volume", pa.ExtensionArray.from_storage(Trap(), storage))

    pa.register_extension_type(Trap())
    try:
        rewrite(copied, change)
        Trap.sprung = False
        with pytest.raises(DataError, match="Arrow extension type"):
            open_dataset(copied)
        assert not Trap.sprung
        pq.ParquetFile(copied / "part-00000.parquet").close()
        assert Trap.sprung  # the trap works: pyarrow alone would have run it
    finally:
        pa.unregister_extension_type("studytool.test.trap")


def test_broken_parquet_files_are_refused(shared_data, copied):
    bad = sorted((shared_data / "parquet_bad").glob("*.parquet"))
    assert bad
    for path in bad:
        shutil.copy(path, copied / "part-00000.parquet")
        (copied / "part-00000.parquet").chmod(0o644)
        restate(copied)
        with pytest.raises(DataError) as caught:
            open_dataset(copied)
        assert "part-00000.parquet" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_flipped_bytes_never_do_worse_than_a_data_error(tmp_path, make_particles):
    write(make_particles(20), tmp_path / "data", volumes_per_shard=20)
    path = tmp_path / "data" / "part-00000.parquet"
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    rng = random.Random(0)
    refused = 0
    for number in range(150):
        damaged = bytearray(content)
        # mostly the footer and the pages after the volumes, where the structure is
        first = len(content) - footer if number % 3 else 20 * 432
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(first, len(content))] = rng.randrange(256)
        path.write_bytes(damaged)
        restate(tmp_path / "data")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert gathered(open_dataset(tmp_path / "data"), np.arange(20)).shape == (20, 6, 6, 6)
            except DataError:
                refused += 1
    assert refused > 30


def test_a_manifest_of_another_dataset_is_refused(copied, tmp_path, make_particles):
    write(make_particles(600, side=4), tmp_path / "other")
    shutil.copy(tmp_path / "other" / MANIFEST_NAME, copied / MANIFEST_NAME)
    with pytest.raises(DataError, match="the manifest says"):
        open_dataset(copied)
    content = json.loads((copied / MANIFEST_NAME).read_text())
    assert content["shape_dhw"] == [4, 4, 4]
