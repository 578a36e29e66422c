"""The trainable denoiser that follows the student's distribution, with a discriminator on its features.

Legend: B batch; x_t, velocity [B, C, h, w]; t [B].
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.networks.exit_shift import ExitShift


@dataclass(frozen=True)
class FakeScoreOutput:
    """velocity [B, C, h, w] and, where there are heads, the discriminator's logits [B]; a large one says real."""

    velocity: Tensor
    logits: Tensor | None


class FakeScore(nn.Module):
    """Trunk and heads behind one `forward`, so that one wrapper (DDP, FSDP) and one optimizer hold both.

    Args:
        denoiser: the trunk, usually a copy of the teacher's.
        heads: takes the list of feature maps [B, C, N] and gives [B]; see `build_heads`. None is no discriminator.
        blocks: whose features; None is the family's choice.
        exit_shift: where it is told at which step the student's samples stopped.

    Raises:
        ValueError: the network has no such blocks.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        heads: nn.Module | None = None,
        blocks: Sequence[int] | None = None,
        exit_shift: ExitShift | None = None,
    ) -> None:
        super().__init__()
        if heads is not None or blocks is not None:
            denoiser.family.feature_modules(denoiser.network, blocks)
        self.denoiser = denoiser
        self.heads = heads
        self.blocks = None if blocks is None else tuple(blocks)
        self.exit_shift = exit_shift

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, exits: Tensor | None = None) -> FakeScoreOutput:
        """Velocity and logits of one network call. `exits` [n] are those of the first n samples, where it is told.

        Raises ValueError for exits of a fake score that is not told any.
        """
        if exits is not None and self.exit_shift is None:
            raise ValueError("exits are given, and this fake score is not told any: build it with an exit_shift")
        told = nullcontext()
        if exits is not None and self.exit_shift is not None:
            told = self.exit_shift.told(self.denoiser.network, exits, len(x_t))
        with told:
            if self.heads is None:
                return FakeScoreOutput(self.denoiser(x_t, t, condition), None)
            velocity, features = self.denoiser.velocity_and_features(x_t, t, condition, self.blocks)
        return FakeScoreOutput(velocity, self.heads(features))
