"""Measuring what `auto` should mean on this machine: are larger batches, and compiled networks, faster here?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from studytool.spec import Arm, StudySpec, TrialSpec
from studytool.study.choices import Choices, open_choices
from studytool.study.measure import STEPS_COMPILED, Measurement
from studytool.study.plan import Meter, expected_epochs, extreme_trials, meter_of
from studytool.study.records import read_choices

LEAST_GAIN = 0.05
"""The share of the time that a choice has to save by its measurement, which is no more exact than that."""
LEAST_STEPS = 16
"""Updates that an epoch keeps, however large the device."""
MEMORY_SHARE = 0.8
"""What the foreseen peak may take of a trial's share of the memory: the rest is for what was not foreseen."""
CONTEXT_GIB = 0.6
"""What a process takes of a GPU besides what torch allocates: CUDA's context and libraries, about half a GiB."""
SECONDS_EACH = 180.0
"""How long one kind of trial is measured at most; a network is compiled in it."""
SECONDS_IN_ALL = 600.0
"""How long is measured at most for the choices of a study."""


def choose(
    spec: StudySpec, *, seconds_in_all: float = SECONDS_IN_ALL, on_measuring: Callable[[str], None] = lambda _line: None
) -> tuple[Choices, tuple[str, ...]]:
    """What `auto` means in a study, and a line for each choice that says why.

    It is what an earlier run chose, if there was one. Otherwise it is measured, within `seconds_in_all`; what cannot be
    measured is not done.

    Raises:
        StudytoolError: the study cannot run here at all.
    """
    kept, wanted = read_choices(spec.folder), open_choices(spec)
    if kept is not None or not wanted:
        return kept or Choices(), ()
    meter = meter_of(spec, seconds_in_all, on_measuring, seconds_each=SECONDS_EACH)
    choices, lines = Choices(), []
    if "batch_factor" in wanted:
        factor, line = _batch_factor(spec, meter)
        choices = replace(choices, batch_factor=factor)
        lines.append(line)
    if "compile" in wanted:
        compiled, line = _compiled(spec, meter, choices)
        choices = replace(choices, compile="on" if compiled else "off")
        lines.append(line)
    return choices, (*meter.notes, *lines)


def share_gpu(spec: StudySpec, choices: Choices, meter: Meter) -> tuple[StudySpec, str]:
    """The study with a number for `trials_per_gpu: auto`, and why it is this one. No result depends on it.

    Whether trials gain by sharing a GPU is not measured; volumes per second and the share of the peak tell afterwards.
    """
    trials = [choices.applied(trial) for arm in spec.list_arms() for trial in extreme_trials(spec, arm)]
    if not meter.slots.gpu:
        number, why = 1, "there is no GPU here"
    elif None in (found := [meter.measurement(trial) for trial in trials]):
        number, why = 1, "not every arm could be measured"
    else:
        peak_gib = max(m.peak_memory_gib for m in found if m is not None)
        number = trials_that_fit(peak_gib, gpu_gib=meter.memory_gib, cores=meter.slots.cpu)
        why = f"a trial takes up to {peak_gib:.1f} GiB of {meter.memory_gib:.1f}, and a core"
    resources = spec.resources.model_copy(update={"trials_per_gpu": number})
    return spec.model_copy(update={"resources": resources}), f"trials_per_gpu: {number}, as {why}"


def trials_that_fit(peak_gib: float, *, gpu_gib: float, cores: int) -> int:
    """How many trials of such a peak share a GPU that has so many cores beside it; one at least, a core for each."""
    return max(1, min(int(MEMORY_SHARE * gpu_gib / (peak_gib + CONTEXT_GIB)), cores))


def _batch_factor(spec: StudySpec, meter: Meter) -> tuple[int, str]:
    once, twice, volumes, sizes = [], [], [], []
    for trial in (t for _arm, t in _affected(spec, "batch_factor")):
        count = meter.volumes(trial)
        if count is None:
            return 1, "batch_factor: 1, as the data is not here to measure with"
        if count < 2 * LEAST_STEPS * trial.train.batch_size:
            return 1, f"batch_factor: 1, as larger batches would leave fewer than {LEAST_STEPS} steps an epoch"
        volumes.append(count)
        sizes.append(trial.train.batch_size)
        once.append(meter.measurement(Choices().applied(trial)))
        twice.append(meter.measurement(Choices(batch_factor=2).applied(trial)))
    known = [(a, b) for a, b in zip(once, twice, strict=True) if a is not None and b is not None]
    if len(known) < len(once):
        return 1, "batch_factor: 1, as not every arm could be measured"
    return largest_factor(known, sizes, volumes, memory_gib=meter.memory_gib)


def largest_factor(
    measured: Sequence[tuple[Measurement, Measurement]],
    batch_sizes: Sequence[int],
    volumes: Sequence[int],
    *,
    memory_gib: float,
) -> tuple[int, str]:
    """The largest power of two that batches may grow by, and why: for each kind of trial it was measured once and twice
    its batch size, it has so many training volumes, and `memory_gib` are there for it.

    Peak memory is taken to grow by as much with every further batch as with the second one.
    """
    gain = sum(a.seconds_per_step for a, _ in measured) * 2 / sum(b.seconds_per_step for _, b in measured) - 1
    if gain < LEAST_GAIN:
        return 1, f"batch_factor: 1, as batches twice as large train {gain:+.0%} volumes in the same time here"

    def fits(factor: int) -> bool:
        enough_steps = all(n >= LEAST_STEPS * size * factor for n, size in zip(volumes, batch_sizes, strict=True))
        peaks = (a.peak_memory_gib + (factor - 1) * (b.peak_memory_gib - a.peak_memory_gib) for a, b in measured)
        return enough_steps and max(peaks) <= MEMORY_SHARE * memory_gib

    factor = 1
    while fits(2 * factor):
        factor *= 2
    return factor, (
        f"batch_factor: {factor}: twice the batch trains {gain:+.0%} volumes in the same time; {memory_gib:.1f} GiB "
        f"for a trial and {LEAST_STEPS} steps an epoch allow no more"
    )


def _compiled(spec: StudySpec, meter: Meter, choices: Choices) -> tuple[bool, str]:
    saved = in_all = 0.0
    for arm, trial in _affected(spec, "compile"):
        off = meter.measurement(replace(choices, compile="off").applied(trial))
        on = off and meter.measurement(replace(choices, compile="on").applied(trial))
        volumes = meter.volumes(trial)
        if off is None or on is None or volumes is None:
            return False, f"compile: off, as arm {arm.name} could not be measured"
        batch_size = choices.applied(trial).train.batch_size
        most = spec.most_epochs(arm)
        trials = [expected_epochs(spec.search.scheduler, most)] * spec.search.trials_planned
        for epochs in [*trials, *[float(most)] * spec.confirm.seeds]:
            seconds, gained = seconds_saved(off, on, epochs=epochs, volumes=volumes, batch_size=batch_size)
            in_all += seconds
            saved += gained
    share = saved / in_all if in_all else 0.0
    word = "on" if share >= LEAST_GAIN else "off"
    times = f"{1 - share:.2g} times as long" if in_all else "as long"
    return word == "on", f"compile: {word}: compiled, the trials would take {times}, compiling included"


def seconds_saved(
    off: Measurement, on: Measurement, *, epochs: float, volumes: int, batch_size: int
) -> tuple[float, float]:
    """Seconds that a trial trains uncompiled, and how many fewer it does compiled, what compiling takes included.

    One step of an epoch runs uncompiled, to count its operations; a smaller last batch is compiled for itself.
    """
    steps = -(-volumes // batch_size)
    plain = off.seconds_per_step
    compiled = (STEPS_COMPILED * on.seconds_per_step - plain) / (STEPS_COMPILED - 1)
    compiling = max(0.0, on.first_epoch_seconds - off.first_epoch_seconds) * (1 + bool(volumes % batch_size))
    return epochs * steps * plain, epochs * (steps - 1) * (plain - compiled) - compiling


def _affected(spec: StudySpec, factor: str) -> list[tuple[Arm, TrialSpec]]:
    """Trials at the ends of every arm's ranges for which `factor` is left to be chosen."""
    trials = [(arm, trial) for arm in spec.list_arms() for trial in extreme_trials(spec, arm)]
    return [(arm, trial) for arm, trial in trials if getattr(trial.train, factor) == "auto"]
