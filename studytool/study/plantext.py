"""A plan as a person reads it."""

from __future__ import annotations

from studytool.study.plan import ArmPlan, Plan
from studytool.study.progress import duration


def plan_lines(plan: Plan) -> list[str]:
    """The plan in full: a line for every arm, then what all of it takes and what is missing."""
    spec = plan.spec
    width = max(len("arm"), *(len(arm.name) for arm in plan.arms))
    heading = f"{'arm':<{width}}  {'search':>9}  {'confirm':>9}  {'s/epoch':>8}  {'GiB':>6}  {'device-h':>8}"
    lines = [f"study {spec.name}: {_count(len(plan.arms), 'arm')}; trials left / planned:", heading]
    lines += [_arm_line(arm, width, plan.slots.side_by_side) for arm in plan.arms]
    return [*lines, *total_lines(plan), *(f"note: {note}" for note in plan.notes), *missing_lines(plan)]


def total_lines(plan: Plan) -> list[str]:
    """What the rest of the study takes: trials, device-hours, wall time, disk, money, budget."""
    spec, arms = plan.spec, plan.arms
    search, confirm = sum(arm.search for arm in arms), sum(arm.confirm for arm in arms)
    lines = [f"to run: {_count(search, 'search trial')} and {_count(confirm, 'confirm trial')}{_grid_words(plan)}"]
    hours, most_hours = plan.device_hours(), plan.device_hours(stopped_early=False)
    if hours is None or most_hours is None:
        lines.append(
            "time: not known; `studytool plan` measures it" + ("" if plan.data_bytes else " if the data is here")
        )
    else:
        kind = spec.search.scheduler.kind
        stopped = kind != "none" and search
        share = sum(a.search * a.search_epochs for a in arms) / max(1, sum(a.search * a.most_epochs for a in arms))
        early = f" if {kind} leaves {share:.0%} of the search's epochs to run, {most_hours:.3g} if it stops no trial"
        early *= bool(stopped)
        lines.append(f"device-hours: {hours:.3g}{early}")
        at_once = _count(plan.slots.count, "trial") + " at once"
        lines.append(f"wall time: about {duration(plan.wall_seconds or 0.0)}, {at_once}, without starting and stopping")
        price = spec.resources.price_per_device_hour
        if price is not None:
            currency = spec.resources.currency
            lines.append(f"cost: {hours * price:.2f} {currency} at {price:g} {currency} per device-hour")
    if plan.kept_bytes:
        lines.append(
            f"disk: {_size(plan.kept_bytes)} of checkpoints stay, {_size(plan.passing_bytes)} more at most meanwhile"
        )
    if plan.data_bytes:
        lines.append(f"disk: {_size(plan.data_bytes)} for {spec.data.path}, which is simulated first")
    if plan.spent_device_seconds:
        lines.append(f"spent so far: {plan.spent_device_seconds / 3600:.3g} device-hours")
    return [*lines, *_budget_lines(plan)]


def missing_lines(plan: Plan) -> list[str]:
    """What would stop the study before its first trial."""
    return [f"missing: {problem}" for problem in plan.problems]


def _arm_line(arm: ArmPlan, width: int, side_by_side: int) -> str:
    seconds = arm.seconds()
    epoch = "–" if arm.epoch_seconds is None else f"{arm.epoch_seconds:.3g}"
    memory = "–" if arm.peak_memory_gib is None else f"{arm.peak_memory_gib:.2f}"
    hours = "–" if seconds is None else f"{seconds / side_by_side / 3600:.3g}"
    counts = [f"{arm.search}/{arm.search_planned}", f"{arm.confirm}/{arm.confirm_planned}"]
    source = "  from its trials" if arm.source == "trials" else ""
    return f"{arm.name:<{width}}  {counts[0]:>9}  {counts[1]:>9}  {epoch:>8}  {memory:>6}  {hours:>8}{source}"


def _grid_words(plan: Plan) -> str:
    search = plan.spec.search
    if not search.space or search.points is None:
        return ""
    if search.points < search.trials_per_arm:
        return f"; there are only {search.points} configurations for an arm's {search.trials_per_arm} trials"
    if search.sampler == "grid" and search.points > search.trials_per_arm:
        return f"; the grid has {search.points} points, of which trials_per_arm takes {search.trials_per_arm}"
    return ""


def _budget_lines(plan: Plan) -> list[str]:
    budget, resources = plan.spec.budget, plan.spec.resources
    hours = plan.device_hours()
    in_all = None if hours is None else hours + plan.spent_device_seconds / 3600
    allowed = [] if budget.device_hours is None else [budget.device_hours]
    if budget.max_cost is not None and resources.price_per_device_hour is not None:
        allowed.append(budget.max_cost / resources.price_per_device_hour)
    lines = []
    if allowed:
        enough = (
            "" if in_all is None else ", enough" if in_all <= min(allowed) else f", not enough: {in_all:.3g} are needed"
        )
        lines.append(f"budget: {min(allowed):.3g} device-hours in all{enough}")
    if budget.trials is not None:
        lines.append(f"budget: {_count(budget.trials, 'trial')} in all")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
