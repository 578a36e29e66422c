"""A scorer that is shown each prompt behind a text of its own, such as "Realistic photo" (DMDR, arXiv:2511.13649)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fewstep.evaluation.scorers.scorer import Scorer, require_prompts


class PrefixedScorer:
    """`scorer` on f"{prefix} {prompt}"; its card is the scorer's. Raises ValueError for a blank prefix."""

    def __init__(self, scorer: Scorer, prefix: str) -> None:
        if not prefix.strip():
            raise ValueError(f"prompt_prefix is {prefix!r}: give a text, or leave it out")
        self.scorer, self.prefix = scorer, prefix.strip()
        self.card = scorer.card

    def require_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError where the scorer does not know a prompt behind the prefix."""
        require_prompts([self.scorer], [f"{self.prefix} {prompt}" for prompt in prompts])

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        return self.scorer(pixels, [f"{self.prefix} {prompt}" for prompt in prompts])
