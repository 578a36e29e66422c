"""Adversarial self-distillation: a rollout of n steps is compared with the same student's rollout of n + 1.

The method is ASD (arXiv:2511.01419). We know its outline alone, so the form of the losses is our reading: relativistic
pairing and penalties as in R3GAN (arXiv:2501.05441).

Legend: B batch, C channels, T frames of the teacher; videos [B, C, T, h, w]; logits [B], a large one says that more
steps were taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.core.condition import Condition
from fewstep.core.discriminator import DiscriminatorHeads
from fewstep.core.fake_score import FakeScore
from fewstep.core.paths import add_noise, at_least_fp32
from fewstep.core.randomness import Draw
from fewstep.core.shapes import require_same_shape
from fewstep.core.time_law import draw_times
from fewstep.dmd.config import MatchingConfig
from fewstep.dmd.gan_loss import approximate_r1_penalty, perturb_noised_input

# Of the perturbation that stands for the derivative in the penalties.
PERTURBATION = 0.05


class StepDiscriminator(nn.Module):
    """Heads on frozen features, one set for each n: logits of n against n + 1 steps.

    Args:
        channels: of each feature map.
        width: of the heads.
        pairs: how many n there are, from n = 1 on.
        seed: decides all weights.

    Raises:
        ValueError: there is no pair.
    """

    def __init__(self, channels: Sequence[int], *, width: int, pairs: int, seed: int) -> None:
        super().__init__()
        if pairs < 1:
            raise ValueError(f"a discriminator of n against n + 1 steps needs a pair, got {pairs}")
        self.heads = nn.ModuleList(
            DiscriminatorHeads(channels, width=width, seed=seed + number) for number in range(pairs)
        )

    def forward(self, features: Sequence[Tensor], steps: int) -> Tensor:
        """Feature maps [B, C, N] to logits [B] of the pair (steps, steps + 1).

        Raises:
            ValueError: there is no such pair.
        """
        if not 1 <= steps <= len(self.heads):
            raise ValueError(f"steps must be from 1 to {len(self.heads)}, got {steps}")
        # All heads are called, so that distributed gradients of the others exist, and are zero.
        return torch.stack([heads(features) for heads in self.heads])[steps - 1]


def relativistic_generator_loss(fewer: Tensor, more: Tensor) -> Tensor:
    """mean softplus(more - fewer): the rollout of fewer steps is to look like the one of more; log 2 where it does.

    Raises:
        ValueError: the logits differ in shape.
    """
    require_same_shape(fewer=fewer, more=more)
    return functional.softplus(at_least_fp32(more) - at_least_fp32(fewer)).mean()


def relativistic_discriminator_loss(fewer: Tensor, more: Tensor) -> Tensor:
    """mean softplus(fewer - more): log 2 at chance.

    Raises:
        ValueError: the logits differ in shape.
    """
    require_same_shape(fewer=fewer, more=more)
    return functional.softplus(at_least_fp32(fewer) - at_least_fp32(more)).mean()


def gradient_penalties(logits: Sequence[Tensor], perturbed: Sequence[Tensor]) -> Tensor:
    """Sum of finite-difference penalties |D(x) - D(x + s n)|^2 / s^2 of both kinds of samples, R1 and R2.

    Args:
        logits: of each kind of samples.
        perturbed: of the same ones at x + `PERTURBATION` n.

    Raises:
        ValueError: the counts or shapes differ.
    """
    pairs = zip(logits, perturbed, strict=True)
    return torch.stack([approximate_r1_penalty(a, b) / PERTURBATION**2 for a, b in pairs]).sum()


@dataclass(frozen=True, eq=False)
class StepPair:
    """Windows [B, C, T, h, w] of two rollouts from the same noise: `fewer` exits after `steps` = n calls, `more` after
    n + 1. `condition` is that of both."""

    fewer: Tensor
    more: Tensor
    condition: Condition
    steps: int


def asd_student_loss(
    pair: StepPair, *, fake_score: FakeScore, discriminator: StepDiscriminator, draw: Draw, times: MatchingConfig
) -> Tensor:
    """Adversarial loss of the rollout of n steps (with graph) against that of a step more (ASD, arXiv:2511.01419).

    Both are noised to one time per sample, each with noise of its own, and judged on features of the fake score, whose
    parameters and those of the discriminator the caller has frozen.

    Args:
        pair: the rollouts; no gradient reaches the one of more steps.
        fake_score: gives the features.
        discriminator: judges them.
        draw: of the slice.
        times: those of the fake score.
    """
    t = draw_times(draw, "asd_time", times.fake_times, fake_score.denoiser.family)
    noises = (draw.noise(tuple(pair.fewer.shape[1:]), f"asd_noise_{name}") for name in ("fewer", "more"))
    logits = []
    for video, noise in zip((pair.fewer, pair.more.detach()), noises, strict=True):
        features = fake_score.denoiser.velocity_and_features(add_noise(video, noise, t), t, pair.condition)[1]
        logits.append(discriminator(features, pair.steps))
    return relativistic_generator_loss(*logits)


def asd_discriminator_loss(
    pair: StepPair,
    *,
    fake_score: FakeScore,
    discriminator: nn.Module,
    draw: Draw,
    times: MatchingConfig,
    penalty: float,
) -> Tensor:
    """The discriminator's loss on two rollouts without graph, with its penalties; the features are constants.

    Arguments as in `asd_student_loss`, and the weight of the penalties; `discriminator` may be a distributed wrapper:
    it is called once.
    """
    shape = tuple(pair.fewer.shape[1:])
    t = draw_times(draw, "asd_critic_time", times.fake_times, fake_score.denoiser.family)
    states = []
    for name, video in (("fewer", pair.fewer), ("more", pair.more)):
        x_t = add_noise(video, draw.noise(shape, f"asd_critic_noise_{name}"), t)
        moved = perturb_noised_input(x_t, draw.noise(shape, f"asd_moved_{name}"), scale=PERTURBATION)
        states += [x_t, moved]
    with torch.no_grad():
        joined = Condition.cat([pair.condition] * len(states))
        features = fake_score.denoiser.velocity_and_features(torch.cat(states), torch.cat([t] * len(states)), joined)[1]
    fewer_logits, fewer_moved, more_logits, more_moved = discriminator(features, pair.steps).chunk(len(states))
    slopes = gradient_penalties((fewer_logits, more_logits), (fewer_moved, more_moved))
    return relativistic_discriminator_loss(fewer_logits, more_logits) + penalty * slopes
