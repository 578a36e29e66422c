"""One section per reward method: its dataclass has the settings that the method reads, and no others.

No torch here, so that `--help` is quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from fewstep.core.config import OptimizerConfig

CPS_ETA, SDE_NOISE = 0.9, 0.7


@dataclass(frozen=True, kw_only=True)
class TransitionConfig:
    """How the student's random steps are drawn."""

    transition: Literal["sampler", "cps", "flow_sde", "dance_sde"] = "sampler"
    """'sampler' is the student's own re-noising, the others are those of the papers."""
    eta: float = CPS_ETA
    """Share of fresh noise of 'cps'."""
    noise_scale: float = SDE_NOISE
    """Diffusion of 'flow_sde' (Flow-GRPO 0.7) and 'dance_sde' (0.3)."""

    def __post_init__(self) -> None:
        if self.eta != CPS_ETA and self.transition != "cps":
            raise ValueError(f"eta is {self.eta} and transition {self.transition!r}: only 'cps' reads it; leave it out")
        if self.noise_scale != SDE_NOISE and self.transition not in ("flow_sde", "dance_sde"):
            raise ValueError(
                f"noise_scale is {self.noise_scale} and transition {self.transition!r}: only 'flow_sde' and "
                "'dance_sde' read it; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class ChainConfig(TransitionConfig):
    """Policy gradients on the student's random steps."""

    policy_weight: float = 1.0
    """Of the policy gradient."""
    trained_steps: int = 0
    """Random steps that get the policy gradient in each step, the others share their noise in a group; 0 is all."""
    log_prob: Literal["normal", "distance"] = "normal"
    """The transition's log-probability, or RTDMD's squared distance."""
    clip_range: float = 1e-4
    """Of the ratio, for log-probabilities averaged over elements."""
    advantage_clip: float = 5.0
    """Advantages are clamped to plus or minus this."""
    kl_weight: float = 0.0
    """Of the KL to the student at the start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(policy_weight=self.policy_weight, clip_range=self.clip_range)
        require_positive(advantage_clip=self.advantage_clip)
        require_not_negative(trained_steps=self.trained_steps, kl_weight=self.kl_weight)


@dataclass(frozen=True, kw_only=True)
class DirectConfig:
    """The reward's own gradient on the student's last step."""

    weight: float
    """Of this term."""
    scorers: tuple[str, ...] = ()
    """Names of those of reward.scorers that it follows, which must be differentiable; empty is all."""
    margin: float = 3.0
    """Of the hinge relu(margin - reward)."""

    def __post_init__(self) -> None:
        require_positive(weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class TiltedTeacherConfig:
    """The reward's own gradient, read where the scores are compared: the teacher that is matched is tilted (ours)."""

    tilt_scale: float
    """Lambda of e^(lambda reward), the density that the teacher's is multiplied by; exact for a linear reward."""
    scorers: tuple[str, ...] = ()
    """Names of those of reward.scorers that it follows, which must be differentiable; empty is all."""

    def __post_init__(self) -> None:
        require_positive(tilt_scale=self.tilt_scale)
        if self.tilt_scale == math.inf:
            raise ValueError("tilt_scale is inf; it must be finite")


@dataclass(frozen=True, kw_only=True)
class RtdmdConfig(ChainConfig):
    """RTDMD (arXiv:2605.26108): matching, policy gradients on random steps, the reward's gradient on the last."""

    direct: DirectConfig | None = None
    """The reward's own gradient on the last step; leave it out for none."""
    tilted_teacher: TiltedTeacherConfig | None = None
    """In place of direct, a teacher that the reward tilts; leave it out for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direct is not None and self.tilted_teacher is not None:
            raise ValueError("direct and tilted_teacher are two strengths of one reward: leave one of them out")


@dataclass(frozen=True, kw_only=True)
class GndmConfig(ChainConfig):
    """GNDMR (arXiv:2603.28460): matching and reward in one advantage, beside matching normalised in groups."""

    direct: DirectConfig | None = None
    """The reward's own gradient on the last step; leave it out for none."""
    tilt_scale: float = 2.0
    """Factor of the reward beside the matching reward."""
    matching_reward_draws: int = 4
    """Times and noises per sample from which the matching reward is estimated."""
    matching_reward_reduction: Literal["sum", "mean"] = "sum"
    """'sum' is a log-density ratio in nats, whose estimate is noisy; 'mean' divides it by the number of elements, and
    the tilt is tilt_scale times that number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(tilt_scale=self.tilt_scale, matching_reward_draws=self.matching_reward_draws)


@dataclass(frozen=True, kw_only=True)
class RedmdConfig:
    """Re-DMD (arXiv:2512.04678): matching weighted by exp(tilt_scale reward)."""

    tilt_scale: float = 2.0
    """Factor of the reward."""
    max_weight: float = 5.0
    """Largest weight of a rollout; their mean is 1."""
    saliency: bool = False
    """Weigh each element by how strongly it moves the rewards, too (Stream-R1)."""

    def __post_init__(self) -> None:
        require_not_negative(tilt_scale=self.tilt_scale)
        if self.max_weight < 1:
            raise ValueError(f"max_weight is {self.max_weight}; it must be at least 1, the mean weight")


@dataclass(frozen=True, kw_only=True)
class DecayConfig:
    """min(start + slope max(updates - delay, 0), ceiling): how much of a snapshot stays at each step."""

    start: float = 0.0
    """At the first update."""
    delay: int = 0
    """Updates before it grows."""
    slope: float = 0.001
    """Growth per update."""
    ceiling: float = 0.5
    """Largest decay."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.ceiling <= 1 or self.delay < 0 or self.slope < 0:
            raise ValueError(f"{self}: delay and slope must not be negative, and 0 <= start <= ceiling <= 1")


@dataclass(frozen=True, kw_only=True)
class NftConfig:
    """DiffusionNFT (arXiv:2509.16117): regression with a sign on newly noised samples of an older policy."""

    policy_weight: float = 1.0
    """Of this loss."""
    nft_beta: float = 1.0
    """Strength of the interpolation."""
    max_advantage: float = 5.0
    """Advantage at which a sample counts as certain."""
    adaptive: bool = False
    """Divide by the mean absolute error, as released for many-step models; it can run away on few steps."""
    kl_weight: float = 0.0
    """Of the distance to the student at the start."""
    old: DecayConfig = field(default_factory=DecayConfig)
    """The older policy, which is sampled from and compared with."""

    def __post_init__(self) -> None:
        require_positive(policy_weight=self.policy_weight, nft_beta=self.nft_beta, max_advantage=self.max_advantage)
        require_not_negative(kl_weight=self.kl_weight)


@dataclass(frozen=True, kw_only=True)
class CrdConfig:
    """CRD (arXiv:2603.14128): the implicit reward of two policies fits the reward, centred in each prompt."""

    policy_weight: float = 1.0
    """Of this loss."""
    crd_beta: float = 1.0
    """Temperature."""
    max_advantage: float = 5.0
    """Advantage at which a sample counts as certain."""
    adaptive: bool = False
    """Divide by the mean absolute error, as released for many-step models; it can run away on few steps."""
    kl_weight: float = 0.0
    """Of the distance to the student at the start, for the best samples."""
    lowest_kl_weight: float = 0.0
    """The same for the worst samples; at most kl_weight."""
    old: DecayConfig = field(default_factory=DecayConfig)
    """The older policy in the loss."""
    sampling: DecayConfig = field(default_factory=DecayConfig)
    """The policy that is sampled from."""

    def __post_init__(self) -> None:
        require_positive(policy_weight=self.policy_weight, crd_beta=self.crd_beta, max_advantage=self.max_advantage)
        if not 0 <= self.lowest_kl_weight <= self.kl_weight:
            raise ValueError(
                f"lowest_kl_weight {self.lowest_kl_weight} and kl_weight {self.kl_weight} must satisfy "
                "0 <= lowest_kl_weight <= kl_weight"
            )


@dataclass(frozen=True, kw_only=True)
class PixelGanConfig:
    """Flash-DMD's discriminator on decoded pixels, for the student's late steps."""

    latents: str
    """Folder of real latents (scripts/encode_latents.py)."""
    weight: float
    """Of the student's adversarial loss."""
    boundary: float = 0.75
    """Steps at times below this get the adversarial loss; those at or above it, with matching.steps 'early', are the
    ones that are matched. Not in the paper's summary: ours."""
    backbone: str
    """Folder of the frozen feature network: the digits classifier, or a vision model of transformers (SAM, DINOv2,
    CLIP) with safetensors."""
    layers: tuple[int, ...] = ()
    """Feature maps that get a head, counted from 0 (hidden states of a vision model, 0 its patches); empty is all three
    of the digits classifier, and four evenly spaced ones of a vision model."""
    head_width: int = 128
    """Width of the heads."""
    optimizer: OptimizerConfig
    """Optimizer of the heads."""

    def __post_init__(self) -> None:
        if not self.weight > 0 or not 0 < self.boundary < 1 or self.head_width < 1:
            raise ValueError(
                f"weight {self.weight}, boundary {self.boundary}, head_width {self.head_width}; allowed are "
                "weight > 0, 0 < boundary < 1, head_width >= 1; leave pixel_gan out for no discriminator"
            )


@dataclass(frozen=True, kw_only=True)
class FlashConfig(TransitionConfig):
    """Flash-DMD (arXiv:2511.20549): matching, and between its steps preferences over candidates of one state."""

    policy_weight: float = 1.0
    """Of the preferences."""
    dpo_beta: float = 1.0
    """Scale of the margin, a mean over elements."""
    updates_per_matching: int = 5
    """Preference updates for each update of distribution matching."""
    inject_decay: float = 1.0
    """What the fake score keeps when the student's weights are mixed in after a matching update; 1 mixes nothing."""
    latent_reward: str | None = None
    """Folder that scripts/train_latent_reward.py wrote: candidates are judged by what it says of their noisy latents,
    as in the paper, and nothing is decoded in these steps. Empty: by the reward of their finished samples."""
    pixel_gan: PixelGanConfig | None = None
    """A discriminator on decoded pixels for late steps; leave it out for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            policy_weight=self.policy_weight, dpo_beta=self.dpo_beta, updates_per_matching=self.updates_per_matching
        )
        if not 0 <= self.inject_decay <= 1:
            raise ValueError(f"inject_decay is {self.inject_decay}; allowed is a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class EuphoniumConfig(ChainConfig):
    """Euphonium (arXiv:2602.04928): rollouts steered by the gradient of a process reward, and advantages of both."""

    guidance: float = 0.1
    """Shift of a step's mean per unit of time and of the process reward's gradient."""
    unit_gradient: bool = True
    """Divide each gradient by its norm."""
    process_weight: float = 1.0
    """Of the process advantages beside the outcome's."""
    distill_weight: float = 0.0
    """Of the regression of the unguided mean on the guided one, in units of the step's variance; 0 leaves it to the
    unguided log-probabilities, as released. Ours."""
    highest_time: float = 1.0
    """Steps that leave a time above this are not steered, and their process reward is 0."""
    latent_reward: str | None = None
    """Folder that scripts/train_latent_reward.py wrote: its reward at (x_t, t) is the process reward, as in the paper,
    which needs highest_time below 1. Empty: the reward of the x0 that is predicted at x_t."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(distill_weight=self.distill_weight)
        if not 0 < self.highest_time <= 1:
            raise ValueError(f"highest_time is {self.highest_time}; allowed is a number above 0, at most 1")
        if self.latent_reward is not None and self.highest_time == 1:
            raise ValueError(
                "latent_reward reads a reward off noisy latents, and at t = 1 there is none: set highest_time below 1"
            )


@dataclass(frozen=True, kw_only=True)
class FlowGrpoConfig(ChainConfig):
    """Flow-GRPO (arXiv:2505.05470): clipped policy gradients on random steps, with a KL to the start."""


MethodConfig: TypeAlias = (
    RtdmdConfig | GndmConfig | RedmdConfig | NftConfig | CrdConfig | FlashConfig | EuphoniumConfig | FlowGrpoConfig
)


def require_positive(**values: float) -> None:
    """Raise ValueError naming the value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")


def require_not_negative(**values: float) -> None:
    """Raise ValueError naming the value that is below 0."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must not be negative")
