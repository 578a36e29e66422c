"""Picture scorers on clips: the mean over all frames, or over the best of them.

Shapes: clips [B, 3, F, H, W] in [0, 1], scores [B].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.evaluation.scorers.scorer import Scorer, require_prompts, score


class FrameScore:
    """A picture scorer as a video scorer: the mean score of the best `share` of the frames (all with 1).

    A share of 0.3 of HPSv3 is the visual quality of Astrolabe (arXiv:2603.17051); the number of frames is rounded up,
    which is our reading. Raises ValueError unless 0 < share <= 1 and the scorer takes pictures.
    """

    def __init__(self, scorer: Scorer, *, share: float = 1.0, chunk: int | None = None) -> None:
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share is {share}; use a part of the frames above 0, at most 1")
        if scorer.card.needs_video:
            raise ValueError(f"scorer {scorer.card.name} takes clips by itself; only picture scorers are lifted")
        self.scorer, self.share, self.chunk = scorer, share, chunk
        name = f"{scorer.card.name}_frames" if share == 1.0 else f"{scorer.card.name}_best_{share:g}"
        self.card = dataclasses.replace(scorer.card, name=name, needs_video=True)

    def require_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError where the scorer does not know a prompt."""
        require_prompts([self.scorer], prompts)

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        frames = pixels.shape[2]
        flat = pixels.transpose(1, 2).flatten(0, 1)  # [B * F, 3, H, W]
        repeated = [prompt for prompt in prompts for _ in range(frames)]
        gradient = torch.is_grad_enabled() and pixels.requires_grad and self.card.differentiable
        values = score(self.scorer, flat, repeated, gradient=gradient, chunk=self.chunk).unflatten(0, (-1, frames))
        best = math.ceil(self.share * frames)
        return values.topk(best, dim=1, largest=self.card.higher_is_better).values.mean(dim=1)
