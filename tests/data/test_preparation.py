from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from studytool.data.conform import conform
from studytool.data.manifest import Manifest
from studytool.data.preparation import Preparation, contrast_of, preparation_of, prepare
from studytool.data.readers.source import Entry, ReadVolume
from studytool.errors import DataError
from studytool.settings import ImportSettings

WANTED = Preparation((16, 16, 16), 10.0, "float16", origin="import", inverted=True, normalize="standard")


@dataclass(frozen=True)
class InMemory:
    """A source of one volume."""

    volume_DHW: np.ndarray
    voxel_size_angstrom: float | None = 10.0
    kind: str = "memory"
    notes: tuple[str, ...] = ()
    provenance: dict = field(default_factory=dict)
    entries: tuple[Entry, ...] = (Entry("a", "", "", 0, "memory, row 1"),)

    def read(self, entry: Entry) -> ReadVolume:
        return ReadVolume(self.volume_DHW, self.voxel_size_angstrom)


def noise(side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((side,) * 3, dtype=np.float32) * 3 + 7


def manifest(provenance: dict) -> Manifest:
    return Manifest(1, "0" * 64, ("a",), {"a": {}}, (), (16, 16, 16), "float16", 10.0, (), provenance)


def test_a_raw_volume_becomes_what_the_import_would_have_made_of_it():
    volume = noise()
    stored = prepare(InMemory(volume), WANTED, raw=True)(0)
    expected, _ = conform(volume, 10.0, ImportSettings(invert=True))
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, expected.astype(np.float16))


def test_volumes_of_a_dataset_are_not_inverted_again_and_the_user_has_the_last_word():
    volume = noise()
    raw = prepare(InMemory(volume), WANTED, raw=True)(0)
    np.testing.assert_array_equal(prepare(InMemory(volume), WANTED, raw=False)(0), -raw)
    np.testing.assert_array_equal(prepare(InMemory(volume), WANTED, raw=True, invert=False)(0), -raw)
    said = prepare(InMemory(volume), WANTED, raw=True, invert=False).what_is_done()
    assert "unlike the training volumes, which were inverted" in said


def test_another_voxel_size_and_box_are_brought_to_those_of_the_training_and_said():
    preparer = prepare(InMemory(noise(48), 5.0), WANTED, raw=True)
    expected, _ = conform(noise(48), 5.0, ImportSettings(invert=True, rescale_to_angstrom=10.0, box=16))
    np.testing.assert_array_equal(preparer(0), expected.astype(np.float16))
    assert preparer.what_is_done() == (
        "48 x 48 x 48 voxels of 5 Å: rescaled to 10 Å, cropped to 16 x 16 x 16, contrast inverted, "
        "mean 0 and deviation 1"
    )
    padded = prepare(InMemory(noise(12)), WANTED, raw=True)
    assert padded(0).shape == (16, 16, 16)
    assert "padded to 16 x 16 x 16" in padded.what_is_done()


def test_rounding_of_a_header_is_no_other_voxel_size():
    volume = noise()
    np.testing.assert_array_equal(
        prepare(InMemory(volume, 10.05), WANTED, raw=True)(0), prepare(InMemory(volume), WANTED, raw=True)(0)
    )


def test_what_cannot_be_made_alike_is_refused():
    with pytest.raises(DataError, match="the voxel size is not known"):
        prepare(InMemory(noise(), None), WANTED, raw=True)(0)
    with pytest.raises(DataError, match="holds no particles"):
        prepare(InMemory(noise(), entries=()), WANTED, raw=True)
    longer = replace(WANTED, shape_dhw=(16, 16, 20))
    with pytest.raises(DataError, match="16 x 16 x 16 voxels, the network takes 16 x 16 x 20"):
        prepare(InMemory(noise()), longer, raw=True)(0)


@pytest.mark.parametrize(("offset", "scale"), [(20000, 1), (0, 1e-8), (0, 1e6)])
def test_values_that_float16_cannot_hold_are_kept(offset: float, scale: float):
    volume = (offset + scale * noise()).astype(np.float32)
    plain = replace(WANTED, normalize="none", inverted=False)
    np.testing.assert_array_equal(prepare(InMemory(volume), plain, raw=True)(0), volume)


def test_the_imports_of_a_dataset_add_up():
    first = {"kind": "import", "settings": {"invert": True, "transpose": "xyz->zyx", "normalize": "none"}}
    second = {
        "kind": "import",
        "source": {"kind": "studytool dataset", "provenance": first},
        "settings": {"invert": False, "rescale_to_angstrom": 10.0, "normalize": "standard"},
    }
    assert preparation_of(manifest(second)) == Preparation(
        (16, 16, 16), 10.0, "float16", "import", True, "xyz->zyx", True, "standard"
    )
    twice = {**second, "settings": {"invert": True}}
    assert not preparation_of(manifest(twice)).inverted
    assert preparation_of(manifest({"kind": "simulation"})) == Preparation((16, 16, 16), 10.0, "float16", "simulation")


def test_bright_and_dark_particles_and_neither():
    z, y, x = np.meshgrid(*[np.arange(16) - 8] * 3, indexing="ij")
    ball = np.exp(-(x**2 + y**2 + z**2) / 18)
    rng = np.random.default_rng(1)
    volumes = ball + 0.5 * rng.standard_normal((20, 16, 16, 16))
    assert contrast_of(volumes).sign == 1
    assert contrast_of(-volumes).sign == -1
    assert contrast_of(rng.standard_normal((20, 16, 16, 16))).sign == 0
    assert contrast_of(volumes[:1]).sign == 0
