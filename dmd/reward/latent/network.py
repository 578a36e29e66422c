"""A small network that scores noisy latents, and how it is saved: the latent reward model of Flash-DMD and Euphonium.

Legend: B batch; x_t [B, C, h, w]; t [B] in [0, 1]; scores [B], higher is better.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.evaluation.scorers.scorer import ScorerCard
from fewstep.evaluation.scorers.weights import load_strictly, read_weights, require_files

WEIGHTS_FILE, RECORD_FILE = "latent_reward.safetensors", "latent_reward.json"
SCORER = "the latent reward model"
TIME_FEATURES, GROUPS = 32, 8


class LatentScorer(Protocol):
    """Noisy latents at t, and what they are of, to scores; the card says range, direction and differentiability.

    The score of a sample does not depend on the others of its batch.
    """

    @property
    def card(self) -> ScorerCard: ...

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor: ...


def latent_scores(
    scorer: LatentScorer, x_t: Tensor, t: Tensor, condition: Condition, *, gradient: bool = False
) -> Tensor:
    """Checked scores [B] in fp32 (fp64 stays), signed so that higher is better; with `gradient` with graph to x_t.

    Raises:
        ValueError: batch sizes differ, a gradient is asked of a scorer that has none, or an answer is of another shape,
            not finite, or outside the range of its card.
    """
    card, count = scorer.card, len(x_t)
    if t.shape != (count,) or condition.batch_size != count:
        raise ValueError(f"scorer {card.name}: {count} latents, times {tuple(t.shape)}, {condition.batch_size} prompts")
    if gradient and not card.differentiable:
        raise ValueError(f"scorer {card.name} is not differentiable; it can judge, but not steer")
    with torch.set_grad_enabled(gradient):
        values = scorer(x_t, t, condition)
    if values.shape != (count,):
        raise ValueError(f"scorer {card.name} answered {tuple(values.shape)} for {count} samples; expected ({count},)")
    values = values if values.dtype == torch.float64 else values.float()
    held = values.detach()
    if not bool((torch.isfinite(held) & (held >= card.low) & (held <= card.high)).all()):
        raise ValueError(f"scorer {card.name}: a score is not a number from {card.low} to {card.high}: {held.tolist()}")
    return values if card.higher_is_better else -values


@dataclass(frozen=True)
class LatentRewardShape:
    """Sizes of the network: latent channels, width of `prompt_vector`, channels of the layers, number of blocks.

    Scores are mean + std times what the network says: the reward that it was fitted to, or (0, 1) for a ranking.
    Raises ValueError for a size below 1, a width that is no multiple of 8, or a std that is not positive.
    """

    channels: int
    prompt_width: int
    width: int = 64
    blocks: int = 3
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if min(self.channels, self.prompt_width, self.blocks) < 1 or self.width < 1 or self.width % GROUPS:
            raise ValueError(f"{self}: sizes must be at least 1, and width a multiple of {GROUPS}")
        if not self.std > 0:
            raise ValueError(f"the std of a latent reward is {self.std}; it must be above 0")


def prompt_vector(condition: Condition) -> Tensor:
    """What the network sees of a prompt, [B, D] or [B, D + P]: the mean of its tokens, and the pooled embedding.

    Padding does not count, and a token that stands for several counts as often.
    """
    tokens, weights = condition.text.float(), None
    if condition.token_mask is not None:
        weights = condition.token_mask.to(tokens)
    elif condition.token_counts is not None:
        weights = condition.token_counts.to(tokens)[None].expand(tokens.shape[:2])
    if weights is None:
        mean = tokens.mean(dim=1)
    else:
        mean = (tokens * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1.0)
    return mean if condition.pooled is None else torch.cat([mean, condition.pooled.float()], dim=1)


class LatentRewardBlock(nn.Module):
    """Two convolutions with a residual, scaled and shifted by time and prompt: [B, C, h, w] to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.middle = nn.GroupNorm(GROUPS, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        inner = self.first(F.silu(self.norm(x) * (1 + scale) + shift))
        return x + self.second(F.silu(self.middle(inner)))


class LatentReward(nn.Module):
    """A convolutional network over noisy latents, halved between its blocks, which sees time and prompt.

    Ours: neither paper's model is described. At t = 1 a state says nothing of its sample, so its score there is at best
    the mean reward of the prompt.

    Args:
        shape: sizes.
        seed: decides the initial weights.
        name: for messages and logs.
        weights: where it was loaded from.
    """

    def __init__(
        self, shape: LatentRewardShape, *, seed: int = 0, name: str = "latent_reward", weights: str | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self.card = ScorerCard(name, differentiable=True, weights=weights)
        width = shape.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(shape.channels, width, 3, padding=1)
            self.time = nn.Linear(TIME_FEATURES, width)
            self.prompt = nn.Sequential(nn.LayerNorm(shape.prompt_width), nn.Linear(shape.prompt_width, width))
            self.embed = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.blocks = nn.ModuleList(LatentRewardBlock(width) for _ in range(shape.blocks))
            self.norm = nn.GroupNorm(GROUPS, width)
            self.score = nn.Linear(width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        frequencies = torch.exp(torch.linspace(0.0, math.log(100.0), TIME_FEATURES // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Scores [B]. Raises ValueError for latents or prompts of other widths."""
        self.require_fit(x_t.shape[1], condition)
        dtype = self.stem.weight.dtype
        assert isinstance(self.frequencies, Tensor)
        angles = t.to(dtype)[:, None] * self.frequencies.to(dtype)
        embedding = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        embedding = self.embed(embedding + self.prompt(prompt_vector(condition).to(dtype)))
        x = self.stem(x_t.to(dtype))
        for number, block in enumerate(self.blocks):
            if number > 0 and min(x.shape[-2:]) > 1:
                x = F.avg_pool2d(x, 2)
            x = block(x, embedding)
        pooled = F.silu(self.norm(x)).mean(dim=(2, 3))
        return self.shape.mean + self.shape.std * self.score(pooled)[:, 0]

    def require_fit(self, channels: int, condition: Condition) -> None:
        """Raise ValueError unless latents of these channels and this condition are those it was made for."""
        width = condition.text.shape[2] + (0 if condition.pooled is None else condition.pooled.shape[1])
        if (channels, width) != (self.shape.channels, self.shape.prompt_width):
            raise ValueError(
                f"the latent reward takes {self.shape.channels} latent channels and prompts of width "
                f"{self.shape.prompt_width}, given {channels} and {width}; train one for this teacher"
            )


@dataclass(frozen=True)
class Agreement:
    """How a latent reward at time t agrees with the scorer on samples that it was not trained on.

    `correlation` is Pearson's over all of them, `pair_accuracy` the share of pairs of a prompt that are ordered alike.
    """

    t: float
    correlation: float
    pair_accuracy: float


@dataclass(frozen=True)
class LatentRewardRecord:
    """How a latent reward was made: scorers with their weights, the objective, samples, steps, and what it reached."""

    scorers: tuple[str, ...]
    objective: str
    samples: int
    held_out: int
    steps: int
    seed: int
    agreement: tuple[Agreement, ...]


def save_latent_reward(model: LatentReward, record: LatentRewardRecord, folder: str | Path) -> None:
    """Write weights (safetensors), and sizes and record (JSON), into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS_FILE)
    text = json.dumps({"shape": asdict(model.shape), "record": asdict(record)}, indent=1)
    (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")


def load_latent_reward(folder: str | Path, *, device: torch.device | str = "cpu") -> LatentReward:
    """The frozen model in a folder. Raises ValueError that names what is missing or does not fit."""
    folder = Path(folder)
    tensors = read_weights(folder, scorer=SCORER)
    require_files(folder, (RECORD_FILE,), scorer=SCORER)
    shape = LatentRewardShape(**json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["shape"])
    model = LatentReward(shape, weights=str(folder))
    load_strictly(model, tensors, scorer=SCORER)
    return model.requires_grad_(False).eval().to(device)


def with_scale(shape: LatentRewardShape, rewards: Tensor) -> LatentRewardShape:
    """The sizes with mean and standard deviation of the rewards that are regressed on.

    Raises ValueError for rewards that do not vary.
    """
    std = rewards.double().std().item()
    if not std > 0:
        raise ValueError("all rewards are equal, so there is nothing to learn; give other samples or another scorer")
    return replace(shape, mean=rewards.double().mean().item(), std=std)
