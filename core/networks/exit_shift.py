"""What tells a fake score at which step of the student's rollout its samples stopped.

Samples that stop at different steps are different distributions, and one fake score for all of them follows their
mixture: the last exit, which is the one that is used, is then pulled away from the teacher by the others.

Legend: B samples; n of them that are told; E exits; W width of the first layer of a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.networks.experts import Experts
from fewstep.core.tangents.smooth import time_sites


class ExitShift(nn.Module):
    """A vector [E, W] for each exit, added to what the first layer makes of the sinusoids of the time.

    All are zero at first: the network begins as the one that is told nothing. They are in fp32 and are trained with it.

    Args:
        network: a diffusers network.
        exits: E.

    Raises:
        ValueError: fewer than two exits, a network of two experts, or one whose time has no layers known here.
    """

    def __init__(self, network: nn.Module, exits: int) -> None:
        super().__init__()
        if exits < 2:
            raise ValueError(f"a fake score is told one of {exits} exits; there must be two or more")
        if isinstance(network, Experts):
            raise ValueError(
                "fake_score.told_exit with a network of two experts, which share out samples: leave it out"
            )
        sites = time_sites(network)
        if not sites:
            raise ValueError(
                f"fake_score.told_exit, and {type(network).__name__} embeds its time in a way that is not known here: "
                "leave it out"
            )
        widths = [(layers.linear_1.out_features, layers.linear_1.weight.device) for _, layers in sites]
        self.exits = exits
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(exits, width, device=at)) for width, at in widths)

    @contextmanager
    def told(self, network: nn.Module, exits: Tensor, batch: int) -> Iterator[None]:
        """Calls of the network on B = `batch` samples inside are told the exits, int64 [n], of the first n of them.

        Raises ValueError for more exits than samples, or one out of range.
        """
        if exits.ndim != 1 or len(exits) > batch:
            raise ValueError(f"exits must be a list of at most {batch}, the samples, got {list(exits.shape)}")
        if len(exits) > 0 and not 0 <= int(exits.min()) <= int(exits.max()) < self.exits:
            raise ValueError(f"exits {exits.tolist()} must lie in [0, {self.exits})")
        with ExitStack() as stack:
            for shift, (_, layers) in zip(self.shifts, time_sites(network), strict=True):
                rows = shift[exits.to(shift.device)]
                untold = rows.new_zeros(batch - len(exits), rows.shape[1])
                stack.enter_context(_added(layers.linear_1, torch.cat([rows, untold])))
            yield


@contextmanager
def _added(layer: Any, rows: Tensor) -> Iterator[None]:
    """Add rows [B, W] to the output of a layer, [B, W], [B, tokens, W] or [B tokens, W]."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        added = rows.to(output.dtype)
        if output.ndim == 3:
            return output + added[:, None]
        # Networks with a time for each token may list them all, sample after sample.
        return output + added.repeat_interleave(len(output) // len(added), dim=0)

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
