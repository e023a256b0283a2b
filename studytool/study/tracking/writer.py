"""The runs of one study in MLflow: study -> arms -> trials, by the tag `mlflow.parentRunId`.

Everything here is called by the outbox's thread and can be called again after it broke off half-way: runs are found
again by their tags, and a point that the store has is not sent again. So a study that is taken up any number of times
leaves each run and each point once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studytool.errors import StudytoolError
from studytool.files import write_json, write_text
from studytool.results import EpochResult, Outcome, TrialRecord
from studytool.spec import StudySpec
from studytool.study.tracking import logged

if TYPE_CHECKING:
    from studytool.report.compare import ArmSummary

RUNNING, INTERRUPTED = "RUNNING", "INTERRUPTED"
"""Values of the tag `studytool.outcome`, besides those of `Outcome`."""
_STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAILED": "FAILED", INTERRUPTED: "KILLED"}
_PARAMETERS_AT_ONCE = 100
_RUNS_AT_ONCE = 1000


@dataclass
class _Run:
    """What is known of a run in the store; `epochs` is None until the store has been asked."""

    run_id: str
    name: str
    outcome: str
    parameters: dict[str, str]
    epochs: set[int] | None


class Writer:
    """Writes by explicit run ids, with MLflow's client; `uid` is as for `Tracker`."""

    def __init__(self, client: Any, uri: str, experiment_id: str, spec: StudySpec, uid: str | None) -> None:
        self._client = client
        self._uri = uri
        self._experiment_id = experiment_id
        self._spec = spec
        self._study_tags = {"studytool.study": spec.name, **({} if uid is None else {"studytool.uid": uid})}
        self._classes: tuple[str, ...] = ()
        self._runs: dict[tuple[str, str], _Run] = {}
        self._trial_ids: dict[str, str] = {}
        self._in_doubt = True

    def open_study(
        self, yaml_text: str, environment: dict[str, str], manifest: Path, classes: tuple[str, ...], now: int
    ) -> str:
        """The study's run, RUNNING, with its artifacts; whatever else was RUNNING is INTERRUPTED."""
        self._classes = classes
        self._find_runs()
        self.stop_all(now)
        run = self._begin("study", self._spec.name, None, {}, {}, now)
        tags = {f"environment.{name}": value for name, value in environment.items()}
        if "code.commit" in environment:
            tags["mlflow.source.git.commit"] = environment["code.commit"]
        self._set_tags(run, tags)
        with tempfile.TemporaryDirectory(prefix="studytool-") as scratch:
            write_text(Path(scratch, "study.yaml"), yaml_text)
            write_json(Path(scratch, "environment.json"), environment)
            self._client.log_artifacts(run.run_id, scratch)
        self._client.log_artifact(run.run_id, str(manifest), "dataset")
        return run.run_id

    def open_trial(self, trial_id: str, values: Mapping[str, Any], config_hash: str, now: int) -> str:
        """The trial's run below its arm's, RUNNING, with its parameters."""
        arm = self._open_arm(values["arm"], now)
        tags = {"studytool.trial_id": trial_id, "studytool.config_hash": config_hash}
        tags |= {"studytool.arm": values["arm"], "studytool.phase": values["phase"]}
        return self._begin("trial", trial_id, arm, tags, values, now).run_id

    def run_id(self, trial_id: str) -> str | None:
        """The id of a trial's run, if it is known; may be asked by another thread."""
        run = self._runs.get(("trial", trial_id))
        return None if run is None else run.run_id

    def log_epochs(self, run_key: str, results: Sequence[EpochResult], now: int) -> None:
        """One batch of metrics for each epoch that the store does not have."""
        run = self._trial(run_key)
        if run.epochs is None:
            run.epochs = {metric.step for metric in self._client.get_metric_history(run.run_id, logged.EPOCH_KEY)}
        for result in results:
            known = run.epochs
            if result.epoch not in known:
                run.epochs = None  # if the call breaks off, the store has to be asked again
                self._log_metrics(run, logged.epoch_metrics(result), result.epoch, now)
                run.epochs = known | {result.epoch}

    def close_trial(self, run_key: str, record: TrialRecord, now: int) -> None:
        """Bring a trial's run to the state of its record and end it."""
        assert record.outcome is not None, "only a trial that has ended is closed"
        run = self._trial(run_key)
        self.log_epochs(run_key, record.epochs, now)
        have = self._client.get_run(run.run_id).data.metrics
        final = logged.final_metrics(record, self._spec.metric)
        self._log_metrics(run, {k: v for k, v in final.items() if k not in have}, len(record.epochs), now)
        if record.phase == "confirm" and record.test is not None:
            self._log_confusion(run, record)
        tags = {"studytool.attempts": str(record.attempts), "studytool.message": record.message}
        if record.parts is not None:
            tags["studytool.parts"] = str(record.parts)
        if record.device is not None:
            tags["studytool.device"] = f"{record.device.kind}: {record.device.name}"
            tags["studytool.trials_side_by_side"] = str(record.device.trials_side_by_side)
        self._set_tags(run, {name: text for name, text in tags.items() if text})
        self._finish(run, record.outcome, now)

    def log_file(self, run_key: str, path: Path) -> None:
        """Upload a file as an artifact of a trial's run."""
        self._client.log_artifact(self._trial(run_key).run_id, str(path))

    def log_checkpoint(self, run_key: str, folder: Path) -> None:
        """Upload `best.safetensors` and `best.json` as artifacts below `checkpoint`."""
        run = self._trial(run_key)
        for name in ("best.safetensors", "best.json"):
            if not (folder / name).is_file():
                raise StudytoolError(f"{folder / name} is not there to be uploaded")
            self._client.log_artifact(run.run_id, str(folder / name), "checkpoint")

    def catch_up(self, record: TrialRecord, now: int) -> None:
        """Bring a run to the state of its record, if it is not; one that has not ended stays INTERRUPTED."""
        run = self._runs.get(("trial", record.trial_id))
        if run is not None and run.outcome in (record.outcome, RUNNING):
            return
        if record.outcome is None and not record.epochs:
            return
        values = {**record.parameters, "seed": record.seed, "phase": record.phase, "arm": record.arm}
        self.open_trial(record.trial_id, values, record.config_hash, now)
        if record.outcome is not None:
            self.close_trial(record.trial_id, record, now)
        else:
            self.log_epochs(record.trial_id, record.epochs, now)
            self._finish(self._trial(record.trial_id), INTERRUPTED, now)

    def close_arm(self, summary: ArmSummary, now: int) -> None:
        """End an arm's run with its means; those that have changed since the last time get a further step.

        An arm with trials left to run ends as INTERRUPTED, one without a surviving trial as FAILED.
        """
        run = self._open_arm(summary.arm, now)
        data = self._client.get_run(run.run_id).data
        changed = {k: v for k, v in logged.arm_metrics(summary).items() if data.metrics.get(k) != v}
        if changed:
            edition = int(data.tags.get("studytool.edition", "0")) + 1
            self._set_tags(run, {"studytool.edition": str(edition)})
            self._log_metrics(run, changed, edition, now)
        best = logged.parameter_texts(summary.best_parameters)
        tags = {f"studytool.best.{name}": text for name, text in best.items()}
        self._set_tags(run, {"studytool.winner": str(summary.is_winner).lower(), **tags})
        survived = summary.counts[Outcome.COMPLETE] + summary.counts[Outcome.PRUNED]
        ended = Outcome.COMPLETE if survived else Outcome.FAILED
        self._finish(run, ended if summary.is_finished else INTERRUPTED, now)

    def close_study(self, text_table: str, outcome: str, now: int) -> None:
        """End the study's run, with the table as artifact and as the description that MLflow shows."""
        run = self._runs["study", self._spec.name]
        with tempfile.TemporaryDirectory(prefix="studytool-") as scratch:
            write_text(Path(scratch, "summary.txt"), text_table)
            self._client.log_artifacts(run.run_id, scratch)
        self._set_tags(run, {"mlflow.note.content": f"```\n{text_table[: logged.LONGEST_TAG - 10]}\n```"})
        self._finish(run, outcome, now)

    def log_report(self, files: Sequence[Path]) -> None:
        """Upload files as artifacts of the study's run below `report`."""
        run = self._runs["study", self._spec.name]
        for path in files:
            self._client.log_artifact(run.run_id, str(path), "report")

    def stop_all(self, now: int) -> None:
        """End every run that is RUNNING as INTERRUPTED."""
        for run in self._runs.values():
            if run.outcome == RUNNING:
                self._finish(run, INTERRUPTED, now)

    def _find_runs(self) -> None:
        """Take note of the study's runs in the store that are not known yet."""
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in self._study_tags.items())
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id], wanted, max_results=_RUNS_AT_ONCE, order_by=["start_time ASC"], page_token=token
            )
            for run in page:
                tags = run.data.tags
                name, outcome = tags["studytool.name"], tags["studytool.outcome"]
                known = _Run(run.info.run_id, name, outcome, dict(run.data.params), None)
                self._note(tags["studytool.kind"], known)
            token = page.token
            if not token:
                break
        self._in_doubt = False

    def _note(self, kind: str, run: _Run) -> None:
        if (kind, run.name) not in self._runs:
            self._runs[kind, run.name] = run
            self._trial_ids[run.run_id] = run.name

    def _open_arm(self, arm: str, now: int) -> _Run:
        values = next((a.values for a in self._spec.list_arms() if a.name == arm), {})
        study = self._runs["study", self._spec.name]
        return self._begin("arm", arm, study, {"studytool.arm": arm}, {**values, "arm": arm}, now)

    def _begin(
        self, kind: str, name: str, parent: _Run | None, tags: Mapping[str, str], values: Mapping[str, Any], now: int
    ) -> _Run:
        """The run of this kind and name, RUNNING: the one in the store or a new one."""
        if self._in_doubt:  # a call broke off: the store may hold a run whose id never came back
            self._find_runs()
        if (kind, name) not in self._runs:
            above = {} if parent is None else {"mlflow.parentRunId": parent.run_id}
            own = {**self._study_tags, "studytool.kind": kind, "studytool.name": name, "studytool.outcome": RUNNING}
            all_tags = {"mlflow.source.name": "studytool", "mlflow.source.type": "LOCAL", **above, **own, **tags}
            self._in_doubt = True
            created = self._client.create_run(
                self._experiment_id, start_time=now, tags=all_tags, run_name=_shown_name(kind, name, parent)
            )
            self._in_doubt = False
            self._note(kind, _Run(created.info.run_id, name, RUNNING, {}, set()))
        run = self._runs[kind, name]
        self._set_parameters(run, logged.parameter_texts(values))
        if run.outcome != RUNNING:
            self._client.update_run(run.run_id, status=RUNNING)
            self._set_tags(run, {"studytool.outcome": RUNNING})
            run.outcome = RUNNING
        return run

    def _finish(self, run: _Run, outcome: str, now: int) -> None:
        self._client.set_terminated(run.run_id, status=_STATUS[outcome], end_time=now)
        self._set_tags(run, {"studytool.outcome": outcome})
        run.outcome = outcome

    def _trial(self, run_key: str) -> _Run:
        name = self._trial_ids.get(run_key, run_key)
        if ("trial", name) not in self._runs:
            raise StudytoolError(f"{run_key} has no run in MLflow")
        return self._runs["trial", name]

    def _set_parameters(self, run: _Run, texts: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        for name, text in texts.items():
            if name in run.parameters and run.parameters[name] != text:
                raise StudytoolError(
                    f"MLflow at {self._uri} has {run.name} with {name} = {run.parameters[name]}, now it is {text}; "
                    "give the study another name (--set name=…), or delete that run in MLflow"
                )
        new = [name for name in texts if name not in run.parameters]
        for first in range(0, len(new), _PARAMETERS_AT_ONCE):
            names = new[first : first + _PARAMETERS_AT_ONCE]
            self._client.log_batch(run.run_id, params=[Param(name, texts[name]) for name in names])
            run.parameters.update({name: texts[name] for name in names})

    def _log_metrics(self, run: _Run, values: Mapping[str, float], step: int, now: int) -> None:
        from mlflow.entities import Metric

        if values:
            self._client.log_batch(run.run_id, metrics=[Metric(k, v, now, step) for k, v in values.items()])

    def _set_tags(self, run: _Run, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        texts = {name: str(text)[: logged.LONGEST_TAG] for name, text in tags.items()}
        self._client.log_batch(run.run_id, tags=[RunTag(name, text) for name, text in texts.items()])

    def _log_confusion(self, run: _Run, record: TrialRecord) -> None:
        from studytool.report.plots import confusion_picture

        assert record.test is not None
        with tempfile.TemporaryDirectory(prefix="studytool-") as scratch:
            stem = Path(scratch, "confusion")
            confusion_picture(record.test.confusion, self._classes, stem, title=record.trial_id, endings=["png"])
            self._client.log_artifacts(run.run_id, scratch)


def _shown_name(kind: str, name: str, parent: _Run | None) -> str:
    """`search-003 r2plus1d_18.random.none` for a trial, which stands below its arm: MLflow's columns are narrow."""
    if kind != "trial" or parent is None:
        return name
    return f"{name.removeprefix(f'{parent.name}.')} {parent.name}"
