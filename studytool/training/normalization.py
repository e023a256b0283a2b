"""Batch normalization's running statistics, which a network is evaluated with."""

from __future__ import annotations

from torch import nn

_SHORTEST, _LONGEST = 0.1, 0.3
_BATCHES = 3


def follow_statistics(network: nn.Module, steps_per_epoch: int) -> None:
    """Let the running statistics follow the network within an epoch, in place.

    They are an exponential average over batches. With the usual momentum of 0.1 it reaches back some twenty batches,
    which is several epochs when few particles are labelled: the network would be evaluated with the statistics of what
    it was, and sit at chance while it learns. The momentum becomes that of an average over a third of an epoch, at
    least 0.1 and at most 0.3; a larger one of the network's own stays. (S3D comes with 0.001, made for a million
    steps.) A momentum of None, the mean of all batches, stays too.
    """
    momentum = min(_LONGEST, max(_SHORTEST, _BATCHES / steps_per_epoch))
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, momentum)
