"""Pre-training: a backbone learns to name what clips show, and its weights are written for trials to start from."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from studytool.errors import DataError, TrainingError
from studytool.files import sha256_of, whole_file, write_json
from studytool.models.adapt import StagedModel
from studytool.models.backbones import Clip
from studytool.models.build import build_model
from studytool.pretraining.sources import ClipSource, GeneratedClips, VideoFolder
from studytool.settings import ModelSettings, TrainSettings
from studytool.training.device import choose_device, choose_memory_format, choose_precision, reuse_memory, seeded
from studytool.training.evaluate import autocast
from studytool.training.normalization import follow_statistics
from studytool.training.optim import Updater


@dataclass(frozen=True)
class PretrainProgress:
    """How far it is: the step (from 1) of how many, and means over the last steps of the loss and of right answers."""

    step: int
    steps: int
    loss: float
    accuracy: float


REPORT_EVERY = 50


def pretrain(
    backbone: str = "r2plus1d_tiny",
    *,
    out: Path,
    videos: Path | None = None,
    clips: int = 40_000,
    epochs: int = 1,
    clip_thw: Clip = (24, 24, 24),
    batch_size: int = 32,
    learning_rate: float = 4e-3,
    weight_decay: float = 1e-3,
    seed: int = 0,
    device: str | None = None,
    on_progress: Callable[[PretrainProgress], None] | None = None,
) -> dict[str, Any]:
    """Pre-train a backbone; write its weights to `out` (.safetensors) and a card beside it (.json), which is returned.

    Without `videos` it learns from `clips` generated clips an epoch, new ones in each. With `videos`, a folder of one
    folder of videos per label, it learns from these. A clip may have several labels (shape and motion); the loss is the
    sum of the cross-entropies. The weights are those of the adapted network, convolutions in float16, so that
    `init: checkpoint:OUT` reads them for any backbone; the defaults made the weights of `init: motion`.
    On a CPU the same arguments, versions and number of threads give the same weights.

    Raises:
        SpecError: no such backbone.
        DataError: the videos cannot be used, or fewer clips than a batch.
        TrainingError: the loss is no longer finite.
    """
    if out.suffix != ".safetensors":
        raise DataError(f"{out}: the file of weights has to end in .safetensors")
    chosen = choose_device(device)
    source: ClipSource
    if videos is None:
        source = GeneratedClips(clips, clip_thw=clip_thw, seed=seed)
    else:
        source = VideoFolder(videos, clip_thw=clip_thw, seed=seed)
    if source.count < min(batch_size, 2):
        raise DataError(f"{source.count} clips are too few for a batch of {batch_size}")
    settings = TrainSettings(
        max_epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_epochs=0.05 * epochs,
    )
    model = build_model(
        ModelSettings(backbone=backbone),
        num_classes=sum(len(question.classes) for question in source.questions),
        volume_shape_dhw=clip_thw,
        seed=seed,
    )
    reuse_memory(settings.reuse_memory, chosen)
    started = time.perf_counter()
    run = _Run(model, source, settings, chosen)
    follow_statistics(model, run.steps_per_epoch)
    with seeded(seed, chosen):
        for epoch in range(1, epochs + 1):
            run.train(epoch, on_progress or (lambda _progress: None))
    accuracy = run.held_out_accuracy()
    seconds = time.perf_counter() - started
    save_weights(model, out)
    card = {
        "backbone": backbone,
        "source": source.description(),
        "questions": {question.name: list(question.classes) for question in source.questions},
        "clip_thw": list(clip_thw),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.stages.parameters()),
        "held_out_accuracy": accuracy,
        "seconds": round(seconds, 1),
        "device": chosen.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("studytool", "torch", "numpy")},
        },
        "sha256": sha256_of(out),
        "bytes": out.stat().st_size,
    }
    write_json(out.with_suffix(".json"), card)
    return card


class _Run:
    """A network that learns from clips."""

    def __init__(self, model: StagedModel, source: ClipSource, settings: TrainSettings, device: torch.device) -> None:
        self.model = model
        self.source = source
        self.settings = settings
        self.device = device
        self.precision = choose_precision(settings.precision, device)
        self.memory_format = choose_memory_format(settings.channels_last, model, self.device)
        self.steps_per_epoch = max(1, source.count // settings.batch_size)
        model.to(device).to(memory_format=self.memory_format)
        self.updater = Updater(
            model, settings, steps_per_epoch=self.steps_per_epoch, scale_gradients=self.precision == "float16"
        )

    def train(self, epoch: int, on_progress: Callable[[PretrainProgress], None]) -> None:
        """One epoch."""
        self.model.train()
        self.updater.begin_epoch(epoch)
        recent: list[tuple[float, float]] = []
        for i, batch in enumerate(self.source.batches(epoch, self.settings.batch_size)):
            step = (epoch - 1) * self.steps_per_epoch + i
            loss, right = self._answer(*batch)
            self.updater.update(loss, step)
            recent.append((loss.item(), right.float().mean().item()))
            if not np.isfinite(recent[-1][0]):
                raise TrainingError(f"epoch {epoch}, step {i + 1}: the loss is {recent[-1][0]}; lower learning_rate")
            if (step + 1) % REPORT_EVERY == 0 or i == self.steps_per_epoch - 1:
                mean_loss, mean_right = np.mean(recent, axis=0)
                total = self.settings.max_epochs * self.steps_per_epoch
                on_progress(PretrainProgress(step + 1, total, float(mean_loss), float(mean_right)))
                recent.clear()

    def held_out_accuracy(self) -> dict[str, float]:
        """The share of right answers to each question, and of clips with all of them right ("all")."""
        self.model.eval()
        with torch.no_grad():
            right = torch.cat([self._answer(*batch)[1] for batch in self.source.held_out(self.settings.batch_size)])
        names = [question.name for question in self.source.questions]
        shares = dict(zip(names, right.double().mean(0).tolist(), strict=True))
        return {name: round(share, 4) for name, share in {**shares, "all": float(right.all(1).double().mean())}.items()}

    def _answer(self, clips_B1THW: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and which answers are right [B, Q]."""
        clips = clips_B1THW.to(self.device, memory_format=self.memory_format)
        with autocast(self.device, self.precision):
            logits = self.model(clips).float()
        truth = labels.to(self.device)
        answers = logits.split([len(question.classes) for question in self.source.questions], dim=1)
        loss = sum((functional.cross_entropy(answer, truth[:, q]) for q, answer in enumerate(answers)), torch.zeros(()))
        return loss, torch.stack([answer.argmax(1) == truth[:, q] for q, answer in enumerate(answers)], 1)


def save_weights(model: StagedModel, path: Path) -> None:
    """Write all but the head by the adapted model's names: convolutions and matrices in float16, the rest as it is."""
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor).contiguous().cpu()
        for name, tensor in model.state_dict().items()
        if not name.startswith("head.")
    }
    with whole_file(path) as temporary:
        save_file(tensors, temporary)
