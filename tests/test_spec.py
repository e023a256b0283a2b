"""Study files: what they mean, and one clear line for each way of getting them wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from studytool.errors import SpecError
from studytool.spec import LONGEST_ARM_NAME, factor_overrides, load_study, single_trial

ROOT = Path(__file__).parents[1]
GOOD = """
name: small
data: {path: data/small}
arms:
  backbone: [s3d, r3d_18]
  freeze: [none, backbone]
search:
  learning_rate: {log_uniform: [1e-4, 1e-2]}
  trials_per_arm: 2
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(text: str = GOOD, *overrides: str):
        Path("a.yaml").write_text(text)
        return load_study("a.yaml", overrides)

    return load


def test_arms_are_the_cross_product_less_what_is_excluded(study):
    names = [arm.name for arm in study().list_arms()]
    assert names == ["s3d.none", "s3d.backbone", "r3d_18.none", "r3d_18.backbone"]
    left = study(GOOD + "exclude: [{backbone: r3d_18, freeze: [none, stem]}]").list_arms()
    assert [arm.name for arm in left] == ["s3d.none", "s3d.backbone", "r3d_18.backbone"]


def test_a_trial_takes_the_arm_then_the_sampled_values_then_the_sections(study):
    spec = study(GOOD + "train: {weight_decay: 0.5, max_epochs: 3}\n")
    trial = spec.trial(spec.list_arms()[1], {"learning_rate": 0.002}, phase="search", number=7, seed=1)
    assert (trial.model.backbone, trial.model.freeze) == ("s3d", "backbone")
    assert (trial.train.learning_rate, trial.train.weight_decay, trial.train.max_epochs) == (0.002, 0.5, 3)
    assert trial.trial_id == "s3d.backbone.search-007"
    assert trial.parameters["weight_decay"] == 0.5


def test_the_configuration_hash_tells_what_is_computed_not_what_it_is_called(study):
    spec = study()
    arms = spec.list_arms()
    one = spec.trial(arms[0], {"learning_rate": 0.002}, phase="search", number=0, seed=1)
    same = spec.trial(arms[0], {"learning_rate": 0.002}, phase="search", number=5, seed=1)
    assert one.config_hash("data") == same.config_hash("data")
    others = [
        spec.trial(arms[1], {"learning_rate": 0.002}, phase="search", number=0, seed=1).config_hash("data"),
        spec.trial(arms[0], {"learning_rate": 0.003}, phase="search", number=0, seed=1).config_hash("data"),
        spec.trial(arms[0], {"learning_rate": 0.002}, phase="search", number=0, seed=2).config_hash("data"),
        one.config_hash("other data"),
    ]
    assert len({one.config_hash("data"), *others}) == 5


def test_a_trial_knows_its_split_and_its_hash_takes_the_fingerprint_for_it(study):
    """The fingerprint of the opened dataset tells splits apart; another name for the same one changes nothing."""
    spec, folded = study(), study(GOOD, "data.split=kfold5/0")
    trials = [one.trial(one.list_arms()[0], {}, phase="search", number=0, seed=1) for one in (spec, folded)]
    assert [trial.data_split for trial in trials] == ["stored", "kfold5/0"]
    assert trials[0].config_hash("data") == trials[1].config_hash("data") != trials[1].config_hash("data, split")


def test_overrides_replace_values_of_the_file(study):
    spec = study(GOOD, "confirm.seeds=7", "arms.freeze=[stem]", "train.learning_rate=1e-5")
    assert spec.confirm.seeds == 7
    assert spec.arms["freeze"] == ("stem",)
    assert spec.train.learning_rate == 1e-5


def test_a_single_trial_asks_for_what_is_open(study):
    spec = study()
    with pytest.raises(SpecError, match=r"arms\.backbone has 2 values; choose one, for example --set backbone=s3d"):
        single_trial(spec, {}, seed=0)
    values = factor_overrides(["backbone=s3d", "model.freeze=stem", "learning_rate=3e-4"])
    trial = single_trial(spec, values, seed=4)
    assert (trial.model.freeze, trial.train.learning_rate, trial.seed) == ("stem", 3e-4, 4)
    with pytest.raises(SpecError, match="unknown factor 'learning_rat'; did you mean 'learning_rate'"):
        factor_overrides(["learning_rat=1"])
    with pytest.raises(SpecError, match='--set learning_rate: has to be a number, found "fast"'):
        single_trial(spec, {**values, "learning_rate": "fast"}, seed=0)


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_studies_are_valid(path):
    assert load_study(path).list_arms()


BROKEN = {
    "empty": ("", "a study file is a mapping"),
    "a list": ("- a\n- b", "a study file is a mapping"),
    "a word": ("quickstart", 'found "quickstart"'),
    "no name": ("data: {path: x}", "name: this key is required and missing"),
    "no data": ("name: a", "data: this key is required and missing"),
    "no path": ("name: a\ndata: {}", "data.path: this key is required and missing"),
    "bad name": ("name: ../up\ndata: {path: x}", "a.yaml:1: name: has to be 1 to 64 letters"),
    "name is a number": ("name: 5\ndata: {path: x}", "name: has to be a word or text, found 5"),
    "unknown top key": (GOOD + "serch: {}", "a.yaml:10: serch: unknown key 'serch'; did you mean 'search'?"),
    "unknown section key": (
        GOOD + "train: {epochs: 3}",
        "train.epochs: unknown key 'epochs'; did you mean 'max_epochs' or",
    ),
    "unknown data key": (GOOD.replace("path:", "paht:"), "data.path: this key is required"),
    "section is a number": (GOOD + "train: 3", "train: has to be a mapping"),
    "section is a list": (GOOD + "model: [a]", "model: has to be a mapping"),
    "fraction of an epoch": (
        GOOD + "train: {max_epochs: 2.5}",
        "train.max_epochs: has to be a whole number, found 2.5",
    ),
    "no epochs": (GOOD + "train: {max_epochs: 0}", "train.max_epochs: has to be at least 1, found 0"),
    "number as text": (GOOD + "train: {batch_size: '8'}", 'train.batch_size: has to be a whole number, found "8"'),
    "truth as number": (GOOD + "train: {batch_size: true}", "train.batch_size: has to be a whole number, found true"),
    "negative rate": (GOOD + "train: {learning_rate: -1}", "train.learning_rate: has to be above 0"),
    "infinite rate": (GOOD + "train: {learning_rate: .inf}", "not a finite number"),
    "unknown precision": (GOOD + "train: {precision: fp16}", "train.precision: has to be 'auto', 'float32'"),
    "unknown optimizer": (
        GOOD + "train: {optimizer: adamv}",
        "unknown optimizer 'adamv'; did you mean 'adam' or 'adamw'?",
    ),
    "unknown schedule": (GOOD + "train: {schedule: cosin}", "unknown schedule 'cosin'; did you mean 'cosine'?"),
    "unknown normalization": (GOOD + "input: {normalize: std}", "unknown normalization 'std'"),
    "unknown augmentation": (GOOD + "input: {augment: [xyz]}", "input.augment.0: unknown augmentation 'xyz'; known:"),
    "augment is a word": (GOOD + "input: {augment: turns}", "input.augment: has to be a list"),
    "unknown backbone": (GOOD.replace("s3d", "r2plus1d"), "unknown backbone 'r2plus1d'; did you mean"),
    "unknown freeze point": (GOOD.replace("backbone]", "stage99]"), "stage99"),
    "unknown initialization": (
        GOOD + "model: {init: kinetics}",
        "model.init: unknown initialization 'kinetics'; did you mean",
    ),
    "unknown time axis": (GOOD + "model: {time_axis: t}", "model.time_axis: has to be 'z', 'y' or 'x'"),
    "unknown factor": (GOOD.replace("freeze:", "freze:"), "arms.freze: unknown factor 'freze'; did you mean 'freeze'?"),
    "empty factor": (GOOD.replace("[none, backbone]", "[]"), "arms.freeze: has to be a list of at least 1 values"),
    "factor not a list": (GOOD.replace("[none, backbone]", "none"), "arms.freeze: has to be a list"),
    "factor value twice": (GOOD.replace("[none, backbone]", "[none, none]"), 'arms.freeze.1: "none" stands twice'),
    "arms is a list": (
        GOOD.replace("arms:\n  backbone: [s3d, r3d_18]\n  freeze: [none, backbone]", "arms: [s3d]"),
        "arms: has to be a mapping",
    ),
    "compared and tuned": (
        GOOD.replace("freeze: [none, backbone]", "learning_rate: [1e-3]"),
        "cannot be tuned as well",
    ),
    "value out of range in arms": (
        GOOD.replace("freeze: [none, backbone]", "batch_size: [8, 0]"),
        "arms.batch_size: has to be at least 1, found 0",
    ),
    "range out of bounds": (GOOD.replace("1e-2]", "20]"), "search.learning_rate: has to be at most 10"),
    "falling range": (GOOD.replace("[1e-4, 1e-2]", "[1e-2, 1e-4]"), "the range has to rise, found [0.01, 0.0001]"),
    "log range from zero": (GOOD.replace("[1e-4,", "[0,"), "a logarithmic range has to start above 0"),
    "range of three": (GOOD.replace("[1e-4, 1e-2]", "[1, 2, 3]"), "search.learning_rate.log_uniform"),
    "range of words": (
        GOOD.replace("[1e-4, 1e-2]", "[low, high]"),
        'search.learning_rate.log_uniform.0: has to be a number, found "low"',
    ),
    "unknown distribution": (
        GOOD.replace("log_uniform", "loguniform"),
        "search.learning_rate.loguniform: unknown key 'loguniform'; did you mean 'log_uniform'",
    ),
    "two distributions": (GOOD.replace("1e-2]}", "1e-2], uniform: [0, 1]}"), "give exactly one of"),
    "a number for a distribution": (
        GOOD.replace("{log_uniform: [1e-4, 1e-2]}", "0.1"),
        "search.learning_rate: has to be a mapping",
    ),
    "unknown tuned factor": (
        GOOD.replace("learning_rate", "learning_rte"),
        "search: unknown key 'learning_rte'; did you mean 'learning_rate'?",
    ),
    "what to do about trouble is no factor": (
        GOOD.replace("freeze: [none, backbone]", "retry_out_of_memory: [true, false]"),
        "unknown factor 'retry_out_of_memory'",
    ),
    "unknown sampler": (GOOD + "  sampler: tpee", "search.sampler: unknown sampler 'tpee'; did you mean 'tpe'?"),
    "unknown scheduler": (
        GOOD + "  scheduler: ahsa",
        "search.scheduler: unknown scheduler 'ahsa'; did you mean 'asha'?",
    ),
    "two schedulers": (
        GOOD + "  scheduler: {asha: {}, median: {}}",
        "search.scheduler: choose one scheduler, found asha and median",
    ),
    "grid over a range": (
        GOOD + "  sampler: grid",
        "search: sampler grid needs the values of learning_rate, found the range [0.0001, 0.01]; name them, "
        "as learning_rate: {choice: [0.0001, 0.01]}, or choose another sampler",
    ),
    "grid without end": (
        GOOD.replace("{log_uniform: [1e-4, 1e-2]}", "{choice: [1.0e-3]}\n  max_epochs: {integer: [1, 100001]}")
        + "  sampler: grid",
        "search: the grid has 100001 points; at most 100000 are allowed",
    ),
    "cmaes over one range": (
        GOOD + "  sampler: cmaes",
        "search: sampler cmaes needs at least two tuned ranges, found 1",
    ),
    "nsga2 with a pruner": (
        GOOD + "  sampler: nsga2\n  scheduler: hyperband",
        "search: sampler nsga2 weighs the metric against the cost of whole trials, so none can be stopped early by "
        "hyperband; add scheduler: none",
    ),
    "a budget in money without a price": (GOOD + "budget: {max_cost: 5}", "budget.max_cost needs a price"),
    "an unknown budget": (GOOD + "budget: {hours: 5}", "budget.hours: unknown key 'hours'"),
    "unknown scheduler key": (
        GOOD + "  scheduler: {asha: {grace: 1}}",
        "search.scheduler.asha.grace: unknown key 'grace'; known: grace_epochs",
    ),
    "no trials": (
        GOOD.replace("trials_per_arm: 2", "trials_per_arm: 0"),
        "search.trials_per_arm: has to be at least 1",
    ),
    "metric on the test split": (GOOD + "metric: {name: test/accuracy}", "the test split is read once"),
    "unknown metric": (GOOD + "metric: {name: val/acc}", "unknown metric 'val/acc'; did you mean 'val/accuracy'"),
    "loss maximized": (GOOD + "metric: {name: val/loss}", "val/loss needs mode: min"),
    "accuracy minimized": (GOOD + "metric: {mode: min}", "needs mode: max"),
    "unknown excluded factor": (GOOD + "exclude: [{init: random}]", "unknown compared factor 'init'"),
    "all excluded": (GOOD + "exclude: [{backbone: [s3d, r3d_18]}]", "nothing is left to compare"),
    "seeds as a list": (GOOD + "confirm: {seeds: [1, 2]}", "confirm.seeds: has to be a whole number"),
    "many GPUs": (GOOD + "resources: {gpu: 1000}", "resources.gpu: has to be 'auto' or at most 64"),
    "cpu as a word": (
        GOOD + "resources: {cpu: all}",
        "resources.cpu: has to be 'auto' or a whole number, found \"all\"",
    ),
    "snr zero": (GOOD.replace("small}", "small, simulate: {snr: 0}}"), "data.simulate.snr: has to be above 0"),
    "tilt the wrong way": (
        GOOD.replace("small}", "small, simulate: {tilt_range_degrees: [60, -60]}}"),
        "has to rise within -90 to 90",
    ),
    "no test tomogram": (GOOD.replace("small}", "small, simulate: {tomograms: [6, 2, 0]}}"), "at least one"),
    "volumes for too many tomograms": (
        GOOD.replace("small}", "small, simulate: {volumes_per_class: 5}}"),
        "has to be at least the number of tomograms",
    ),
    "key twice": (GOOD + "name: b", "name: the key stands twice (first on line 2)"),
    "tab": (GOOD + "\tx: 1", "a.yaml:10: not valid YAML"),
    "anchor": (GOOD + "model: &a {}", "anchors and aliases"),
    "seed too large": (GOOD + "seed: 99999999999", "seed: has to be below 2147483648"),
    "the same short name": (
        GOOD.replace("freeze: [none, backbone]", "augment: [[turns, shift], ['turns', 'shift']]"),
        "stands twice",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_study_file_is_refused_in_one_clear_line(study, case):
    text, words = BROKEN[case]
    with pytest.raises(SpecError) as caught:
        study(text)
    message = str(caught.value)
    assert words in message
    assert message.startswith("a.yaml")
    assert "\n" not in message


def test_there_are_at_least_forty_of_them():
    assert len(BROKEN) >= 40


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("confirm.seeds", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("confirm.sedes=3", "--set confirm.sedes: unknown key 'sedes'; did you mean 'seeds'?"),
        ("name.first=x", "name is not a section"),
        ("arms.init=[rndom]", "--set arms.init: unknown initialization 'rndom'; did you mean 'random'?"),
        ("confirm.seeds=[", "--set 'confirm.seeds=['"),
    ],
)
def test_a_wrong_override_is_named(study, override, words):
    with pytest.raises(SpecError) as caught:
        study(GOOD, override)
    assert words in str(caught.value)


def test_what_is_done_about_trouble_and_money_change_no_result(study):
    """Ledgers and checkpoints of versions without these keys have to stay valid."""
    plain = study()
    other = study(
        GOOD,
        "train.retry_out_of_memory=false",
        "data.on_damage=skip",
        "budget.trials=3",
        "resources.price_per_device_hour=2",
    )
    trials = [s.trial(s.list_arms()[0], {}, phase="search", number=0, seed=0) for s in (plain, other)]
    assert trials[0].config_hash("data") == trials[1].config_hash("data")
    assert "retry_out_of_memory" not in trials[0].parameters


def test_the_schedulers_of_the_first_version_are_stored_as_it_did(study):
    """The ledger compares what it has with what the study file says now."""
    stored = [study(GOOD, f"search.scheduler={name}").search.scheduler.model_dump() for name in ("asha", "none")]
    assert stored == [{"asha": {"grace_epochs": 3, "reduction_factor": 3}}, {"asha": None}]


def test_more_combinations_than_can_be_looked_at_are_refused_before_they_are_made(tmp_path):
    values = ", ".join(str(1 + i) for i in range(100))
    factors = ", ".join(f"{name}: [{values}]" for name in ("labels_per_class", "views", "batch_size", "max_epochs"))
    (tmp_path / "a.yaml").write_text(f"name: a\ndata: {{path: data}}\narms: {{{factors}}}\n")
    with pytest.raises(SpecError, match=r"a.yaml:3: arms: 100000000 combinations are more than a study can look at"):
        load_study(tmp_path / "a.yaml")


def test_arms_with_very_long_names_have_short_ones_of_their_own(tmp_path):
    long = ", ".join(f"'checkpoint:{'x' * 300}{end}.safetensors'" for end in "ab")
    (tmp_path / "a.yaml").write_text(f"name: a\ndata: {{path: data}}\narms: {{init: [random, {long}]}}\n")
    names = [arm.name for arm in load_study(tmp_path / "a.yaml").list_arms()]
    assert names[0] == "random"
    assert len({*names}) == 3
    assert max(map(len, names)) == LONGEST_ARM_NAME
