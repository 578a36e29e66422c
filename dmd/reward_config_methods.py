"""Settings of what Flash-DMD and Euphonium have beside the other methods. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewstep.core.config import OptimizerConfig

Judge = Literal["decoded", "latent"]


@dataclass(frozen=True, kw_only=True)
class PixelGanConfig:
    """Flash-DMD's discriminator on decoded pixels, for the student's late steps; needs data.latents (flash)."""

    weight: float = 0.0
    """Of the student's adversarial loss; 0 turns the discriminator off."""
    boundary: float = 0.75
    """Steps at times below this get the adversarial loss; those at or above it, with objective.matching_steps 'early',
    are the ones that are matched. Not in the paper's summary: ours."""
    backbone: str | None = None
    """Folder of the frozen feature network: the digits classifier, or a vision model of transformers (SAM, DINOv2,
    CLIP) with safetensors."""
    layers: tuple[int, ...] = ()
    """Feature maps that get a head, counted from 0 (hidden states of a vision model, 0 its patches); empty is all three
    of the digits classifier, and four evenly spaced ones of a vision model."""
    head_width: int = 128
    """Width of the heads."""
    optimizer: OptimizerConfig | None = None
    """Optimizer of the heads."""

    def __post_init__(self) -> None:
        if self.weight < 0 or not 0 < self.boundary < 1 or self.head_width < 1:
            raise ValueError(
                f"pixel_gan: weight {self.weight}, boundary {self.boundary}, head_width {self.head_width}; allowed are "
                "weight >= 0, 0 < boundary < 1, head_width >= 1"
            )
        if self.weight > 0 and (self.backbone is None or self.optimizer is None):
            raise ValueError(
                "pixel_gan.weight needs frozen features and trained heads; set pixel_gan.backbone to the folder of a "
                "classifier of the digits or of a vision model, and pixel_gan.optimizer"
            )


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Flash-DMD's pairs from one state."""

    dpo_beta: float = 1.0
    """Scale of the margin, a mean over elements."""
    updates_per_matching: int = 5
    """Preference updates for each update of distribution matching."""
    inject_decay: float = 1.0
    """What the fake score keeps when the student's weights are mixed in after a matching update; 1 mixes nothing."""
    judge: Judge = "decoded"
    """'decoded': a candidate is worth the reward of its finished sample; 'latent': what a latent reward model says of
    the noisy candidate itself, as in the paper, and nothing is decoded in these steps."""
    latent_reward: str | None = None
    """Folder that scripts/train_latent_reward.py wrote, for judge 'latent'."""

    def __post_init__(self) -> None:
        check_judge("preference", self.judge, self.latent_reward)


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """Euphonium's steering of rollouts."""

    guidance: float = 0.1
    """Shift of a step's mean per unit of time and of the process reward's gradient."""
    unit_gradient: bool = True
    """Divide each gradient by its norm."""
    weight: float = 1.0
    """Of the process advantages beside the outcome's."""
    distill_weight: float = 0.0
    """Of the regression of the unguided mean on the guided one, in units of the step's variance; 0 leaves it to the
    unguided log-probabilities, as released. Ours."""
    highest_time: float = 1.0
    """Steps that leave a time above this are not steered, and their process reward is 0."""
    judge: Judge = "decoded"
    """The process reward: 'decoded' is the reward of the x0 that is predicted at x_t, 'latent' that of a latent reward
    model at (x_t, t), as in the paper, which needs highest_time below 1."""
    latent_reward: str | None = None
    """Folder that scripts/train_latent_reward.py wrote, for judge 'latent'."""

    def __post_init__(self) -> None:
        check_judge("process", self.judge, self.latent_reward)
        if self.distill_weight < 0 or not 0 < self.highest_time <= 1:
            raise ValueError(
                f"process.distill_weight is {self.distill_weight}, process.highest_time {self.highest_time}; allowed "
                "are distill_weight >= 0 and 0 < highest_time <= 1"
            )
        if self.judge == "latent" and self.highest_time == 1:
            raise ValueError(
                "process.judge 'latent' reads a reward off noisy latents, and at t = 1 there is none: set "
                "process.highest_time below 1"
            )


def check_judge(section: str, judge: Judge, path: str | None) -> None:
    """Raise ValueError for a latent judge without its model, or a model that is not read."""
    if (judge == "latent") != (path is not None):
        raise ValueError(
            f"{section}.judge is {judge!r} and {section}.latent_reward {path!r}; a folder from "
            "scripts/train_latent_reward.py belongs to judge 'latent' and to no other"
        )
