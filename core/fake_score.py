"""The trainable denoiser that follows the student's distribution, with a discriminator on its features.

Legend: B batch; x_t, velocity [B, C, h, w]; t [B].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser


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

    Raises:
        ValueError: the network has no such blocks.
    """

    def __init__(
        self, denoiser: Denoiser, *, heads: nn.Module | None = None, blocks: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if heads is not None or blocks is not None:
            denoiser.family.feature_modules(denoiser.network, blocks)
        self.denoiser = denoiser
        self.heads = heads
        self.blocks = None if blocks is None else tuple(blocks)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> FakeScoreOutput:
        """Velocity and logits of one network call."""
        if self.heads is None:
            return FakeScoreOutput(self.denoiser(x_t, t, condition), None)
        velocity, features = self.denoiser.velocity_and_features(x_t, t, condition, self.blocks)
        return FakeScoreOutput(velocity, self.heads(features))
