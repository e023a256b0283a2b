from __future__ import annotations

import dataclasses

import pytest
from lab import make_lab, plan, refused, run, volume, write_mrc

from studytool.data.importing import plan_import, recognize
from studytool.data.readers.source import ReadOptions
from studytool.settings import ImportSettings


@pytest.fixture
def lab(tmp_path):
    return make_lab(tmp_path / "lab")


def test_classes_are_chosen_and_what_is_dropped_is_said(lab):
    (lab / "0012" / "p01.mrc").unlink()
    assert plan(lab).counts == {"0012": 4, "ribosome": 5}
    assert plan(lab, include=("0012",)).counts == {"0012": 4}
    assert plan(lab, exclude=("0012",)).dropped == {"of classes that are not wanted": 4}
    assert plan(lab, min_per_class=5).dropped == {"of classes with fewer than 5 volumes": 4}
    refused(lambda: plan(lab, include=("ribosom",)), "--include", "did you mean 'ribosome'")
    refused(lambda: plan(lab, exclude=("12",)), "--exclude")
    refused(lambda: plan(lab, min_per_class=6), "no particle is left", "9 of classes with fewer than 6 volumes")


def test_the_plan_says_what_a_box_becomes(lab):
    found = plan(lab, rescale_to_angstrom=20.0)
    assert (found.found_shape_dhw, found.shape_dhw) == ((6, 6, 6), (3, 3, 3))
    assert (found.found_voxel_size_angstrom, found.voxel_size_angstrom) == (10.0, 20.0)
    assert found.looked_at == 10


def table(lab, rows):
    (lab / "list.csv").write_text("path,label,tomogram\n" + "".join(f"{row}\n" for row in rows))
    return lab / "list.csv"


def test_a_particle_twice_is_refused(lab):
    path = table(lab, ["ribosome/p00.mrc,a,t0", "0012/p01.mrc,a,t0", "ribosome/p00.mrc,b,t1"])
    refused(lambda: plan(path), "row 3", "row 1 already")


def test_a_file_twice_under_two_names_is_refused(lab):
    path = table(lab, ["ribosome/p00.mrc,a,t0", "0012/p01.mrc,a,t0", "./ribosome/p00.mrc,b,t1"])
    refused(lambda: plan(path), "row 3", "row 1 already")


@pytest.mark.parametrize("settings", [{"box": 1024}, {"rescale_to_angstrom": 0.001, "box": 8}])
def test_volumes_too_large_for_any_memory_are_not_begun(lab, settings):
    refused(lambda: plan(lab, **settings), "p01.mrc", "512 x 512 x 512", "--rescale")


def test_one_volume_that_would_grow_too_large(lab):
    write_mrc(lab / "ribosome" / "p08.mrc", volume(8), voxel_size=1e6)
    refused(lambda: plan(lab, rescale_to_angstrom=10.0, box=6), "p08.mrc", "would become 600000 x")


def test_names_have_a_length(lab):
    path = table(lab, [f"ribosome/p00.mrc,{'x' * 255},t0", "0012/p01.mrc,a,t0"])
    assert len(plan(path).counts) == 2
    path = table(lab, [f"ribosome/p00.mrc,{'x' * 256},t0", "0012/p01.mrc,a,t0"])
    refused(lambda: plan(path), "row 1", "256 characters")


def test_particles_without_a_label(lab):
    path = table(lab, ["ribosome/p00.mrc,a,t0", "0012/p01.mrc,,t0"])
    assert plan(path).dropped == {"without a label": 1}
    path = table(lab, ["ribosome/p00.mrc,,t0", "0012/p01.mrc,,t0"])
    refused(lambda: plan(path), "none of the 2 particles has a label", "--label-column", "--label")


def test_a_tomogram_in_two_splits_is_refused(lab, tmp_path, make_particles):
    run(lab, tmp_path / "out")
    source = recognize(tmp_path / "out", ReadOptions())
    first, second, *others = source.entries
    changed = (
        dataclasses.replace(first, tomogram="t1", split="train"),
        dataclasses.replace(second, tomogram="t1", split="test"),
    )
    source = dataclasses.replace(source, entries=(*changed, *others))
    refused(lambda: plan_import(source, ImportSettings()), "tomogram 't1'", "'train'", "'test'")
