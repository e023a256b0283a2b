"""Where clips come from: the generator, or a folder of labelled videos."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from studytool.errors import DataError
from studytool.models.backbones import Clip
from studytool.pretraining.clips import MOTIONS, SHAPES, Clips, generate_clips
from studytool.seeds import derive_seed

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".mpg", ".mpeg", ".m4v")
_READ_AHEAD = 4
_HELD_OUT_CLIPS = 2048
_HELD_OUT_SHARE = 10


@dataclass(frozen=True)
class Question:
    """What is asked about every clip: the network answers with one of `classes`."""

    name: str
    classes: tuple[str, ...]


class ClipSource(Protocol):
    """Batches of clips [B, 1, T, H, W] (mean 0, deviation 1) with labels int64 [B, Q], one per question."""

    questions: tuple[Question, ...]
    clip_thw: Clip
    count: int

    def batches(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training clips of an epoch (from 1)."""
        ...

    def held_out(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Clips that no epoch has, always the same ones."""
        ...

    def description(self) -> dict[str, Any]:
        """What the card says of the clips, in plain data."""
        ...


class GeneratedClips:
    """`count` generated clips, new ones in every epoch, and the two questions of their shape and their motion.

    The generator is asked for a batch at a time, so the clips depend on the size of the batch, too.
    """

    def __init__(self, count: int, *, clip_thw: Clip, seed: int) -> None:
        self.questions: tuple[Question, ...] = (
            Question("shape", tuple(SHAPES)),
            Question("motion", tuple(MOTIONS)),
        )
        self.clip_thw = clip_thw
        self.count = count
        self._seed = seed

    def batches(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole batches of new clips."""
        return self._generated("train", epoch, self.count // batch_size, batch_size)

    def held_out(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """About 2,000 clips of another seed."""
        return self._generated("held out", 0, max(1, _HELD_OUT_CLIPS // batch_size), batch_size)

    def description(self) -> dict[str, Any]:
        """The kind, how many clips an epoch, and the seed."""
        return {"kind": "generated", "clips": self.count, "seed": self._seed}

    def _generated(self, part: str, epoch: int, batches: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        def make(i: int) -> tuple[Tensor, Tensor]:
            clips: Clips = generate_clips(
                batch_size, seed=derive_seed(self._seed, part, epoch, i), clip_thw=self.clip_thw
            )
            return clips.clips_B1THW, torch.stack([clips.shapes_B, clips.motions_B], 1)

        return _ahead(make, batches)


class VideoFolder:
    """The videos of FOLDER/LABEL/FILE, read with PyAV as grey clips; a tenth of each label is held out.

    A clip is T frames evenly spaced over a stretch of the video, resized to H x W: a stretch of random length and place
    in training, the whole video when held out. The result depends on the files' names, the seed and the epoch.

    Raises:
        DataError: PyAV is not installed, or there are not two labels with two videos each.
    """

    def __init__(self, folder: Path, *, clip_thw: Clip, seed: int) -> None:
        self._av = _pyav()
        labels = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        if len(labels) < 2:
            raise DataError(f"{folder}: needs two or more folders of videos, one per label; found {len(labels)}")
        self.questions: tuple[Question, ...] = (Question("label", tuple(labels)),)
        self.clip_thw = clip_thw
        self._folder = folder
        self._seed = seed
        self._train: list[tuple[Path, int]] = []
        self._held_out: list[tuple[Path, int]] = []
        for i, label in enumerate(labels):
            files = sorted(path for path in (folder / label).iterdir() if path.suffix.lower() in VIDEO_SUFFIXES)
            if len(files) < 2:
                kinds = ", ".join(VIDEO_SUFFIXES)
                raise DataError(f"{folder / label}: a label needs two or more videos ({kinds}), found {len(files)}")
            order = np.random.default_rng(derive_seed(seed, "held out", label)).permutation(len(files))
            kept_back = max(1, len(files) // _HELD_OUT_SHARE)
            self._held_out += [(files[j], i) for j in sorted(order[:kept_back])]
            self._train += [(files[j], i) for j in sorted(order[kept_back:])]
        self.count = len(self._train)

    def batches(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole batches of all videos in a new order, or one smaller batch where there are fewer."""
        order = np.random.default_rng(derive_seed(self._seed, "order", epoch)).permutation(self.count)
        whole = self.count // batch_size * batch_size if self.count >= batch_size else self.count
        return self._read([self._train[i] for i in order[:whole]], epoch, batch_size)

    def held_out(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The videos held out."""
        return self._read(self._held_out, None, batch_size)

    def description(self) -> dict[str, Any]:
        """The kind, the folder's name, and how many videos it has."""
        return {"kind": "videos", "folder": self._folder.name, "clips": self.count, "held_out": len(self._held_out)}

    def _read(
        self, files: list[tuple[Path, int]], epoch: int | None, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        def make(i: int) -> tuple[Tensor, Tensor]:
            chosen = files[i * batch_size : (i + 1) * batch_size]
            clips = np.stack([self._clip(path, epoch) for path, _ in chosen])
            return torch.from_numpy(clips)[:, None], torch.tensor([[label] for _, label in chosen])

        return _ahead(make, -(-len(files) // batch_size))

    def _clip(self, path: Path, epoch: int | None) -> np.ndarray[Any, np.dtype[np.float32]]:
        frames = self._frames(path)
        wanted, available = self.clip_thw[0], len(frames)
        first, last = 0, available - 1
        if epoch is not None:
            rng = np.random.default_rng(derive_seed(self._seed, str(path.relative_to(self._folder)), epoch))
            length = int(rng.integers(min(wanted, available), available + 1))
            first = int(rng.integers(0, available - length + 1))
            last = first + length - 1
        chosen = np.linspace(first, last, wanted).round().astype(int)
        clip = frames[chosen].astype(np.float32)
        return (clip - clip.mean()) / max(float(clip.std()), 1e-6)  # type: ignore[no-any-return]

    def _frames(self, path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
        _, height, width = self.clip_thw
        try:
            with self._av.open(str(path)) as video:
                frames = [
                    frame.reformat(width=width, height=height, format="gray", interpolation="AREA").to_ndarray()
                    for frame in video.decode(video=0)
                ]
        except (self._av.error.FFmpegError, IndexError) as error:
            raise DataError(f"{path}: cannot be read as a video ({error}); remove it or convert it") from error
        if not frames:
            raise DataError(f"{path}: holds no frames; remove it")
        return np.stack(frames)


def _pyav() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise DataError("videos are read with the package 'av'; pip install 'studytool[pretrain]'") from error
    return av


def _ahead(make: Callable[[int], tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """make(0), make(1), … in order, a few of them made ahead by other threads."""
    pending: deque[Future[tuple[Tensor, Tensor]]] = deque()
    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        try:
            for i in range(count):
                pending.append(pool.submit(make, i))
                if len(pending) >= 2 * _READ_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
