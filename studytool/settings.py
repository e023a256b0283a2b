"""The sections of a study file: every key, its type, its range and its default. Every default stands here.

(The section `search:` is in `studytool.search_settings`.)

A *factor* is a field of `ModelSettings`, `InputSettings` or `TrainSettings`: the study file sets it for all trials in
its section, compares values of it under `arms:`, or tunes it under `search:`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from studytool import registry
from studytool.errors import unknown_name
from studytool.models.backbones import BACKBONES, CHECKPOINT
from studytool.results import METRICS


def named(kind: str, table: Mapping[str, str]) -> AfterValidator:
    """A validator for names that have to be in a table of the registry."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(unknown_name(kind, name, table))
        return name

    return AfterValidator(check)


class Settings(BaseModel):
    """What all sections share: values cannot change, unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Dtype = Literal["float16", "float32", "uint8"]
"""How voxels are stored; see `studytool.data.voxels`."""
Compression = Literal["none", "zstd"]


class SimulateSettings(Settings):
    """How to simulate a dataset; see `studytool.data.simulate` for what each step does.

    `snr` is var(signal after CTF and wedge) / var(noise), or "infinite" for no noise. `shift_fraction` is of the box.
    `tilt_range_degrees` and `tilt_step_degrees` give the missing wedge. `tomograms` gives (train, val, test) counts.
    `neighbours` is the largest number of other particles around one. `templates` is a folder of MRC maps, one class
    each, instead of the phantoms. `b_factor_square_angstrom` dampens high frequencies by exp(-B k^2 / 4).
    """

    classes: int | tuple[str, ...] = 10
    volumes_per_class: Annotated[int, Field(ge=3, le=1_000_000)] = 500
    side: Annotated[int, Field(ge=8, le=256)] = 32
    voxel_size_angstrom: Annotated[float, Field(gt=0, le=100)] = 10.0
    snr: Annotated[float, Field(gt=0)] | Literal["infinite"] = 0.1
    tilt_range_degrees: tuple[float, float] = (-60.0, 60.0)
    tilt_step_degrees: Annotated[float, Field(gt=0, le=30)] = 3.0
    shift_fraction: Annotated[float, Field(ge=0, le=0.3)] = 0.1
    neighbours: Annotated[int, Field(ge=0, le=4)] = 0
    ctf: bool = True
    defocus_range_um: tuple[float, float] = (2.0, 6.0)
    voltage_kv: Annotated[float, Field(ge=50, le=1000)] = 300.0
    spherical_aberration_mm: Annotated[float, Field(ge=0, le=10)] = 2.7
    amplitude_contrast: Annotated[float, Field(ge=0, le=1)] = 0.07
    b_factor_square_angstrom: Annotated[float, Field(ge=0, le=100_000)] = 1000.0
    tomograms: tuple[int, int, int] = (6, 2, 2)
    templates: str | None = None
    dtype: Dtype = "float16"
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _possible(self) -> SimulateSettings:
        low, high = self.tilt_range_degrees
        if not -90 <= low < high <= 90:
            raise ValueError(f"tilt_range_degrees has to rise within -90 to 90, found [{low}, {high}]")
        if not 0 < self.defocus_range_um[0] <= self.defocus_range_um[1]:
            raise ValueError(f"defocus_range_um has to rise from above 0, found {list(self.defocus_range_um)}")
        if min(self.tomograms) < 1:
            raise ValueError(f"tomograms has to give each split at least one, found {list(self.tomograms)}")
        if self.volumes_per_class < sum(self.tomograms):
            raise ValueError(
                f"volumes_per_class ({self.volumes_per_class}) has to be at least the number of tomograms "
                f"({sum(self.tomograms)}), so that every split holds every class"
            )
        return self


def _axes_order(order: str) -> str:
    found, _, wanted = order.partition("->")
    if sorted(found) != ["x", "y", "z"] or sorted(wanted) != ["x", "y", "z"]:
        raise ValueError(f"it names x, y, z in two orders, as 'xyz->zyx'; found {order!r}")
    return order


class ImportSettings(Settings):
    """What becomes of the volumes of a source as they are imported; see `studytool.data.conform` for each step.

    `voxel_size_angstrom` is that of the source where its files do not tell, or not the truth. `rescale_to_angstrom` is
    the dataset's, `box` its side in voxels after that. `transpose` names the source's axes and the order z, y, x wants
    them in, such as "xyz->zyx". "standard" gives every volume mean 0 and deviation 1, which float16 holds well.
    `include` and `exclude` name classes; those with fewer than `min_per_class` volumes are left out.
    """

    voxel_size_angstrom: Annotated[float, Field(gt=0, le=1_000_000_000)] | None = None
    box: Annotated[int, Field(ge=2, le=1024)] | None = None
    rescale_to_angstrom: Annotated[float, Field(gt=0, le=1_000_000_000)] | None = None
    invert: bool = False
    transpose: Annotated[str, AfterValidator(_axes_order)] | None = None
    normalize: Literal["none", "standard"] = "standard"
    dtype: Dtype = "float16"
    compression: Compression = "none"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_per_class: Annotated[int, Field(ge=1)] = 1
    volumes_per_shard: Annotated[int, Field(ge=1, le=1_000_000)] = 4096

    @model_validator(mode="after")
    def _possible(self) -> ImportSettings:
        both = sorted({*self.include} & {*self.exclude})
        if both:
            raise ValueError(f"include and exclude both name {both[0]!r}")
        return self


class DataSettings(Settings):
    """The dataset: a folder of shards, which of its splits, and, where it can be made, how to simulate it.

    `split` is "stored", the one that came with the data, or one that `studytool data split` made: NAME, or NAME/FOLD.
    `on_damage` says what happens when a shard turns out to be damaged: "stop" ends the study with the shard's name,
    "skip" goes on without the shard and says so. Which shards these are is found out once, before the first trial, and
    kept as `leave_out` in the study's folder: shards that no trial reads, on whichever machine.
    """

    path: Annotated[str, Field(min_length=1)]
    split: Annotated[str, Field(min_length=1)] = "stored"
    on_damage: Literal["stop", "skip"] = "stop"
    leave_out: tuple[str, ...] = ()
    simulate: SimulateSettings | None = None


def _backbone_name(name: str) -> str:
    if name not in BACKBONES and ":" not in name:
        raise ValueError(unknown_name("backbone", name, BACKBONES))
    return name


def _initialization_name(name: str) -> str:
    if name not in registry.INITIALIZATIONS and not name.startswith(CHECKPOINT):
        raise ValueError(unknown_name("initialization", name, [*registry.INITIALIZATIONS, f"{CHECKPOINT}PATH"]))
    if name == CHECKPOINT:
        raise ValueError("checkpoint: needs a path after the colon, such as 'checkpoint:studies/a/best.safetensors'")
    return name


class ModelSettings(Settings):
    """The network: which one, what it starts from, what of it is trained, and how a volume enters it.

    `input_size` resizes the volume: "keep" not at all, "native" to the clip the backbone was made for, a number to
    that side. `time_axis` is the axis of the volume that plays time. `stem` says how the weights of three input
    channels become those of one. `frozen_batchnorm` is the mode of the frozen part's batch normalization.
    `gradual_epochs` and `layer_decay` are the numbers of the freezings of these names.
    """

    backbone: Annotated[str, AfterValidator(_backbone_name)] = "r2plus1d_18"
    init: Annotated[str, AfterValidator(_initialization_name)] = "random"
    freeze: str = "none"
    frozen_batchnorm: Literal["eval", "train"] = "eval"
    stem: Literal["sum", "mean", "repeat"] = "sum"
    stem_stride: Literal["keep", "remove"] = "keep"
    time_axis: Literal["z", "y", "x"] = "z"
    input_size: Literal["keep", "native"] | Annotated[int, Field(ge=8, le=256)] = "keep"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradual_epochs: Annotated[int, Field(ge=1, le=100_000)] = 2
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75


class InputSettings(Settings):
    """Which labelled volumes a trial learns from, and what happens to a volume before the network sees it.

    `labels_per_class` or `label_fraction` limits the training split to a draw by the trial's seed (see
    `studytool.data.labels`). A volume is filtered, then normalized, then, in training only, augmented. `low_pass`
    dampens what is finer than `low_pass_angstrom`; `dog`, the difference of Gaussians, also what is coarser than
    `high_pass_angstrom`. At these resolutions half of the amplitude passes. With `views: N` a volume has N augmented
    views, the same in every trial, and epoch e sees view e modulo N, so that what a frozen part of a network makes of
    them can be kept; without, every epoch draws anew.
    """

    labels_per_class: Annotated[int, Field(ge=1)] | None = None
    label_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    filter: Annotated[str, named("filter", registry.FILTERS)] = "none"
    low_pass_angstrom: Annotated[float, Field(gt=0, le=10_000)] = 30.0
    high_pass_angstrom: Annotated[float, Field(gt=0, le=10_000)] = 150.0
    normalize: Annotated[str, named("normalization", registry.NORMALIZATIONS)] = "standard"
    augment: tuple[Annotated[str, named("augmentation", registry.AUGMENTATIONS)], ...] = ("turns", "shift")
    views: Annotated[int, Field(ge=1, le=1000)] | None = None

    @model_validator(mode="after")
    def _agreeing(self) -> InputSettings:
        if self.labels_per_class is not None and self.label_fraction < 1:
            raise ValueError(
                f"labels_per_class ({self.labels_per_class}) and label_fraction ({self.label_fraction:g}) both limit "
                "the training volumes; give one of them"
            )
        if self.filter == "dog" and self.low_pass_angstrom >= self.high_pass_angstrom:
            raise ValueError(
                f"filter dog keeps what is between the two: low_pass_angstrom ({self.low_pass_angstrom:g}) has to be "
                f"below high_pass_angstrom ({self.high_pass_angstrom:g})"
            )
        return self


class TrainSettings(Settings):
    """How a network is trained. `warmup_epochs` may be a fraction; `gradient_clip` bounds the gradient's norm.

    `momentum` (Nesterov's) is that of `sgd`; the others have their usual decay rates. "balanced" `class_weights` make
    every class count the same in the loss. `ema` is the decay of the average of the weights that is evaluated and kept
    instead of the weights themselves. `accumulate` is the number of parts that a batch is computed in when memory is
    short; `batch_size` stays that of the whole, though batch normalization sees the parts. `compile` has
    `torch.compile` make faster kernels for training: it needs a compiler, and time at first; "auto" measures before the
    study whether its trials get faster by it; "graphs" also replays them as CUDA graphs, which helps small volumes,
    where nothing stands against it (see `studytool.training.device`). Batches are `batch_factor` times as large as
    `batch_size`, with the learning rate that follows from the one set or tuned (times the factor for sgd, its square
    root for adam and adamw); "auto" is the largest power of two that is faster and fits into memory. What "auto" means
    is chosen once for a study and kept; a single `studytool train` takes "off" and 1. "auto" precision is bfloat16
    where a GPU computes it, else float32; "auto" channels_last is on for convolutions on a GPU, and "auto"
    optimizers are fused (one kernel updates all tensors) where torch has one. `trim_kernels`: with "auto" convolutions
    leave out what of them meets nothing but padding (see `studytool.models.trim`).
    `retry_out_of_memory`: a trial that runs out of memory is tried once more with four times as many parts of a batch.
    `reuse_memory`: with "auto", a process that trains on a CPU keeps what a step frees for the next one.
    `checkpoints`: with "auto" the state of a trial is written when that takes at most a twentieth of the time since it
    last was; with "each_epoch", and for heads that are trained together, after every epoch, so that a trial that is
    killed loses one at most.
    """

    max_epochs: Annotated[int, Field(ge=1, le=100_000)] = 30
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    batch_factor: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = 1
    accumulate: Annotated[int, Field(ge=1, le=65_536)] = 1
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    optimizer: Annotated[str, named("optimizer", registry.OPTIMIZERS)] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Annotated[str, named("schedule", registry.SCHEDULES)] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    gradient_clip: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    channels_last: Literal["auto", "on", "off"] = "auto"
    fused: Literal["auto", "off"] = "auto"
    trim_kernels: Literal["auto", "off"] = "auto"
    compile: Literal["off", "on", "graphs", "auto"] = "off"
    retry_out_of_memory: bool = True
    reuse_memory: Literal["auto", "off"] = "auto"
    checkpoints: Literal["auto", "each_epoch"] = "auto"

    @model_validator(mode="after")
    def _possible(self) -> TrainSettings:
        if self.warmup_epochs >= self.max_epochs:
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs:g}) has to be below max_epochs ({self.max_epochs}); "
                "it may be a fraction"
            )
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate ({self.accumulate}) has to be at most batch_size ({self.batch_size})")
        return self

    @property
    def is_compiled(self) -> bool:
        """Whether training runs through `torch.compile`."""
        return self.compile in ("on", "graphs")

    @property
    def volumes_at_once(self) -> int:
        """The most volumes that pass through the network together, in training and evaluation: a part of a batch."""
        return -(-self.batch_size // self.accumulate)


SECTIONS: Mapping[str, type[Settings]] = {"model": ModelSettings, "input": InputSettings, "train": TrainSettings}
HANDLING = frozenset({"retry_out_of_memory", "reuse_memory", "checkpoints"})
"""Keys of these sections that say how memory and files are dealt with: no factors, and no result depends on them."""
FACTORS: Mapping[str, str] = {
    name: section for section, kind in SECTIONS.items() for name in kind.model_fields if name not in HANDLING
}


class MetricSettings(Settings):
    """What is optimized, always on the validation split, and the value whose cost is asked for."""

    name: str = "val/balanced_accuracy"
    mode: Literal["max", "min"] = "max"
    target: float | None = None
    select: Literal["best", "last"] = "best"

    @model_validator(mode="after")
    def _known(self) -> MetricSettings:
        names = [f"val/{metric}" for metric in METRICS]
        if self.name.startswith("test/"):
            raise ValueError(f"{self.name} cannot choose anything: the test split is read once, at the end; use val/…")
        if self.name not in names:
            raise ValueError(unknown_name("metric", self.name, names))
        if (self.name == "val/loss") != (self.mode == "min"):
            right = "min" if self.name == "val/loss" else "max"
            raise ValueError(f"{self.name} needs mode: {right}")
        return self

    @property
    def sign(self) -> int:
        """+1 where larger is better, -1 where smaller is."""
        return 1 if self.mode == "max" else -1


class ConfirmSettings(Settings):
    """The confirm phase: how many paired seeds every arm's best configuration is trained with."""

    seeds: Annotated[int, Field(ge=0, le=1000)] = 5


MOST_TOGETHER = 8
"""How many heads "auto" trains together."""


class ResourceSettings(Settings):
    """What one trial holds and how many run at once; "auto": one GPU a trial where there are any, else one core.

    So many `trials_per_gpu` share a GPU where `gpu` is "auto"; "auto" are as many as fit into its memory by their
    measured peak. Seconds of trials that share a device are not fit for cost claims: the report marks
    them as indicative, and makes none.

    Trials of an arm that train nothing but a head are trained together in the place of one, up to `trials_together`;
    1 trains each alone. "auto" (up to 8) leaves what is proposed as it is: it takes those together that the sampler
    proposes without looking at results (all of `random` and `grid`, the first ones of `tpe`, the seeds that confirm).
    A number has `tpe` propose that many at once throughout.

    A worker process is kept for one trial after another; with `keep_workers: false` each trial has one of its own, and
    pays for its start.

    `price_per_device_hour`, in `currency`, turns device-hours into money.
    """

    gpu: Literal["auto"] | Annotated[float, Field(ge=0, le=64)] = "auto"
    cpu: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    trials_per_gpu: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = 1
    trials_at_once: Literal["auto"] | Annotated[int, Field(ge=1, le=10_000)] = "auto"
    trials_together: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    keep_workers: bool = True
    price_per_device_hour: Annotated[float, Field(gt=0)] | None = None
    currency: Annotated[str, Field(min_length=1, max_length=8)] = "USD"

    @model_validator(mode="after")
    def _agreeing(self) -> ResourceSettings:
        if self.gpu != "auto" and self.trials_per_gpu != 1:
            raise ValueError(
                f"gpu ({self.gpu:g}) and trials_per_gpu ({self.trials_per_gpu}) both share out GPUs; give one of them"
            )
        return self


class BudgetSettings(Settings):
    """What the study may use, all its runs together; it is stopped before it uses more and can be taken up with more.

    `trials` counts trials that were begun, `device_hours` the cost of all of them, `max_cost` the same as money.
    """

    trials: Annotated[int, Field(ge=1)] | None = None
    device_hours: Annotated[float, Field(gt=0)] | None = None
    max_cost: Annotated[float, Field(gt=0)] | None = None


class TrackingSettings(Settings):
    """Where MLflow keeps its runs; a relative SQLite path counts from the folder `studytool` is started in."""

    uri: Annotated[str, Field(min_length=1)] = "sqlite:///mlflow.db"
