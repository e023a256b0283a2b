"""What a network starts from: random weights, published ones, or a checkpoint, and a report of what was loaded."""

from __future__ import annotations

import io
import logging
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from studytool import registry
from studytool.errors import WeightsError
from studytool.models.anatomy import Anatomy
from studytool.models.backbones import CHECKPOINT, Backbone, WeightsFile
from studytool.models.inflate import inflated
from studytool.models.weights import (
    FileCheck,
    fetch_checkpoint,
    missing_weights,
    read_checked,
    weights_file,
    weights_path,
)
from studytool.seeds import derive_seed

LEAST_SHARE = 0.95
_log = logging.getLogger(__name__)
_STATISTICS = (".running_mean", ".running_var")
_WRAPPERS = ("state_dict", "model_state", "model_state_dict", "model")


@dataclass(frozen=True)
class LoadReport:
    """What of a file came into the network, by the network's own names of tensors; the head is left out.

    `reshaped` tensors changed their shape in a known way (inflation, a grey stem given three channels) and count as
    matched. `missing` ones kept their random start, and `misfits` has them in the same order with their shapes;
    `left_over` ones of the file found no place. `share` is the part of the parameters that was loaded. `check` says
    how the file was verified: see `studytool.models.weights.FileCheck`.
    """

    initialization: str
    file: str = ""
    sha256: str = ""
    check: str = ""
    matched: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    misfits: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    share: float = 0.0

    def __str__(self) -> str:
        if not self.file:
            return f"{self.initialization}: nothing was loaded"
        text = (
            f"{self.initialization}: {self.share:.1%} of the parameters from {self.file} ({self.check}); tensors: "
            f"{len(self.matched)} matched, {len(self.reshaped)} reshaped, {len(self.missing)} missing, "
            f"{len(self.left_over)} left over"
        )
        unloaded = [*(f"missing {name}" for name in self.missing), *(f"left over {name}" for name in self.left_over)]
        return f"{text}: {', '.join(unloaded)}" if unloaded else text


@dataclass(frozen=True)
class _Source:
    """A file that was read: `reshaped` names the tensors that were given another shape since."""

    init: str
    path: Path
    check: FileCheck
    tensors: Mapping[str, Tensor]
    reshaped: frozenset[str] = frozenset()


def initialize(network: nn.Module, backbone: Backbone, init: str, seed: int) -> LoadReport:
    """Load what `init` names into the untouched network, in place.

    A checkpoint of studytool's own has the names of the adapted model and has to wait for `load_trial`.

    Raises:
        WeightsError: the file is missing, damaged, or holds less than 95% of the parameters, or not all of the running
            statistics of batch normalization.
    """
    if init.startswith(CHECKPOINT):
        source = _checkpoint(backbone, init)
        if _is_trial(source):
            return LoadReport(init)
        source = _renamed(network, backbone, source)
        return _load(network, backbone.head, _in_colour(source, _own_tensors(network, backbone.head)))
    report: LoadReport = registry.lookup("initialization", init, registry.INITIALIZATIONS)(network, backbone, seed)
    return report


def check_stem(report: LoadReport, network: nn.Module, anatomy: Anatomy, path: Path | None) -> None:
    """Refuse a file without the whole stem: what is learned after a random stem, frozen perhaps, is not its features.

    The stem is all that is in none of the other stages and not in the pool; `anatomy` is the network taken apart.

    Raises:
        WeightsError: a tensor of the stem kept its random start.
    """
    if not report.missing:
        return
    _stem, *later = anatomy.stages.values()
    elsewhere = {id(t) for part in (*later, anatomy.pool) for t in part.state_dict(keep_vars=True).values()}
    own = network.state_dict(keep_vars=True)
    random = [
        words for name, words in zip(report.missing, report.misfits, strict=True) if id(own[name]) not in elsewhere
    ]
    if random:
        raise WeightsError(
            f"{path}: the network's first layers are not all in it, and would stay random: {_first_few(random)}; "
            "give a file that has them in these shapes (a stem of one channel may stand for three), or another init"
        )


def load_trial(model: nn.Module, backbone: Backbone, init: str) -> LoadReport | None:
    """Load all but the head of a trial's checkpoint into the adapted model; None if `init` names no such checkpoint.

    Raises:
        WeightsError: a tensor is missing or has another shape, as after other stem, backbone or volume settings.
    """
    if not init.startswith(CHECKPOINT):
        return None
    source = _checkpoint(backbone, init)
    return _load(model, "head.", source, least_share=1.0) if _is_trial(source) else None


def random_weights(_network: nn.Module, _backbone: Backbone, _seed: int) -> LoadReport:
    """Leave the network with the random weights it was built with."""
    return LoadReport("random")


def kinetics400(network: nn.Module, backbone: Backbone, _seed: int) -> LoadReport:
    """The weights its makers trained on Kinetics-400."""
    return _load(network, backbone.head, _published(network, backbone, "kinetics400"))


def motion(network: nn.Module, backbone: Backbone, _seed: int) -> LoadReport:
    """The weights that come with studytool, trained on generated clips (`studytool.pretraining`)."""
    return _load(network, backbone.head, _published(network, backbone, "motion"))


def shuffled(network: nn.Module, backbone: Backbone, seed: int) -> LoadReport:
    """The weights trained on videos, each tensor's numbers in random order: the same statistics, no features."""
    source = _published(network, backbone, "shuffled")
    mixed = {name: _permuted(tensor, derive_seed(seed, "shuffle", name)) for name, tensor in source.tensors.items()}
    return _load(network, backbone.head, replace(source, tensors=mixed))


def imagenet_inflated(network: nn.Module, backbone: Backbone, _seed: int) -> LoadReport:
    """2D weights trained on ImageNet, repeated along time and divided by the length (Carreira and Zisserman, 2017)."""
    source = _published(network, backbone, "imagenet_inflated")
    rename = registry.load(backbone.inflate)
    tensors, reshaped = inflated(source.tensors, _own_tensors(network, backbone.head), rename)
    return _load(network, backbone.head, replace(source, tensors=tensors, reshaped=reshaped))


def read_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """Tensors by name from what a .safetensors file or a torch file holds, never running code from it.

    The usual wrappings are taken off: a dictionary around the state, and "module." before every name.

    Raises:
        WeightsError: the file is damaged, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            held: Any = load(content)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a pickle in a file of the name of weights; the error says more
                held = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own words go on to say how to run the code after all.
        raise WeightsError(
            f"{path}: holds more than tensors by name, or is damaged; nothing of it was run; save the model's "
            "state_dict() alone, best as .safetensors"
        ) from error
    except Exception as error:  # of a damaged file torch raises whatever it stumbles over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path}: cannot be read as weights, the file is damaged ({reason}); copy or save it again"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(held, Mapping) and isinstance(held.get(wrapper), Mapping):
            held = held[wrapper]
    if not isinstance(held, Mapping):
        raise WeightsError(f"{path}: holds {type(held).__name__}, not tensors by name")
    tensors = {str(name): tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors by name")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _published(network: nn.Module, backbone: Backbone, init: str) -> _Source:
    return _renamed(network, backbone, _read(backbone, init, weights_file(backbone.name, init)))


def _renamed(network: nn.Module, backbone: Backbone, source: _Source) -> _Source:
    """Published names turned into the network's own, where its package has changed them since."""
    if not backbone.rename:
        return source
    rename, known = registry.load(backbone.rename), set(network.state_dict())
    names = {name: rename(name) if name not in known and rename(name) in known else name for name in source.tensors}
    return replace(source, tensors={names[name]: tensor for name, tensor in source.tensors.items()})


def _checkpoint(backbone: Backbone, init: str) -> _Source:
    return _read(backbone, init, None)


def _read(backbone: Backbone, init: str, file: WeightsFile | None) -> _Source:
    path = _present(backbone, init)
    content, check = read_checked(path, file)
    return _Source(init, path, check, read_tensors(content, path))


def _is_trial(source: _Source) -> bool:
    return any(name.startswith("stages.") for name in source.tensors)


def _present(backbone: Backbone, init: str) -> Path:
    fetch_checkpoint(init)
    path = weights_path(backbone.name, init)
    message = missing_weights(backbone.name, init)
    if path is None or message:
        raise WeightsError(message or f"backbone {backbone.name} has no weights for init {init}")
    return path


def _load(network: nn.Module, head: str, source: _Source, least_share: float = LEAST_SHARE) -> LoadReport:
    """Copy tensors by name where shapes agree; nothing is copied unless enough fits."""
    own, tensors = _own_tensors(network, head), source.tensors
    matched = [name for name in own if name in tensors and tensors[name].shape == own[name].shape]
    missing = [name for name in own if name not in set(matched)]
    misfits = {name: _misfit(name, own[name], tensors) for name in missing}
    learned = {name: p.numel() for name, p in network.named_parameters() if name in own}
    share = sum(learned[name] for name in matched if name in learned) / max(1, sum(learned.values()))
    if share < least_share:
        unlearned = [misfits[name] for name in missing if name in learned]
        raise WeightsError(
            f"{source.path}: {share:.1%} of the parameters fit, at least {least_share:.0%} have to; "
            f"not loaded: {_first_few(unlearned)}"
        )
    statistics = [words for name, words in misfits.items() if name.endswith(_STATISTICS)]
    if statistics:
        raise WeightsError(
            f"{source.path}: running statistics of batch normalization are missing or do not fit: "
            f"{_first_few(statistics)}; save the model's whole state_dict(), with its buffers"
        )
    broken = [name for name in matched if not bool(torch.isfinite(tensors[name]).all())]
    if broken:
        raise WeightsError(f"{source.path}: not every number is finite in {_first_few(broken)}")
    with torch.no_grad():
        for name in matched:
            own[name].copy_(tensors[name])
    if missing:
        words = _first_few(list(misfits.values()))
        _log.warning("%s: not every tensor is in it; these stay as they were built: %s", source.path, words)
    known = set(network.state_dict())
    return LoadReport(
        initialization=source.init,
        file=source.path.name,
        sha256=source.check.sha256,
        check=source.check.state,
        matched=tuple(name for name in matched if name not in source.reshaped),
        reshaped=tuple(name for name in matched if name in source.reshaped),
        missing=tuple(missing),
        misfits=tuple(misfits.values()),
        left_over=tuple(name for name in tensors if name not in known and not (head and name.startswith(head))),
        share=share,
    )


def _own_tensors(network: nn.Module, head: str) -> dict[str, Tensor]:
    """The network's tensors that can be loaded, by name: no head, and no integers (counters and index tables)."""
    return {
        name: tensor
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point() and not (head and name.startswith(head))
    }


def _in_colour(source: _Source, own: Mapping[str, Tensor]) -> _Source:
    """Kernels of one channel repeated for the three that the network has, and divided by three.

    Their sum over the channels is the kernel of the file again, but for rounding in the last bit.
    """
    grey = {
        name: tensor.to(own[name].dtype).expand(own[name].shape) / 3
        for name, tensor in source.tensors.items()
        if name in own
        and own[name].ndim == 5
        and (own[name].shape[1], tensor.shape) == (3, (own[name].shape[0], 1, *own[name].shape[2:]))
    }
    return replace(source, tensors={**source.tensors, **grey}, reshaped=source.reshaped | set(grey))


def _permuted(tensor: Tensor, seed: int) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(seed))
    return tensor.flatten()[order].view(tensor.shape)


def _misfit(name: str, own: Tensor, tensors: Mapping[str, Tensor]) -> str:
    return f"{name} {list(own.shape)}" + (f" (the file has {list(tensors[name].shape)})" if name in tensors else "")


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
