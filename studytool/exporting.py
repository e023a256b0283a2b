"""A trained network for other programs: one file that takes raw volumes and gives probabilities, checked before use.

The preprocessing is part of it: contrast, normalization and filter as in training, and the temperature of the
probabilities. What it needs to know about a volume (box, voxel size, classes in their order) stands in a JSON file
beside it and, where the format has a place for it, in the file itself.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from studytool.data.preprocess import network_input, standard
from studytool.data.voxels import widened
from studytool.errors import DataError, StudytoolError, unknown_name
from studytool.files import sha256_of, whole_file, write_json
from studytool.models.adapt import StagedModel
from studytool.predict import Predictor, rows_of
from studytool.settings import InputSettings
from studytool.training.calibration import with_temperature

TOLERANCE = 1e-4
"""How far a probability from the exported file may be from the one of `studytool predict`."""
_CHECKED = 8  # volumes
_FEWEST = 3  # repeated if need be: torch.export takes a size of 1 for one that never changes
_INPUT, _OUTPUT = "volumes", "probabilities"
Run = Callable[[NDArray[np.float32]], NDArray[np.float64]]


class Deployed(nn.Module):
    """Raw volumes [B, 1, D, H, W] of the training's box and voxel size -> probabilities [B, C]."""

    def __init__(
        self,
        model: StagedModel,
        settings: InputSettings,
        *,
        voxel_size_angstrom: float,
        invert: bool,
        standardize: bool,
        temperature: float,
    ) -> None:
        super().__init__()
        parts = [model.framing, *model.stages.values(), model.pool, model.head]
        self.network = copy.deepcopy(nn.Sequential(*parts)).eval()
        _use_torchs_own_swish(self.network)
        self._settings = settings
        self._voxel_size_angstrom = voxel_size_angstrom
        self._sign = -1.0 if invert else 1.0
        self._standardize = standardize
        self._temperature = temperature

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Prepare the volumes as those of the training were, and classify them."""
        x = volumes.float() * self._sign
        if self._standardize:
            x = standard(x)
        logits = self.network(network_input(x, self._voxel_size_angstrom, self._settings))
        return torch.softmax(logits / self._temperature, dim=1)


def export_trial(trial_folder: Path, to: str, out: Path, *, invert: bool | None = None) -> list[str]:
    """Write the network of a trial as `to`, one of `FORMATS`; the lines to show.

    The file gets its name only after it has given the same probabilities as `studytool predict`, within `TOLERANCE`,
    in float32, for volumes of the trial's own validation split (random ones if its dataset is not there), one by one
    and together.

    Raises:
        DataError: no such format, `out` or its card exists or is in the trial's folder, or the file gives other values.
        StudytoolError: a package is missing, or the network cannot be written in this format.
        WeightsError: the folder holds no trained network.
    """
    if to not in FORMATS:
        raise DataError(f"--to: {unknown_name('format', to, FORMATS)}")
    form = FORMATS[to]
    for package in form.packages:
        if importlib.util.find_spec(package) is None:
            raise StudytoolError(f"--to {to} needs the package {package!r}: pip install 'studytool[onnx]'")
    card_path = Path(f"{out}.json")
    with Predictor(trial_folder, device="cpu", precision="float32") as predictor:
        for path in (out, card_path):
            _check_place(path, trial_folder)
        chosen = predictor.trial.input.filter
        if to == "onnx" and chosen != "none":
            raise StudytoolError(f"the filter {chosen} of this trial cannot be written as onnx; try exported-program")
        preparation = predictor.preparation()
        calibration = predictor.calibration()
        temperature = calibration.temperature if calibration else 1.0
        inverts = preparation.inverted if invert is None else invert
        predictor.model.to(memory_format=torch.contiguous_format)
        module = Deployed(
            predictor.model,
            predictor.trial.input,
            voxel_size_angstrom=predictor.record.voxel_size_angstrom,
            invert=inverts,
            standardize=preparation.normalize == "standard",
            temperature=temperature,
        ).eval()
        raw, wanted = _examples(predictor, temperature, inverts)
        card: dict[str, Any] = {
            "format": to,
            "input": f"{_INPUT}: float32 [B, 1, {', '.join(map(str, predictor.record.volume_shape_dhw))}], z y x",
            "output": f"{_OUTPUT}: float32 [B, {len(predictor.classes)}]",
            "classes": list(predictor.classes),
            "volume_shape_dhw": list(predictor.record.volume_shape_dhw),
            "voxel_size_angstrom": predictor.record.voxel_size_angstrom,
            "inverts_contrast": inverts,
            "temperature": temperature,
            "backbone": predictor.trial.model.backbone,
            "weights_sha256": predictor.record.sha256,
            "tolerance": TOLERANCE,
        }
        difference = _write(form, module, raw, wanted, out, card)
    write_json(card_path, {**card, "largest_difference": difference, **_digest(out)})
    contrast = "inverted as at the import of the training data" if inverts else "as the training data has it"
    return [
        f"{out}: {to}, probabilities of {len(card['classes'])} classes from raw volumes {card['input'].split(': ')[1]} "
        f"of {card['voxel_size_angstrom']:g} Å; contrast {contrast}",
        f"checked on {len(raw)} volumes: the largest difference to studytool's own is {difference:.1e} "
        f"(allowed: {TOLERANCE:g})",
        str(card_path),
    ]


def _check_place(path: Path, trial_folder: Path) -> None:
    if path.parent.resolve() == trial_folder.resolve():
        raise DataError(f"{path}: is in the trial's own folder, which is left as it is; choose another place")
    if path.exists() or path.is_symlink():
        raise DataError(f"{path}: exists already; choose another name, or remove it if nothing needs it")


@dataclass(frozen=True)
class Format:
    """How a format is written and read back; `open` gives what runs raw volumes [B, 1, D, H, W] from it."""

    write: Callable[[Deployed, torch.Tensor, Path, dict[str, Any]], None]
    open: Callable[[Path], Run]
    is_folder: bool = False
    packages: tuple[str, ...] = ()


def _write(
    form: Format,
    module: Deployed,
    raw: NDArray[np.float32],
    wanted: NDArray[np.float64],
    out: Path,
    card: dict[str, Any],
) -> float:
    """Write, read back, compare; only then the name. The largest difference."""
    several = np.arange(max(len(raw), _FEWEST)) % len(raw)
    raw, wanted = raw[several], wanted[several]
    example = torch.from_numpy(raw[:2])
    with _temporary(out, form.is_folder) as temporary:
        try:
            with _quietly():
                form.write(module, example, temporary, card)
                run = form.open(temporary)
                found = np.concatenate([run(raw[:1]), run(raw[1:])])
        except StudytoolError:
            raise
        except Exception as error:  # whatever torch, ONNX and MLflow raise for what they cannot express
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise StudytoolError(
                f"{card['backbone']} cannot be written as {card['format']}: {reason[:200]}; try another format"
            ) from error
        difference = float(np.abs(found - wanted).max())
        if not difference <= TOLERANCE:
            raise DataError(
                f"{out}: not written: the exported file's probabilities differ by {difference:.1e} from studytool's, "
                f"{TOLERANCE:g} is allowed; try another format"
            )
    return difference


def _examples(
    predictor: Predictor, temperature: float, inverts: bool
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Raw volumes [N, 1, D, H, W] and what `studytool predict` says of them."""
    dataset = predictor.own_dataset()
    sign = np.float32(-1.0 if inverts else 1.0)
    if dataset is not None:
        rows = rows_of(dataset, "val")
        rows = rows[np.linspace(0, len(rows) - 1, min(_CHECKED, len(rows))).astype(np.int64)]
        stored = np.empty((len(rows), *dataset.manifest.shape_dhw), dataset.manifest.dtype)
        dataset.gather(rows, stored)
        probabilities = predictor.label_rows(dataset, rows).probabilities
        return sign * widened(stored)[:, None], with_temperature(probabilities, temperature)
    generator = np.random.default_rng(0)
    shape = (_CHECKED, 1, *predictor.record.volume_shape_dhw)
    volumes = generator.standard_normal(shape, dtype=np.float32)
    x = network_input(torch.from_numpy(volumes), predictor.record.voxel_size_angstrom, predictor.trial.input)
    with torch.no_grad():
        own = torch.softmax(predictor.model(x).double(), dim=1).numpy()
    return sign * volumes, with_temperature(own, temperature)


def _use_torchs_own_swish(network: nn.Module) -> None:
    """PyTorchVideo's Swish, in place, as torch's SiLU: the same numbers, but TorchScript can write it."""
    from pytorchvideo.layers.swish import Swish

    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, Swish):
                setattr(module, name, nn.SiLU())


def _dynamic() -> Any:
    return ({0: torch.export.Dim("batch", min=1, max=4096)},)


def _program(module: Deployed, example: torch.Tensor) -> Any:
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=_dynamic(), strict=False)


def _write_program(module: Deployed, example: torch.Tensor, path: Path, card: dict[str, Any]) -> None:
    buffer = io.BytesIO()  # torch looks at the ending of a file's name
    torch.export.save(_program(module, example), buffer, extra_files={"studytool.json": json.dumps(card)})
    path.write_bytes(buffer.getvalue())


def _open_program(path: Path) -> Run:
    return _runner(torch.export.load(io.BytesIO(path.read_bytes())).module())


def _write_torchscript(module: Deployed, example: torch.Tensor, path: Path, card: dict[str, Any]) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(module, example, check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(traced, str(path), _extra_files={"studytool.json": json.dumps(card)})  # type: ignore[no-untyped-call,unused-ignore]


def _open_torchscript(path: Path) -> Run:
    return _runner(torch.jit.load(str(path)))  # type: ignore[no-untyped-call]


def _write_onnx(module: Deployed, example: torch.Tensor, path: Path, card: dict[str, Any]) -> None:
    import onnx  # type: ignore[import-not-found,unused-ignore]

    with torch.no_grad():
        torch.onnx.export(
            module,
            (example,),
            str(path),
            dynamo=True,
            dynamic_shapes=_dynamic(),
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            external_data=False,
            verbose=False,
        )
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {"studytool": json.dumps(card)})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _open_onnx(path: Path) -> Run:
    import onnxruntime  # type: ignore[import-untyped,import-not-found,unused-ignore]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda volumes: np.asarray(session.run([_OUTPUT], {_INPUT: volumes})[0], np.float64)


def _write_mlflow(module: Deployed, example: torch.Tensor, path: Path, card: dict[str, Any]) -> None:
    from studytool.study.tracking.modelfile import save_model

    save_model(module, example.numpy(), path, card)


def _open_mlflow(path: Path) -> Run:
    from studytool.study.tracking.modelfile import load_model

    return load_model(path)


FORMATS = {
    "exported-program": Format(_write_program, _open_program),
    "torchscript": Format(_write_torchscript, _open_torchscript),
    "onnx": Format(_write_onnx, _open_onnx, packages=("onnx", "onnxscript", "onnxruntime")),
    "mlflow": Format(_write_mlflow, _open_mlflow, is_folder=True),
}


def _runner(loaded: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    def run(volumes: NDArray[np.float32]) -> NDArray[np.float64]:
        with torch.no_grad():
            return loaded(torch.from_numpy(volumes)).double().numpy()

    return run


@contextmanager
def _temporary(out: Path, is_folder: bool) -> Iterator[Path]:
    """A name beside `out` that becomes `out` if all goes well."""
    if not is_folder:
        with whole_file(out) as temporary:
            yield temporary
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield holder / "model"
        (holder / "model").replace(out)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _digest(out: Path) -> dict[str, str]:
    return {"sha256": sha256_of(out)} if out.is_file() else {}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' own advice on the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
