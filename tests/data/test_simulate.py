from __future__ import annotations

import json
import multiprocessing

import numpy as np
import pytest

from studytool.data.imaging import wedge
from studytool.data.info import nearest_mean_accuracy, volume_statistics
from studytool.data.phantoms import PHANTOMS
from studytool.data.shards import open_dataset, verify_dataset
from studytool.data.simulate import Scene, select_densities, simulate_dataset
from studytool.errors import DataError
from studytool.settings import SimulateSettings

SMALL = {"volumes_per_class": 30, "side": 24, "tomograms": (3, 1, 1)}


def settings(**changes):
    return SimulateSettings(**{**SMALL, **changes})


def scene(**changes):
    return Scene(settings(**changes), select_densities(settings(**changes)))


def load(folder):
    dataset = open_dataset(folder)
    volumes = np.zeros((len(dataset), *dataset.manifest.shape_dhw), dataset.manifest.dtype)
    dataset.gather(np.arange(len(dataset)), volumes)
    return dataset, volumes.astype(np.float64)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "data"
    progress = []
    simulate_dataset(settings(), folder, workers=1, on_progress=lambda *done: progress.append(done))
    return folder, progress


# the dataset


def test_every_tomogram_holds_every_class_and_belongs_to_one_split(simulated):
    dataset, _ = load(simulated[0])
    assert dataset.manifest.classes == tuple(sorted(PHANTOMS))
    assert all(counts == {"train": 18, "val": 6, "test": 6} for counts in dataset.manifest.counts.values())
    splits = {}
    for tomogram in np.unique(dataset.tomograms):
        here = dataset.tomograms == tomogram
        assert len(np.unique(dataset.labels[here])) == 10
        (splits[tomogram],) = np.unique(dataset.splits[here])
    assert sorted(splits.values()) == ["test", "train", "train", "train", "val"]
    assert len(set(dataset.particle_ids)) == 300
    assert (dataset.snr == 0.1).all()


def test_provenance_tells_how_the_volumes_were_made(simulated):
    manifest = verify_dataset(simulated[0])
    assert manifest.provenance["kind"] == "simulation"
    assert SimulateSettings.model_validate_json(json.dumps(manifest.provenance["settings"])) == settings()
    assert "var(signal) / var(noise)" in manifest.provenance["snr_definition"]
    defoci = [tomogram["defocus_um"] for tomogram in manifest.provenance["tomograms"].values()]
    assert len(set(defoci)) == 5
    assert all(2 <= defocus <= 6 for defocus in defoci)
    assert (manifest.voxel_size_angstrom, manifest.shape_dhw, manifest.dtype) == (10.0, (24, 24, 24), "float16")


def test_progress_ends_at_the_total(simulated):
    assert simulated[1][-1] == (300, 300)
    assert [done for done, _ in simulated[1]] == sorted({done for done, _ in simulated[1]})


def test_class_cannot_be_told_from_brightness_or_variance(simulated):
    """A nearest-mean classifier on mean and deviation is at chance on other tomograms (0.1 of 120, deviation 0.03)."""
    dataset = open_dataset(simulated[0])
    features = volume_statistics(dataset)[:, :2]
    assert np.abs(features - [0, 1]).max() < 1e-3
    train = dataset.splits == "train"
    assert nearest_mean_accuracy(features, dataset.labels, train, ~train) < 0.2


def test_class_can_be_told_from_the_shape(tmp_path):
    """The same classifier on the spectrum's shells, which no rotation changes, is far above chance: there is something
    to be learned."""
    simulate_dataset(settings(snr=0.3), tmp_path / "data", workers=1)
    dataset, volumes = load(tmp_path / "data")
    cycles = 24 * np.fft.fftfreq(24)
    shells = np.round(np.sqrt(sum(np.meshgrid(*[cycles**2] * 3)))).astype(int).ravel()
    power = np.abs(np.fft.fftn(volumes, axes=(1, 2, 3))).reshape(len(volumes), -1) ** 2
    features = np.log([np.bincount(shells, one)[1:12] / np.bincount(shells)[1:12] for one in power])
    train = dataset.splits == "train"
    assert nearest_mean_accuracy(features, dataset.labels, train, ~train) > 0.4


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path, simulated):
    manifest = simulate_dataset(settings(), tmp_path / "data", workers=2)
    assert manifest == verify_dataset(simulated[0])


def test_the_seed_decides(tmp_path, simulated):
    few = {"classes": 2, "volumes_per_class": 5, "side": 16}
    first = simulate_dataset(settings(**few), tmp_path / "a", workers=1)
    assert simulate_dataset(settings(**few), tmp_path / "b", workers=1).fingerprint == first.fingerprint
    assert simulate_dataset(settings(**few, seed=1), tmp_path / "c", workers=1).fingerprint != first.fingerprint


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupted_simulation_leaves_nothing(tmp_path, workers):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_dataset(settings(), tmp_path / "data", workers=workers, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert multiprocessing.active_children() == []


# one volume


@pytest.mark.parametrize("snr", [0.05, 1.0])
@pytest.mark.parametrize("neighbours", [0, 4])
def test_snr_is_what_it_says(snr, neighbours):
    one = scene(snr=snr, neighbours=neighbours)
    for density in one.densities[:4]:
        signal, _, noise = one.parts(density, 2, np.random.default_rng(5))
        assert signal.var() / noise.var() == pytest.approx(snr, rel=1e-4)


def test_without_noise_there_is_none():
    one = scene(snr="infinite")
    _, _, noise = one.parts(one.densities[0], 0, np.random.default_rng(5))
    assert not noise.any()
    assert one.particle(0).snr == float("inf")


def test_noise_is_white_inside_the_wedge_and_absent_outside():
    one = scene()
    mask = wedge(24, (-60, 60), 3) > 0
    power = 0
    for seed in range(20):
        noise = one.parts(one.densities[seed % 10], 0, np.random.default_rng(seed))[2]
        power = power + np.abs(np.fft.rfftn(noise / noise.std())) ** 2 / 20
    assert power[~mask].max() < 1e-6 * power[mask].mean()
    radius = np.sqrt(
        np.fft.fftfreq(24)[:, None, None] ** 2 + np.fft.fftfreq(24)[:, None] ** 2 + np.fft.rfftfreq(24) ** 2
    )
    low, high = power[mask & (radius < 0.2)].mean(), power[mask & (radius > 0.4)].mean()
    assert low / high == pytest.approx(1, abs=0.05)


def test_the_whole_volume_has_gone_through_the_wedge():
    volume = scene(neighbours=3).particle(7).volume_DHW.astype(np.float64)
    spectrum = np.abs(np.fft.rfftn(volume)) ** 2
    mask = wedge(24, (-60, 60), 3) > 0
    assert spectrum[~mask].max() < 1e-8 * spectrum[mask].mean()


def test_signal_is_bright_and_shifted_no_further_than_it_should_be():
    one = scene(
        ctf=False, tilt_range_degrees=(-90.0, 90.0), tilt_step_degrees=1.0, classes=("ferritin_like", "rubisco_like")
    )
    shifts = []
    for seed in range(60):
        signal, _, _ = one.parts(one.densities[0], 0, np.random.default_rng(seed))
        shifts.append([(grid * signal).sum() / signal.sum() - 11.5 for grid in np.indices(signal.shape)])
        assert signal.max() > -5 * signal.min()
    assert np.abs(shifts).max() == pytest.approx(2.4, abs=0.15)
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.5


def test_poses_are_uniform():
    """The long axis of a slender particle points everywhere: first moments 0, second moments 1/3."""
    one = scene(ctf=False, tilt_range_degrees=(-90.0, 90.0), tilt_step_degrees=1.0, shift_fraction=0.0,
                classes=("filament_like", "rubisco_like"), side=20)  # fmt: skip
    second = np.zeros((3, 3))
    grids = np.stack([grid - 9.5 for grid in np.indices((20, 20, 20))]).reshape(3, -1)
    for seed in range(300):
        signal, _, _ = one.parts(one.densities[0], 0, np.random.default_rng(seed))
        axis = np.linalg.eigh((grids * signal.ravel()) @ grids.T)[1][:, -1]
        second += np.outer(axis, axis) / 300
    np.testing.assert_allclose(second, np.eye(3) / 3, atol=0.06)


def test_neighbours_come_in_numbers_up_to_the_setting_and_stay_beside_the_particle():
    one = scene(neighbours=2)
    crowds = [one.parts(one.densities[0], 0, np.random.default_rng(seed))[1] for seed in range(60)]
    with_none = np.mean([not crowd.any() for crowd in crowds])
    assert with_none == pytest.approx(1 / 3, abs=0.2)
    bare = scene(neighbours=2, ctf=False, tilt_range_degrees=(-90.0, 90.0), tilt_step_degrees=1.0)
    middle = np.mean(
        [bare.parts(bare.densities[1], 0, np.random.default_rng(s))[1][10:14, 10:14, 10:14].mean() for s in range(30)]
    )
    assert middle < 0.2  # inside the particle it would be near 1


def test_tomograms_differ_in_defocus():
    one = scene(snr="infinite")
    rng = [np.random.default_rng(3) for _ in range(3)]
    first, again, other = (one.parts(one.densities[0], t, rng[i])[0] for i, t in enumerate((0, 0, 1)))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


# what cannot be simulated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 11}, "asks for 11, there are 10 phantoms"),
        ({"classes": ("proteasome", "ferritin_like")}, "unknown class 'proteasome'; did you mean 'proteasome_like'"),
        ({"classes": ("ferritin_like", "ferritin_like")}, "two or more different classes"),
        ({"classes": 1}, "two or more different classes"),
        ({"side": 8}, "'proteasome_like' is about 182 Å across and does not fit a box of 8 voxels of 10 Å"),
        ({"templates": "/nowhere"}, "/nowhere: no such folder of templates"),
    ],
)
def test_what_cannot_be_simulated_is_said_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        simulate_dataset(settings(**changes), tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_templates_become_classes(shared_data, tmp_path):
    folder = str(shared_data / "macromolecules_10A")
    few = settings(templates=folder, classes=("3gl1", "1bxn"), volumes_per_class=5)
    manifest = simulate_dataset(few, tmp_path / "data", workers=1)
    assert manifest.classes == ("1bxn", "3gl1")
    names = [density.name for density in select_densities(settings(templates=folder, classes=10, side=32))]
    assert names == ["1bxn", "1qvr", "1u6g", "2cg9", "3cf3", "3d2f", "3gl1", "3h84", "3j9i", "6utj"]
