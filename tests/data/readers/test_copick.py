from __future__ import annotations

import json
import pickle
import shutil
import sys

import mrcfile
import numpy as np
import pytest

from studytool.data import importing
from studytool.data.readers.copick import recognize
from studytool.data.readers.source import ReadOptions
from studytool.errors import DataError

numcodecs = pytest.importorskip("numcodecs")
zarr = pytest.importorskip("zarr", reason="no zarr: pip install 'studytool[copick]'")
pytest.importorskip("copick", reason="no copick: pip install 'studytool[copick]'")

SHAPE = (20, 24, 28)
BRIGHT = (9, 12, 15)  # z, y, x
BOX = 7
OPTIONS = ReadOptions(box=BOX)


def volume_with(bright=(BRIGHT,)):
    volume = np.zeros(SHAPE, dtype=np.float32)
    for place in bright:
        volume[place] = 1
    return volume


def write_zarr(path, volume=None, voxel_size=10.0, chunks=(8, 8, 8), separator="/", **array):
    """An OME-NGFF volume of two levels, as copick and the portal write them."""
    volume = volume_with() if volume is None else volume
    path.mkdir(parents=True)
    group = zarr.open_group(str(path), mode="w")
    levels = []
    for level, scale in enumerate((1, 2)):
        data = volume[::scale, ::scale, ::scale]
        group.create_dataset(
            str(level), data=data, chunks=chunks, dimension_separator=separator, write_empty_chunks=True, **array
        )
        scales = [voxel_size * scale] * 3
        levels.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scales}]})
    axes = [{"name": name, "type": "space", "unit": "angstrom"} for name in "zyx"]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": levels, "version": "0.4"}]
    return path


def write_mrc(path, voxel_size=10.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path) as mrc:
        mrc.set_data(volume_with())
        mrc.set_volume()
        mrc.voxel_size = voxel_size
    return path


def write_picks(run, name="ribosome", user="ada", session="1", places=(BRIGHT,), shift_xyz=(0, 0, 0), **more):
    points = []
    for z, y, x in places:
        matrix = np.eye(4)
        matrix[:3, 3] = shift_xyz
        location = {"x": 10.0 * x - shift_xyz[0], "y": 10.0 * y - shift_xyz[1], "z": 10.0 * z - shift_xyz[2]}
        points.append({"location": location, "transformation_": matrix.tolist(), "instance_id": 0, "score": 1.0})
    picks = {"pickable_object_name": name, "user_id": user, "session_id": session, "points": points, **more}
    path = run / "Picks" / f"{user}_{session}_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(picks))
    return path


def write_config(folder, overlay_root="overlay", **more):
    config = {
        "config_type": "filesystem",
        "name": "test",
        "version": "1.0",
        "pickable_objects": [{"name": name, "is_particle": True, "label": 1} for name in ("ribosome", "0012")],
        "overlay_root": overlay_root,
        **more,
    }
    path = folder / "copick_config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def project(tmp_path):
    """A project of one run, with everything in the overlay."""
    run = tmp_path / "overlay" / "ExperimentRuns" / "TS_01"
    write_zarr(run / "VoxelSpacing10.000" / "wbp.zarr")
    write_picks(run)
    write_config(tmp_path, f"local://{tmp_path}/overlay")
    return tmp_path


def run_of(project, name="TS_01"):
    return project / "overlay" / "ExperimentRuns" / name


def refused(path, options=OPTIONS):
    with pytest.raises(DataError) as caught:
        recognize(path, options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_bright_in_the_middle(source, entry=None):
    read = source.read(entry or source.entries[0])
    assert read.volume_DHW.shape == (BOX,) * 3
    assert read.volume_DHW.dtype == np.float32
    assert np.argwhere(read.volume_DHW).tolist() == [[BOX // 2] * 3]
    assert read.voxel_size_angstrom == 10


# copick projects


@pytest.mark.parametrize("given", ["", "copick_config.json"])
def test_a_project(given, project):
    source = pickle.loads(pickle.dumps(recognize(project / given, OPTIONS)))
    (entry,) = source.entries
    assert (entry.label, entry.tomogram, entry.position_zyx) == ("ribosome", "TS_01", BRIGHT)
    assert entry.particle_id == "TS_01/ribosome/ada/1/000001"
    assert "ada_1_ribosome.json, point 1" in entry.origin
    assert_bright_in_the_middle(source)


def test_a_project_that_copick_itself_has_written(tmp_path):
    from copick import from_string

    config = write_config(tmp_path, f"local://{tmp_path}/overlay", overlay_fs_args={"auto_mkdir": True})
    root = from_string(config.read_text())
    run = root.new_run("TS_07")
    run.new_voxel_spacing(10.0).new_tomogram("denoised").from_numpy(volume_with(), levels=1)
    z, y, x = BRIGHT
    picks = run.new_picks("0012", "5", "ada")
    picks.from_numpy(np.array([[10.0 * x, 10.0 * y, 10.0 * z]]), np.eye(4)[None])
    source = recognize(tmp_path, OPTIONS)
    assert (source.entries[0].label, source.entries[0].tomogram) == ("0012", "TS_07")
    assert_bright_in_the_middle(source)


def test_the_shift_of_a_point_counts(project):
    write_picks(run_of(project), shift_xyz=(30.0, -20.0, 10.0))
    assert_bright_in_the_middle(recognize(project, OPTIONS))


def test_static_and_overlay_roots(project):
    """Tomograms in the static root, picks in the overlay; relative roots count from the configuration."""
    static = project / "static" / "ExperimentRuns" / "TS_01" / "VoxelSpacing10.000"
    static.parent.mkdir(parents=True)
    shutil.move(run_of(project) / "VoxelSpacing10.000", static)
    write_config(project, "overlay", static_root="./static")
    assert_bright_in_the_middle(recognize(project, OPTIONS))


def test_reading_changes_nothing(project):
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
    source = recognize(project, OPTIONS)
    source.read(source.entries[0])
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == before


def test_of_several_tomograms_one_has_to_be_chosen(project):
    write_zarr(run_of(project) / "VoxelSpacing10.000" / "denoised.zarr", volume_with([]))
    write_zarr(run_of(project) / "VoxelSpacing20.000" / "wbp.zarr", volume_with([]), 20.0)
    message = refused(project)
    assert "'denoised' of 10 Å (1 runs), 'wbp' of 10 Å (1 runs), 'wbp' of 20 Å (1 runs)" in message
    assert "--tomogram-type" in message
    assert "'wbp' of 20 Å" in refused(project, ReadOptions(box=BOX, tomogram_type="wbp"))
    chosen = ReadOptions(box=BOX, tomogram_type="wbp", voxel_size_angstrom=10.0)
    assert_bright_in_the_middle(recognize(project, chosen))
    assert "there are 'denoised' of 10" in refused(project, ReadOptions(box=BOX, tomogram_type="isonet"))


def test_of_several_annotations_one_has_to_be_chosen(project):
    write_picks(run_of(project), user="bob", session="2", places=[(10, 10, 10), BRIGHT])
    write_picks(run_of(project), "0012", "bob", "3")
    message = refused(project)
    assert "annotated more than once" in message
    assert "'ada/1'" in message
    assert "'bob/2'" in message
    assert len(recognize(project, ReadOptions(box=BOX, picks_of="ada")).entries) == 1
    assert len(recognize(project, ReadOptions(box=BOX, picks_of="bob/2")).entries) == 2
    assert [e.label for e in recognize(project, ReadOptions(box=BOX, picks_of="bob/3")).entries] == ["0012"]
    assert "'ada/1'" in refused(project, ReadOptions(box=BOX, picks_of="ada/7"))


def test_a_run_without_the_tomogram_is_left_out_and_said(project):
    write_picks(run_of(project, "TS_02"))
    source = recognize(project, OPTIONS)
    assert {entry.tomogram for entry in source.entries} == {"TS_01"}
    assert any("TS_02" in note for note in source.notes)


def test_a_box_beyond_the_border_is_left_out(project):
    write_picks(run_of(project), places=[(0, 5, 5), BRIGHT])
    source = recognize(project, OPTIONS)
    assert [entry.particle_id for entry in source.entries] == ["TS_01/ribosome/ada/1/000002"]
    assert any("left out" in note for note in source.notes)


@pytest.mark.parametrize(
    "change",
    [
        {"overlay_root": "s3://bucket/project"},
        {"static_root": "s3://bucket/project", "static_fs_args": {"anon": True}},
        {"static_root": "ssh://host/project"},
        {"static_root": "simplecache::file:///tmp"},
        {"static_root": 7},
        {"config_type": "cryoet_data_portal", "dataset_ids": [10301]},
        {"config_type": "mlcroissant"},
    ],
)
def test_what_is_elsewhere_is_not_opened(change, project, monkeypatch):
    import fsspec

    monkeypatch.setattr(fsspec.core, "url_to_fs", None)
    message = refused(write_config(project, **{"overlay_root": "overlay", **change}))
    assert "copy it here first" in message


def test_options_of_a_file_system_go_nowhere(project):
    write_config(project, "overlay", overlay_fs_args={"auto_mkdir": True, "target_protocol": "s3", "nonsense": 1})
    assert_bright_in_the_middle(recognize(project, OPTIONS))


def test_roots_outside_of_the_project_need_to_be_allowed(project):
    inner = project / "inner"
    inner.mkdir()
    config = write_config(inner, str(project / "overlay"))
    message = refused(config)
    assert message.startswith(f"{project / 'overlay'}: lies outside of {inner}")
    assert "--root" in message
    assert_bright_in_the_middle(recognize(config, ReadOptions(box=BOX, root=project)))
    assert "not there" in refused(write_config(inner, "nowhere"))


def test_a_link_to_a_tomogram_outside_is_not_followed(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "wbp.zarr"
    inside = run_of(project) / "VoxelSpacing10.000" / "wbp.zarr"
    shutil.move(inside, elsewhere)
    inside.symlink_to(elsewhere)
    assert "--root" in refused(project)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"points": 3}', '{"pickable_object_name": "a", "user_id": "u", "session_id": "1", "points": [{}]}'],
)
def test_damaged_picks(content, project):
    path = write_picks(run_of(project))
    path.write_text(content)
    assert str(path) in refused(project)


def test_picks_that_are_not_finite_or_in_another_unit(project):
    path = write_picks(run_of(project), places=[BRIGHT, (1, 1, float("nan"))])
    assert f"{path}, point 2" in refused(project)
    path = write_picks(run_of(project), unit="voxel")
    assert "'voxel'" in refused(project)


def test_a_name_of_picks_that_copick_does_not_write(project):
    (run_of(project) / "Picks" / "mine.json").write_text("{}")
    assert "not as copick writes it" in refused(project)


def test_a_missing_package_is_one_line(project, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "copick"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "copick", None)
    assert "pip install 'studytool[copick]'" in refused(project)


def test_projects_that_are_not_clear(project, tmp_path):
    (project / "second.json").write_text((project / "copick_config.json").read_text())
    assert "2 copick configurations" in refused(project)
    assert "without its configuration" in refused(project / "overlay")


def test_other_things_are_for_others(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    (tmp_path / "b.json").write_text("[" * 100_000)
    (tmp_path / "c.json").write_bytes(b"{\xff")
    for path in (tmp_path, *tmp_path.iterdir()):
        assert recognize(path, OPTIONS) is None
    assert recognize(write_config(tmp_path), ReadOptions(box=BOX, tomograms=tmp_path)) is None


# the layout of the CryoET Data Portal


def write_annotation(folder, places=(BRIGHT,), name="ribosome-1.0", shape="point", label="cytosolic ribosome", **facts):
    """Points of the portal count voxels."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"type": shape, "location": {"x": x, "y": y, "z": z}} for z, y, x in places]
    path = folder / f"{name}_{shape.lower()}.ndjson"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if label is not None:
        facts = {"annotation_object": {"name": label, "id": "GO:0022626"}, **facts}
        (folder / f"{name}.json").write_text(json.dumps(facts))
    return path


def write_portal_tomogram(spacing, number="100", kind="mrc", stem="TS_01", processing="raw", **facts):
    folder = spacing / "Tomograms" / number
    path = write_mrc(folder / f"{stem}.mrc") if kind == "mrc" else write_zarr(folder / f"{stem}.zarr")
    facts = {"reconstruction_method": "WBP", "processing": processing, **facts}
    (folder / "tomogram_metadata.json").write_text(json.dumps(facts))
    return path


@pytest.fixture
def portal(tmp_path):
    """A dataset of one run."""
    spacing = spacing_of(tmp_path)
    write_portal_tomogram(spacing)
    write_annotation(spacing / "Annotations" / "100")
    return tmp_path


def spacing_of(dataset, run="TS_01", size="10.000"):
    return dataset / run / "Reconstructions" / f"VoxelSpacing{size}"


@pytest.mark.parametrize("kind", ["mrc", "zarr"])
@pytest.mark.parametrize("given", ["", "TS_01"])
def test_a_download_of_the_portal(kind, given, tmp_path):
    write_portal_tomogram(spacing_of(tmp_path), kind=kind)
    write_annotation(spacing_of(tmp_path) / "Annotations" / "100")
    source = pickle.loads(pickle.dumps(recognize(tmp_path / given, OPTIONS)))
    (entry,) = source.entries
    assert (entry.label, entry.tomogram, entry.position_zyx) == ("cytosolic ribosome", "TS_01", BRIGHT)
    assert_bright_in_the_middle(source)


def test_a_whole_run_of_the_portal_is_no_folder_of_classes(portal):
    """A run has folders of MRC files that are no particles: tilt series, frames."""
    write_mrc(portal / "TS_01" / "TiltSeries" / "100" / "TS_01.mrc")
    write_mrc(portal / "TS_01" / "Frames" / "TS_01_0.mrc")
    for path in (portal, portal / "TS_01"):
        assert importing.recognize(path, OPTIONS).kind == "CryoET Data Portal runs"


def test_the_portal_needs_no_copick(portal, monkeypatch):
    monkeypatch.setitem(sys.modules, "copick", None)
    assert_bright_in_the_middle(recognize(portal, OPTIONS))


def test_a_tomogram_as_zarr_and_mrc_is_one(portal):
    write_zarr(spacing_of(portal) / "Tomograms" / "100" / "TS_01.zarr", volume_with([]))
    assert_bright_in_the_middle(recognize(portal, OPTIONS))


def test_points_with_and_without_orientation_are_the_same(portal):
    write_annotation(spacing_of(portal) / "Annotations" / "100", shape="OrientedPoint")
    (entry,) = recognize(portal, OPTIONS).entries
    assert "orientedpoint" in entry.origin


def test_without_metadata_the_file_names_the_object(portal):
    write_annotation(spacing_of(portal) / "Annotations" / "101", name="fatty_acid_synthase-1.0", label=None)
    assert {entry.label for entry in recognize(portal, OPTIONS).entries} == {
        "cytosolic ribosome",
        "fatty_acid_synthase",
    }


def test_choices_in_the_portal(portal):
    spacing = spacing_of(portal)
    write_portal_tomogram(spacing, "101", processing="denoised")
    assert "'wbp-denoised' of 10 Å (1 runs), 'wbp-raw' of 10 Å (1 runs)" in refused(portal)
    for kind in ("wbp-raw", "100"):
        assert_bright_in_the_middle(recognize(portal, ReadOptions(box=BOX, tomogram_type=kind)))
    write_portal_tomogram(spacing, "102")
    message = refused(portal, ReadOptions(box=BOX, tomogram_type="wbp-raw"))
    assert "several such tomograms" in message
    assert "'102'" in message
    write_annotation(spacing / "Annotations" / "103")
    chosen = ReadOptions(box=BOX, tomogram_type="100")
    assert "annotated more than once, by '100' and '103'" in refused(portal, chosen)
    assert len(recognize(portal, ReadOptions(box=BOX, tomogram_type="100", picks_of="103")).entries) == 1


def test_points_of_another_alignment_are_left_out(tmp_path):
    spacing = spacing_of(tmp_path)
    write_portal_tomogram(spacing, alignment_metadata_path="a/100")
    write_annotation(spacing / "Annotations" / "100", alignment_metadata_path="a/100")
    write_annotation(spacing / "Annotations" / "101", name="other-1.0", label="other", alignment_metadata_path="a/101")
    source = recognize(tmp_path, OPTIONS)
    assert {entry.label for entry in source.entries} == {"cytosolic ribosome"}
    assert any("another alignment" in note for note in source.notes)


def test_points_of_another_voxel_spacing_are_not_taken(portal):
    other = spacing_of(portal, size="5.000")
    (other / "Tomograms").mkdir(parents=True)
    write_annotation(other / "Annotations" / "100", places=[(1, 1, 1)])
    assert len(recognize(portal, OPTIONS).entries) == 1


@pytest.mark.parametrize("line", ["{", '{"location": {"x": 1}}', '{"location": {"x": 1, "y": 2, "z": "a"}}', "3"])
def test_lines_that_are_no_points(line, portal):
    path = spacing_of(portal) / "Annotations" / "100" / "ribosome-1.0_point.ndjson"
    path.write_text(path.read_text() + line + "\n")
    assert f"{path}, line 2" in refused(portal)


def test_a_voxel_size_in_the_file_that_differs_is_said(tmp_path):
    spacing = spacing_of(tmp_path)
    write_mrc(spacing / "Tomograms" / "100" / "TS_01.mrc", voxel_size=13.48)
    write_annotation(spacing / "Annotations" / "100")
    source = recognize(tmp_path, OPTIONS)
    assert any("13.48" in note for note in source.notes)
    assert_bright_in_the_middle(source)


def test_tomograms_without_points(portal):
    shutil.rmtree(spacing_of(portal) / "Annotations")
    assert "without points" in refused(portal)


# zarr metadata of strangers


@pytest.mark.parametrize("array", [{}, {"separator": "."}, {"dtype": ">i2"}, {"compressor": None}, {"order": "F"}])
def test_kinds_of_zarr(array, project):
    path = run_of(project) / "VoxelSpacing10.000" / "wbp.zarr"
    shutil.rmtree(path)
    write_zarr(path, **array)
    assert_bright_in_the_middle(recognize(project, OPTIONS))


def layout_of(project):
    return run_of(project) / "VoxelSpacing10.000" / "wbp.zarr" / "0" / ".zarray"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [10**9, 10**9, 10**9]}, "that is no tomogram"),
        ({"shape": [60000, 60000, 60000]}, "that is no tomogram"),
        ({"chunks": [10000, 10000, 10000]}, "that is no tomogram"),
        ({"shape": [20, 24]}, "three whole numbers"),
        ({"shape": [20, 24, -1]}, "three whole numbers"),
        ({"shape": [20, 24, True]}, "three whole numbers"),
        ({"dtype": "|O"}, "dtype '|O'"),
        ({"dtype": [["a", "<f4"]]}, "dtype"),
        ({"dtype": "nonsense"}, "dtype"),
        ({"zarr_format": 3}, "zarr_format 3"),
        ({"compressor": {"id": "pickle"}}, "'pickle'"),
        ({"filters": [{"id": "pickle"}]}, "pickle"),
        ({"dimension_separator": "/../"}, "dimension_separator"),
    ],
)
def test_metadata_that_cannot_be_true_or_would_run_code(change, words, project):
    path = layout_of(project)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    message = refused(project)
    assert words in message
    assert str(path.parent) in message


@pytest.mark.parametrize("name", ["../../../../..", "/etc", "", 7, "a/../../b"])
def test_levels_outside_of_the_volume(name, project):
    path = layout_of(project).parent.parent / ".zattrs"
    attributes = json.loads(path.read_text())
    attributes["multiscales"][0]["datasets"][0]["path"] = name
    path.write_text(json.dumps(attributes))
    assert "has to be a folder inside" in refused(project)


def test_axes_in_another_order(project):
    path = layout_of(project).parent.parent / ".zattrs"
    attributes = json.loads(path.read_text())
    attributes["multiscales"][0]["axes"].reverse()
    path.write_text(json.dumps(attributes))
    assert "['x', 'y', 'z']" in refused(project)


def test_a_chunk_that_is_missing_or_damaged_names_the_particle(project):
    source = recognize(project, OPTIONS)
    chunk = layout_of(project).parent / "1" / "1" / "1"
    chunk.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"ada_1_ribosome\.json, point 1: .*cannot be read"):
        source.read(source.entries[0])
    chunk.write_bytes(bytes(10_000))
    with pytest.raises(DataError, match="10000 bytes for a chunk of 2048"):
        source.read(source.entries[0])
    chunk.unlink()
    with pytest.raises(DataError, match="this chunk is missing"):
        source.read(source.entries[0])


@pytest.mark.parametrize(
    "codec", [numcodecs.Blosc(), numcodecs.Zstd(), numcodecs.LZ4(), numcodecs.Zlib(), numcodecs.BZ2()]
)
def test_a_chunk_that_would_get_larger_than_it_may_is_refused_before_it_is_expanded(project, codec, monkeypatch):
    path = run_of(project) / "VoxelSpacing10.000" / "wbp.zarr"
    shutil.rmtree(path)
    write_zarr(path, compressor=codec)
    source = recognize(project, OPTIONS)
    for chunk in layout_of(project).parent.glob("*/*/*"):
        chunk.write_bytes(codec.encode(np.zeros(2**16, np.uint8))[:2000])
    monkeypatch.setattr(zarr.Array, "__getitem__", None)
    with pytest.raises(DataError, match=r"point 1: .*2048 bytes, and gets larger"):
        source.read(source.entries[0])


def test_only_the_chunks_under_the_box_are_read(project):
    """The box reaches from 6 to 12, 9 to 15, 12 to 18: chunks 0 and 1, 1, 1 and 2."""
    needed = {(z, 1, x) for z in (0, 1) for x in (1, 2)}
    folder = layout_of(project).parent
    for path in list(folder.glob("*/*/*")):
        if tuple(map(int, path.relative_to(folder).parts)) not in needed:
            path.unlink()
    assert_bright_in_the_middle(recognize(project, OPTIONS))


def test_chunks_are_put_together_and_decoded_once(project, monkeypatch):
    """Random values in chunks that do not divide the shape; far apart points are read cell by cell."""
    shape = (20, 24, 300)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    path = run_of(project) / "VoxelSpacing10.000" / "wbp.zarr"
    shutil.rmtree(path)
    write_zarr(path, values, chunks=(9, 24, 130))
    write_picks(run_of(project), places=[(9, 12, 10), (9, 12, 290), (9, 12, 12), (9, 12, 288), (9, 12, 130)])
    source = recognize(project, OPTIONS)
    assert [entry.position_zyx[2] for entry in source.entries] == [10, 12, 130, 290, 288]
    decoded = []
    whole = zarr.Array.__getitem__
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda self, part: decoded.append(part) or whole(self, part))
    for entry in source.entries:
        z, y, x = (int(place) - BOX // 2 for place in entry.position_zyx)
        np.testing.assert_array_equal(source.read(entry).volume_DHW, values[z : z + BOX, y : y + BOX, x : x + BOX])
    assert len(decoded) == 6
