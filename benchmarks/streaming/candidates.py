"""The formats, and what reads them: each peer as its documentation recommends, with shuffling and no workers.

`FORMATS[name](data, folder)` writes. `CANDIDATES[name].open(data)` gives a function of the epoch's number that yields
batches: volumes as torch tensor [64, 1, 32, 32, 32], float32 unless the candidate says otherwise, and their numbers.
Libraries are imported inside, as no environment has all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import BATCH, ONE, SIDE, VOXELS, Data

Epoch = Callable[[int], Iterator[tuple[Any, Any]]]


def _write_studytool(data: Data, folder: Path, dtype: str) -> None:
    from studytool.data.particles import Particle
    from studytool.data.shards import write_dataset

    particles = (
        Particle(f"{number:06d}", f"class{data.class_of(number)}", f"tomogram{number % 7}", "train", volume[0], 10.0)
        for volume, number in data.samples()
    )
    write_dataset(particles, folder, dtype=dtype, provenance={}, volumes_per_shard=1000)


def _open_studytool(data: Data, name: str) -> tuple[Any, Any]:
    from studytool.data.shards import open_dataset

    dataset = open_dataset(data.folder(name))
    return dataset, dataset.rows("train")


def _studytool_gather(data: Data) -> Epoch:
    """In the training's own thread: volumes by their offset into one reused buffer."""
    import torch

    from studytool.data.stream import epoch_order

    dataset, rows = _open_studytool(data, "studytool-float32")
    volumes = torch.zeros(BATCH, *ONE)

    def epoch(number: int) -> Iterator[tuple[Any, Any]]:
        order = rows[epoch_order(len(rows), seed=0, epoch=number)]
        for low in range(0, len(order), BATCH):
            batch = order[low : low + BATCH]
            dataset.gather(batch, volumes[: len(batch)])
            torch.from_numpy(dataset.labels[batch])
            yield volumes[: len(batch)], batch

    return epoch


def studytool_stream(data: Data, name: str) -> Epoch:
    """As training does it, from the dataset `name`: a thread gathers ahead into a ring of buffers."""
    from studytool.data.stream import Stream

    dataset, rows = _open_studytool(data, name)
    stream = Stream(dataset, rows, batch_size=BATCH, seed=0, shuffle=True)
    return lambda number: ((batch.volumes_B1DHW, batch.rows_B) for batch in stream.epoch(number))


def _write_npy(data: Data, folder: Path) -> None:
    volumes = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (data.count, VOXELS))
    for block, numbers in data.blocks():
        volumes[numbers] = block
    volumes.flush()


def _npy(data: Data) -> Epoch:
    """A memory map, volume by volume."""
    import torch

    volumes = np.load(data.folder("npy") / "x.npy", mmap_mode="r")
    return _map_style(data.count, lambda number: torch.from_numpy(np.array(volumes[number]).reshape(ONE)))


def _npy_gather(data: Data) -> Epoch:
    """A memory map, one np.take for a batch, into new memory; written for this benchmark, as an upper reference."""
    import torch

    volumes = np.load(data.folder("npy") / "x.npy", mmap_mode="r")

    def batch(numbers: list[int]) -> tuple[Any, Any]:
        out = np.empty((len(numbers), VOXELS), np.float32)
        np.take(volumes, numbers, axis=0, out=out, mode="clip")
        return torch.from_numpy(out).view(-1, *ONE), torch.tensor(numbers)

    return _batch_style(data.count, batch)


def _mrc_path(data: Data, folder: Path, number: int) -> Path:
    """One file per particle, one folder per class."""
    return folder / f"class{data.class_of(number)}" / f"{number:06d}.mrc"


def _write_mrc(data: Data, folder: Path) -> None:
    import mrcfile

    for volume, number in data.samples():
        path = _mrc_path(data, folder, number)
        path.parent.mkdir(exist_ok=True)
        mrcfile.write(path, volume[0], voxel_size=10.0)


def _mrc(data: Data) -> Epoch:
    import mrcfile
    import torch

    paths = [_mrc_path(data, data.folder("mrc"), number) for number in range(data.count)]
    return _map_style(data.count, lambda number: torch.from_numpy(mrcfile.read(paths[number]).reshape(ONE)))


def _write_mds(data: Data, folder: Path) -> None:
    from streaming import MDSWriter

    columns = {"x": "ndarray:float32:1,32,32,32", "y": "int"}
    with MDSWriter(out=str(folder / "shards"), columns=columns) as writer:
        for volume, number in data.samples():
            writer.write({"x": volume, "y": number})


def _mds(data: Data) -> Epoch:
    import streaming
    from torch.utils.data import DataLoader

    streaming.base.util.clean_stale_shared_memory()
    local = str(data.folder("mds") / "shards")
    loader = DataLoader(streaming.StreamingDataset(local=local, batch_size=BATCH, shuffle=True), batch_size=BATCH)
    return lambda _: ((sample["x"], sample["y"]) for sample in loader)


class _LitItems:
    """Makes one input's volumes; a class, as LitData's processes import it."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __call__(self, low: int) -> Iterator[dict[str, Any]]:
        import torch

        for number, volume in enumerate(np.array(self.data.raw[low : low + BATCH]), start=low):
            yield {"x": torch.from_numpy(volume.reshape(ONE)), "y": number}


def _write_litdata(data: Data, folder: Path) -> None:
    import litdata

    litdata.optimize(
        fn=_LitItems(data), inputs=list(range(0, data.count, BATCH)), output_dir=str(folder / "chunks"),
        chunk_bytes="64MB", num_workers=2, start_method="fork", verbose=False,
    )  # fmt: skip


def _litdata(data: Data) -> Epoch:
    import litdata

    dataset = litdata.StreamingDataset(str(data.folder("litdata") / "chunks"), shuffle=True)
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH)
    return lambda _: ((sample["x"], sample["y"]) for sample in loader)


def _write_webdataset(data: Data, folder: Path) -> None:
    import webdataset

    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=-(-data.count // 8), maxsize=1 << 40, verbose=0) as out:
        for volume, number in data.samples():
            out.write({"__key__": f"{number:06d}", "x.raw": volume.tobytes(), "y.cls": number})


def _webdataset(data: Data) -> Epoch:
    import torch
    import webdataset

    def decoded(sample: dict[str, bytes]) -> tuple[Any, int]:
        return torch.frombuffer(bytearray(sample["x.raw"]), dtype=torch.float32).view(ONE), int(sample["y.cls"])

    shards = sorted(map(str, data.folder("webdataset").glob("*.tar")))
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).map(decoded)
    batches = samples.batched(BATCH, collation_fn=torch.utils.data.default_collate)
    loader = webdataset.WebLoader(batches, batch_size=None)
    return lambda _: iter(loader)


def _write_parquet_binary(data: Data, folder: Path) -> None:
    """Plain binary values, what Hugging Face streaming reads fastest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("x", pa.binary()), ("y", pa.int64())])
    per_file = -(-data.count // 8)
    for low in range(0, data.count, per_file):
        with pq.ParquetWriter(folder / f"{low:06d}.parquet", schema, compression="none", use_dictionary=False) as out:
            for start in range(low, min(data.count, low + per_file), BATCH):
                stop = min(data.count, low + per_file, start + BATCH)
                values = [volume.tobytes() for volume in np.array(data.raw[start:stop])]
                out.write_table(pa.table([pa.array(values, pa.binary()), np.arange(start, stop)], schema=schema))


def _hf_streaming(data: Data) -> Epoch:
    import datasets
    import torch
    from torch.utils.data import DataLoader

    datasets.disable_progress_bars()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # else 5 s asleep at the end of every epoch
    files = sorted(map(str, data.folder("parquet-binary").glob("*.parquet")))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    rows = rows.shuffle(seed=0, buffer_size=1000)

    def collate(batch: list[dict[str, Any]]) -> tuple[Any, Any]:
        volumes = [torch.frombuffer(bytearray(row["x"]), dtype=torch.float32).view(ONE) for row in batch]
        return torch.stack(volumes), torch.tensor([row["y"] for row in batch])

    loader = DataLoader(rows, batch_size=BATCH, collate_fn=collate)

    def epoch(number: int) -> Iterator[tuple[Any, Any]]:
        rows.set_epoch(number)
        yield from loader

    return epoch


def _write_arrow(data: Data, folder: Path) -> None:
    """The memory-mapped Arrow files of `datasets`, with lists of fixed size, which it reads without a copy."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"x": datasets.List(datasets.Value("float32"), length=VOXELS), "y": datasets.Value("int64")}
    )

    def rows() -> Iterator[dict[str, Any]]:
        for volume, number in data.samples():
            yield {"x": volume.reshape(-1), "y": number}

    cache = str(folder / "cache")
    made = datasets.Dataset.from_generator(rows, features=features, cache_dir=cache, writer_batch_size=256)
    for number, part in enumerate(made.cache_files):
        Path(part["filename"]).rename(folder / f"{number}.arrow")


def _arrow(data: Data, kind: str) -> Any:
    import datasets

    parts = [datasets.Dataset.from_file(str(path)) for path in sorted(data.folder("arrow").glob("*.arrow"))]
    return datasets.concatenate_datasets(parts).with_format(kind)


def _hf_rows(data: Data) -> Epoch:
    from torch.utils.data import DataLoader

    loader = DataLoader(_arrow(data, "torch"), batch_size=BATCH, shuffle=True)
    return lambda _: ((sample["x"].view(-1, *ONE), sample["y"]) for sample in loader)


def _hf_batched(data: Data) -> Epoch:
    """A whole batch at a time as NumPy views; written for this benchmark."""
    import torch

    rows = _arrow(data, "numpy")

    def batch(numbers: list[int]) -> tuple[Any, Any]:
        found = rows[numbers]
        return torch.from_numpy(np.asarray(found["x"]).reshape(-1, *ONE)), torch.from_numpy(np.asarray(found["y"]))

    return _batch_style(data.count, batch)


def _write_ray(data: Data, folder: Path) -> None:
    """Parquet with Ray's tensor column, row groups of 64."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from ray.data.extensions import ArrowTensorArray

    per_file = -(-data.count // 8)
    for low in range(0, data.count, per_file):
        volumes = np.array(data.raw[low : low + per_file]).reshape(-1, 1, SIDE, SIDE, SIDE)
        table = pa.table({"x": ArrowTensorArray.from_numpy(volumes), "y": np.arange(low, low + len(volumes))})
        pq.write_table(
            table, folder / f"{low:06d}.parquet", compression="none", use_dictionary=False, row_group_size=BATCH
        )


def _ray(data: Data) -> Epoch:
    import logging

    import ray

    ray.init(
        address="local", num_cpus=2, object_store_memory=2 << 30, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR, _temp_dir=str(data.root / "ray"),
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    files = sorted(map(str, data.folder("ray").glob("*.parquet")))

    def epoch(_: int) -> Iterator[tuple[Any, Any]]:
        dataset = ray.data.read_parquet(files, shuffle="files")
        batches = dataset.iter_torch_batches(
            batch_size=BATCH, device="cpu", prefetch_batches=2, local_shuffle_buffer_size=1000
        )
        return ((batch["x"], batch["y"]) for batch in batches)

    return epoch


def _map_style(count: int, volume: Callable[[int], Any]) -> Epoch:
    """A torch data set of single volumes under a DataLoader."""
    from torch.utils.data import DataLoader, Dataset

    class Volumes(Dataset):
        def __len__(self) -> int:
            return count

        def __getitem__(self, number: int) -> tuple[Any, int]:
            return volume(number), number

    loader = DataLoader(Volumes(), batch_size=BATCH, shuffle=True)
    return lambda _: iter(loader)


def _batch_style(count: int, batch: Callable[[list[int]], Any]) -> Epoch:
    """A torch data set that is asked for whole batches."""
    from torch.utils.data import DataLoader, Dataset

    class Volumes(Dataset):
        def __len__(self) -> int:
            return count

        def __getitems__(self, numbers: list[int]) -> Any:
            return batch(numbers)

    loader = DataLoader(Volumes(), batch_size=BATCH, shuffle=True, collate_fn=lambda ready: ready)
    return lambda _: iter(loader)


@dataclass(frozen=True)
class Format:
    """How volumes are stored: the writer, and the environment ("studytool", "main", "mds") that has its library."""

    write: Callable[[Data, Path], None]
    environment: str


@dataclass(frozen=True)
class Candidate:
    """What reads a format; `modules` are imported before the clock starts, `cold` asks for epochs from the disk too."""

    format: str
    open: Callable[[Data], Epoch]
    modules: tuple[str, ...]
    dtype: str = "float32"
    cold: bool = False


FORMATS = {
    "studytool-float32": Format(lambda data, folder: _write_studytool(data, folder, "float32"), "studytool"),
    "studytool-float16": Format(lambda data, folder: _write_studytool(data, folder, "float16"), "studytool"),
    "npy": Format(_write_npy, "main"),
    "mrc": Format(_write_mrc, "main"),
    "mds": Format(_write_mds, "mds"),
    "litdata": Format(_write_litdata, "main"),
    "webdataset": Format(_write_webdataset, "main"),
    "parquet-binary": Format(_write_parquet_binary, "main"),
    "arrow": Format(_write_arrow, "main"),
    "ray": Format(_write_ray, "main"),
}
_OURS = ("studytool.data.shards", "studytool.data.stream")
CANDIDATES = {
    "studytool, gather in process": Candidate("studytool-float32", _studytool_gather, _OURS),
    "studytool, stream": Candidate(
        "studytool-float32", lambda data: studytool_stream(data, "studytool-float32"), _OURS, cold=True
    ),
    "studytool, stream, float16 kept": Candidate(
        "studytool-float16", lambda data: studytool_stream(data, "studytool-float16"), _OURS, "float16"
    ),
    ".npy memory map": Candidate("npy", _npy, ()),
    ".npy memory map, whole batches": Candidate("npy", _npy_gather, ()),
    "one MRC per particle": Candidate("mrc", _mrc, ("mrcfile",)),
    "MosaicML Streaming": Candidate("mds", _mds, ("streaming",), cold=True),
    "LitData": Candidate("litdata", _litdata, ("litdata",), cold=True),
    "WebDataset": Candidate("webdataset", _webdataset, ("webdataset",)),
    "Hugging Face streaming": Candidate("parquet-binary", _hf_streaming, ("datasets",)),
    "Hugging Face rows": Candidate("arrow", _hf_rows, ("datasets",)),
    "Hugging Face batched": Candidate("arrow", _hf_batched, ("datasets",), cold=True),
    "Ray Data": Candidate("ray", _ray, ("ray.data",)),
}
