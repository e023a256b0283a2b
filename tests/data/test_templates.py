from __future__ import annotations

import gzip

import mrcfile
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from studytool.data.phantoms import phantom
from studytool.data.templates import load_templates
from studytool.errors import DataError

ROTATION = Rotation.from_rotvec([0.4, -1.0, 0.6]).as_matrix()


def write_map(path, volume, voxel_size=10.0):
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(np.asarray(volume, dtype=np.float32))
        mrc.voxel_size = voxel_size


@pytest.fixture
def folder(tmp_path):
    """A ribosome-like map, brighter by a factor of 30, off centre, in a box that is no cube, at 5 Å."""
    volume = phantom("ribosome_like").render(64, 5.0, np.eye(3), [20, -15, 10])
    write_map(tmp_path / "ribosome.mrc", 30 * volume[2:, 4:, :60], voxel_size=5.0)
    return tmp_path


@pytest.mark.parametrize("voxel_size_angstrom", [5.0, 10.0, 13.0])
def test_a_template_of_a_phantom_renders_as_the_phantom_does(folder, voxel_size_angstrom):
    """Centred, turned, moved, rescaled and brightened alike: the two ways to a volume agree."""
    offset = [20.0, -10.0, 5.0]
    template = load_templates(folder)["ribosome"].render(32, voxel_size_angstrom, ROTATION, offset)
    expected = phantom("ribosome_like").render(32, voxel_size_angstrom, ROTATION, offset)
    assert template.shape == (32, 32, 32)
    assert template.dtype == np.float32
    assert np.corrcoef(template.ravel(), expected.ravel())[0, 1] > 0.98
    inside = expected > 0.3
    assert template[inside].mean() == pytest.approx(1.2 * expected[inside].mean(), rel=0.1)


def test_mean_inside_is_one_whatever_the_map(folder):
    write_map(folder / "other.mrc", 0.001 * phantom("cdc48_like").render(32, 10.0, np.eye(3)))
    for template in load_templates(folder).values():
        assert template.density_DHW[template.density_DHW > 0].mean() == pytest.approx(1)


def test_names_are_the_file_names(folder):
    volume = phantom("cdc48_like").render(24, 10.0, np.eye(3))
    write_map(folder / "b.map", volume)
    write_map(folder / "tmp.mrc", volume)
    (folder / "a.b.mrc.gz").write_bytes(gzip.compress((folder / "tmp.mrc").read_bytes()))
    (folder / "tmp.mrc").unlink()
    (folder / "LICENSE").write_text("text")
    (folder / "deeper.mrc").mkdir()
    assert list(load_templates(folder)) == ["a.b", "b", "ribosome"]
    write_map(folder / "ribosome.map", volume)
    with pytest.raises(DataError, match="a second template called 'ribosome'"):
        load_templates(folder)


def test_maps_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="no map found"):
        load_templates(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        load_templates(tmp_path / "nowhere")
    write_map(tmp_path / "a.mrc", np.ones((8, 8, 8)), voxel_size=1.0)
    with pytest.raises(DataError, match=r"a.mrc: its header has no usable voxel size \(found \(1.0, 1.0, 1.0\)\)"):
        load_templates(tmp_path)
    write_map(tmp_path / "a.mrc", -np.ones((8, 8, 8)))
    with pytest.raises(DataError, match=r"a.mrc: no density above zero"):
        load_templates(tmp_path)


def test_real_densities_are_centred_and_fit(shared_data):
    templates = load_templates(shared_data / "macromolecules_10A")
    assert len(templates) == 10
    for template in templates.values():
        volume = template.render(32, 10.0, ROTATION)
        centre = [(grid * volume).sum() / volume.sum() for grid in np.indices(volume.shape)]
        np.testing.assert_allclose(centre, 15.5, atol=0.1)
        assert volume.sum() == pytest.approx(template.density_DHW.sum(), rel=0.02)
