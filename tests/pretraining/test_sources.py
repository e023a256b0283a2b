from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from studytool.errors import DataError
from studytool.pretraining.sources import GeneratedClips, VideoFolder

CLIP = (6, 16, 16)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two labels of four videos: a dark field that becomes bright, and a bright one that becomes dark."""
    av = pytest.importorskip("av")
    for label, levels in (("brightens", np.linspace(20, 230, 12)), ("darkens", np.linspace(230, 20, 12))):
        (tmp_path / label).mkdir()
        for number in range(4):
            with av.open(str(tmp_path / label / f"{number}.avi"), "w") as container:
                stream = container.add_stream("mpeg4", rate=12)
                stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
                for level in levels:
                    picture = np.full((32, 32, 3), round(level), dtype=np.uint8)
                    for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                        container.mux(packet)
                for packet in stream.encode():
                    container.mux(packet)
    return tmp_path


def test_videos_are_read_in_order_of_time_with_their_labels(videos: Path) -> None:
    source = VideoFolder(videos, clip_thw=CLIP, seed=0)
    assert source.questions[0].classes == ("brightens", "darkens")
    assert source.count == 6
    for batches in (source.held_out(2), source.batches(1, 3)):
        for clips, labels in batches:
            assert clips.shape[1:] == (1, *CLIP)
            rising = clips.mean((1, 3, 4)).diff(dim=1)
            assert bool(((rising > 0).all(1) == (labels[:, 0] == 0)).all())
            assert bool(((rising < 0).all(1) == (labels[:, 0] == 1)).all())


def test_held_out_videos_are_in_no_epoch_and_epochs_differ(videos: Path) -> None:
    source = VideoFolder(videos, clip_thw=CLIP, seed=0)
    assert not {path for path, _ in source._train} & {path for path, _ in source._held_out}
    epochs = [torch.cat([clips for clips, _ in source.batches(epoch, 2)]) for epoch in (1, 1, 2)]
    assert len(epochs[0]) == 6
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


def test_a_file_that_is_no_video_is_named(videos: Path) -> None:
    for path in (videos / "darkens").iterdir():
        path.write_bytes(b"no video")
    source = VideoFolder(videos, clip_thw=CLIP, seed=0)
    with pytest.raises(DataError, match=r"darkens/\d\.avi: cannot be read as a video"):
        list(source.batches(1, 6))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ((), "two or more folders of videos"),
        (("a",), "two or more folders"),
        (("a", "b"), "a: a label needs two or more"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, folders: tuple[str, ...], message: str) -> None:
    pytest.importorskip("av")
    for folder in folders:
        (tmp_path / folder).mkdir()
    with pytest.raises(DataError, match=message):
        VideoFolder(tmp_path, clip_thw=CLIP, seed=0)


def test_generated_epochs_and_the_held_out_clips_all_differ() -> None:
    source = GeneratedClips(8, clip_thw=CLIP, seed=4)
    first, again, second = (list(source.batches(epoch, 4)) for epoch in (1, 1, 2))
    assert len(first) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0], next(source.held_out(4))[0])
    assert first[0][1].shape == (4, len(source.questions))
