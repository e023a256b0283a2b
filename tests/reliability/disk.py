"""A study on a disk that is full: a small file system in memory, which only the superuser may make."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whole_study import Study

from reliability.kills import BrokenPromiseError, compare, reference

MEGABYTES = 8


def can_make_disks() -> bool:
    """Whether a file system may be mounted here."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    tried = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    return tried.returncode == 0


def disk_full(folder: Path) -> dict[str, float]:
    """Fill the disk of a study in the middle of a trial, then free it and give the command again."""
    expected = reference(folder / "reference-asha", "asha")
    place = folder / "full"
    shutil.rmtree(place, ignore_errors=True)
    study = Study(place, expected.text)
    shutil.copytree(expected.folder / "data", place / "data")
    (place / "count-steps").touch()
    (place / "slow").write_text("0.05")
    with _small_disk(place / "studies") as disk:
        process = study.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if "search-001: epoch 1" in line:
                    break
            _fill(disk / "ballast")
            _, err = process.communicate(timeout=120)
        finally:
            study.kill_what_runs()
        if process.returncode != 1 or "no space left on the disk" not in err or "Traceback" in err:
            raise BrokenPromiseError(f"exit code {process.returncode}: {err}")
        study.seconds_until_gone()
        before = {t: r for t, r in study.records.items() if r.outcome is not None}
        (disk / "ballast").unlink()
        study.run()
        repeated = compare(study, expected, kills=1)
        again = [t for t, r in before.items() if study.records[t] != r]
        if again:
            raise BrokenPromiseError(f"{again[0]} had ended, and was run again")
    return {"exit code": 1, "trials kept": len(before), "steps repeated": repeated}


@contextmanager
def _small_disk(place: Path) -> Iterator[Path]:
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m,mode=700", "none", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
