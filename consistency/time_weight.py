"""The learned weight of sCM: how much each time counts is fitted beside the student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.core.paths import at_least_fp32

FREQUENCIES, WIDTH = 6, 64


class TimeWeight(nn.Module):
    """w(t) of the loss exp(w) error - w (sCM, arXiv:2410.11081, Eq. 8 and Alg. 1): times [B] in [0, 1] to [B].

    The best w is minus the log of the mean error at a time, so that all times come to count alike. The angle
    atan(t / (1 - t)) goes through sines and cosines of half its frequency and multiples; the last layer starts at 0,
    where the loss is the plain one. Size and embedding are ours: the paper says a small network on the time embedding.
    """

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, FREQUENCIES + 1, dtype=torch.float32), persistent=False)
        self.hidden = nn.Linear(2 * FREQUENCIES, WIDTH)
        self.out = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, t: Tensor) -> Tensor:
        t = at_least_fp32(t)
        phases = torch.atan2(t, 1 - t)[:, None] * self.frequencies
        features = torch.cat([phases.sin(), phases.cos()], dim=1).to(self.hidden.weight.dtype)
        return self.out(nn.functional.silu(self.hidden(features)))[:, 0]


class EmbeddingWeight(nn.Module):
    """w of a network's time embedding [B, D], linear, to [B] (SANA-Sprint, arXiv:2503.09641, public code).

    Starts at zero, where the source draws small weights.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, embedding: Tensor) -> Tensor:
        return at_least_fp32(self.out(embedding.to(self.out.weight.dtype))[:, 0])


def build_time_weight(seed: int) -> TimeWeight:
    """A weight of 1 at all times, whose hidden layer depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TimeWeight()
