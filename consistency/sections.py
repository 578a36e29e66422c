"""The sections of a consistency run's settings that are its method. No torch here, so that `--help` is quick.

Each class holds what its method reads and nothing else. A field that only one mode of its section reads must keep its
default in the other modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

# How a network is given the r of u(x, t, r); see core/two_time.py.
SecondTime = Literal["gate", "sum", "decoupled"]


def require_unset(section: Any, names: Sequence[str], reader: str) -> None:
    """Raise ValueError where one of these fields has another value than its default, though only `reader` reads it."""
    defaults = {field.name: field.default for field in fields(section)}
    for name in names:
        value = getattr(section, name)
        if value != defaults[name]:
            raise ValueError(
                f"{name}: given {value!r}, which only {reader} reads; leave {name} out, or choose {reader}"
            )


@dataclass(frozen=True, kw_only=True)
class TangentConfig:
    """How the derivative of the student along a path is taken."""

    tangent: Literal["jvp", "central"] = "jvp"
    """Forward mode, or central differences of two calls."""
    central_step: float = 0.005
    """Step of the central difference along the path, in radians (trigflow) or in time (others)."""
    check_tangent: bool = True
    """Compare the network's tangent with central differences before the first step, and refuse one that follows a
    wiggle in time rather than the path (jvp only)."""
    time_smoothing: float = 0.0
    """Standard deviation in time over which the sinusoids of the student's time are averaged before training, such as
    0.01: networks of 1000 t are not smooth between the times that they were trained at. 0 leaves them."""

    def __post_init__(self) -> None:
        if not 0 <= self.time_smoothing < 1:
            raise ValueError(f"time_smoothing: given {self.time_smoothing}, allowed is a number in [0, 1)")
        if not self.central_step > 0:
            raise ValueError(f"central_step: given {self.central_step}, allowed is a number > 0")
        if self.tangent == "jvp":
            require_unset(self, ["central_step"], "tangent 'central'")
        else:
            require_unset(self, ["check_tangent"], "tangent 'jvp'")


@dataclass(frozen=True, kw_only=True)
class ContinuousConfig(TangentConfig):
    """What both kinds of continuous-time consistency do with the derivative."""

    tangent_warmup: int = 0
    """Steps over which the derivative term grows from 0 to its full weight."""
    normalizer: float = 0.1
    """The c of g / (|g| + c)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tangent_warmup < 0 or not self.normalizer > 0:
            raise ValueError(
                f"tangent_warmup is {self.tangent_warmup} and normalizer {self.normalizer}; they must be >= 0 and > 0"
            )


@dataclass(frozen=True, kw_only=True)
class TimesConfig:
    """At which random times the student is trained."""

    time_mean: float = -0.8
    """Mean of log tan of the angle at which the student is trained, which is log(t / (1 - t))."""
    time_std: float = 1.6
    """Standard deviation of it."""
    max_time_share: float = 0.0
    """Share of samples trained at the student's first time instead, t = 1 for one step."""


def check_times(settings: TimesConfig) -> None:
    """Raise ValueError for times that there are not."""
    if not settings.time_std > 0 or not 0 <= settings.max_time_share <= 1:
        raise ValueError(
            f"time_std is {settings.time_std} and max_time_share {settings.max_time_share}; they must be > 0 and a "
            "share from 0 to 1"
        )


@dataclass(frozen=True, kw_only=True)
class ScmConfig(ContinuousConfig, TimesConfig):
    """Continuous-time consistency (sCM, arXiv:2410.11081): follows the derivative of the consistency function."""

    coordinates: Literal["trigflow", "rf"] = "trigflow"
    """TrigFlow's angle (arXiv:2410.11081), or rectified flow's own time (arXiv:2606.25473)."""
    learned_weight: bool = False
    """Fit a weight of each time beside the student: exp(w(t)) error - w(t), as the sCM paper does. It is trained with
    the student's optimizer settings."""
    warmup_of: Literal["drift", "state"] = "drift"
    """What tangent_warmup weighs in TrigFlow: the whole derivative term (sCM), or its part in the state alone, with
    sqrt(1 - r^2 sin^2) on the gap, as we read rCM's public code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_times(self)
        if self.warmup_of != "drift" and (self.coordinates != "trigflow" or self.tangent_warmup == 0):
            raise ValueError(
                f"warmup_of is {self.warmup_of!r} with coordinates {self.coordinates!r} and tangent_warmup "
                f"{self.tangent_warmup}, where nothing reads it: it is for a warm-up in TrigFlow, leave it out"
            )
        if self.max_time_share > 0 and self.coordinates == "trigflow":
            raise ValueError(
                f"max_time_share is {self.max_time_share}: it trains at t = 1, where TrigFlow's tangent is zero and "
                "teaches nothing; set coordinates to 'rf', or the share to 0"
            )


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The grid of the teacher that discrete consistency walks by one step."""

    grid_steps: int = 48
    """Steps of the teacher's grid."""
    grid_shift: float = 5.0
    """Time shift of that grid."""

    def __post_init__(self) -> None:
        if self.grid_steps < 2 or not self.grid_shift > 0:
            raise ValueError(
                f"grid_steps is {self.grid_steps} and grid_shift {self.grid_shift}; a grid has at least 2 steps and a "
                "positive shift"
            )


@dataclass(frozen=True, kw_only=True)
class DcmConfig(GridConfig):
    """Discrete consistency distillation (arXiv:2303.01469): follows one Euler step of the teacher."""


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Regression on pairs of noise and the teacher's sample (scripts/make_teacher_pairs.py), for a one-step student."""

    metric: Literal["latent", "lpips"] = "latent"
    """Squared distance of latents, or LPIPS of decoded pictures (DMD2)."""
    lpips: str | None = None
    """VGG-16's weights for LPIPS: a .safetensors file with torchvision's names, or a folder with model.safetensors."""
    mean_pooling: bool = False
    """Means where VGG-16 takes maxima (DMD2)."""
    autoencoder: str | None = None
    """Tiny autoencoder (AutoencoderTiny) that decodes, a folder or a hub id; empty is the teacher's own."""

    def __post_init__(self) -> None:
        if (self.metric == "lpips") != (self.lpips is not None):
            raise ValueError(
                f"metric is {self.metric!r} and lpips {self.lpips}; 'lpips' needs its weights, 'latent' none"
            )
        if self.metric == "latent":
            require_unset(self, ["mean_pooling", "autoencoder"], "metric 'lpips'")


@dataclass(frozen=True, kw_only=True)
class EctConfig(TimesConfig):
    """Consistency training without a teacher (ECT, arXiv:2406.14548): the same data and noise at a smaller time."""

    q: float = 2.0
    """Each stage brings r nearer to t by this factor."""
    stage_steps: int = 200
    """Steps of one stage."""
    largest_time: float = 0.99
    """Largest time, since the weights are stated for the finite ratio t / (1 - t)."""
    huber: float = 0.06
    """The c of the metric sqrt(|d|^2 + c^2) - c."""
    weight: Literal["snr", "gap"] = "snr"
    """Weight of a time: by the ratio of signal and noise, or one over the distance of sigma_t and sigma_r, as in ECT's
    public code."""

    def __post_init__(self) -> None:
        check_times(self)
        if self.stage_steps < 1 or not 0 < self.largest_time < 1 or not self.q > 1 or self.huber < 0:
            raise ValueError(
                f"stage_steps is {self.stage_steps}, largest_time {self.largest_time}, q {self.q} and huber "
                f"{self.huber}; they must be >= 1, in (0, 1), > 1 and >= 0"
            )


@dataclass(frozen=True, kw_only=True)
class FlowMapConfig(TangentConfig, TimesConfig):
    """What all networks of two times, u(x_t, t, r), are trained on."""

    pairs: Literal["ordered", "partition"] = "ordered"
    """Times (t, r): 'ordered' takes two logit-normal times and r = t for a share, 'partition' two shifted uniform ones,
    half of the samples with r = t and a quarter with r = 0 (AnyFlow)."""
    equal_share: float = 0.5
    """Share of r = t of 'ordered' (MeanFlow: 0.75, from scratch)."""
    pair_shift: float = 5.0
    """Time shift of 'partition'."""
    velocity: Literal["teacher", "data"] = "teacher"
    """What the flow map averages: the guided teacher's velocity, or that of the data, eps - x0, as in the papers, with
    teacher.guidance brought in by the student's own conditional and unconditional outputs."""
    condition_drop: float = 0.1
    """Share of samples without their prompt where the velocity of the data is guided."""

    # Fields that only the guided velocity of the data reads; subclasses add theirs.
    DATA_GUIDANCE: ClassVar[tuple[str, ...]] = ("condition_drop",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_times(self)
        if not 0 <= self.equal_share <= 1 or not 0 <= self.condition_drop < 1 or not self.pair_shift > 0:
            raise ValueError(
                f"equal_share is {self.equal_share}, condition_drop {self.condition_drop} and pair_shift "
                f"{self.pair_shift}; equal_share must lie in [0, 1], condition_drop in [0, 1), pair_shift must be > 0"
            )
        if self.pairs == "ordered":
            require_unset(self, ["pair_shift"], "pairs 'partition'")
        else:
            require_unset(self, ["time_mean", "time_std", "max_time_share", "equal_share"], "pairs 'ordered'")
        if self.velocity == "teacher":
            require_unset(self, self.DATA_GUIDANCE, "velocity 'data'")


@dataclass(frozen=True, kw_only=True)
class FoldedGuidanceConfig(FlowMapConfig):
    """Flow maps whose velocity of the data is guided as in MeanFlow."""

    DATA_GUIDANCE: ClassVar[tuple[str, ...]] = ("condition_drop", "kappa", "guidance_interval")

    kappa: float = 0.0
    """Share of the student's own conditional output in the guided velocity of the data; the data enter with
    teacher.guidance (1 - kappa)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times in which the velocity of the data is guided."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kappa < 1:
            raise ValueError(f"kappa: given {self.kappa}, allowed is a number in [0, 1)")
        if not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval: given {self.guidance_interval}, allowed is 0 <= first < second <= 1")


def check_weight(power: float, constant: float) -> None:
    """Raise ValueError for a weight (error + constant)^-power that would not be finite."""
    if power < 0 or not constant > 0:
        raise ValueError(f"power is {power} and constant {constant}; they must be >= 0 and > 0")


@dataclass(frozen=True, kw_only=True)
class MeanflowLossConfig(FoldedGuidanceConfig):
    """What MeanFlow's loss reads, whatever network is trained with it."""

    power: float = 1.0
    """The p of the weight (error + c)^-p."""
    constant: float = 1e-2
    """The c of that weight; the error is summed over a sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(self.power, self.constant)


@dataclass(frozen=True, kw_only=True)
class MeanflowConfig(MeanflowLossConfig):
    """MeanFlow (arXiv:2505.13447): u = v - (t - r) du/dt."""

    second_time: Literal["gate", "sum"] = "sum"
    """How the network is given r: a second time embedding mixed into the first ('gate'), or one of t - r added to it
    ('sum', MeanFlow)."""


@dataclass(frozen=True, kw_only=True)
class ImfConfig(FlowMapConfig):
    """Improved MeanFlow: the derivative runs along the model's own velocity, and the target is free of the network."""

    second_time: Literal["gate", "sum"] = "sum"
    """How the network is given r: a second time embedding mixed into the first ('gate'), or one of t - r added to it
    ('sum', MeanFlow)."""
    power: float = 1.0
    """The p of the weight (error + c)^-p."""
    constant: float = 1e-2
    """The c of that weight; the error is summed over a sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(self.power, self.constant)


@dataclass(frozen=True, kw_only=True)
class AlphaflowConfig(FoldedGuidanceConfig):
    """AlphaFlow: a schedule from trajectory flow matching (alpha = 1) to MeanFlow (alpha = 0)."""

    second_time: Literal["gate", "sum"] = "sum"
    """How the network is given r: a second time embedding mixed into the first ('gate'), or one of t - r added to it
    ('sum', MeanFlow)."""
    alpha_start: float = 0.0
    """Share of the run at which alpha begins to leave 1."""
    alpha_end: float = 1.0
    """Share of the run at which it has reached 0; it is cut to 0 before, at 0.71 of the way, where the derivative
    form begins."""
    constant: float = 1e-2
    """The c of the weights alpha / (error + c) and, in the derivative form, (error + c)^-p."""
    power: float = 1.0
    """The p of the latter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(self.power, self.constant)
        if not self.alpha_start < self.alpha_end:
            raise ValueError(f"alpha_start {self.alpha_start} must be below alpha_end {self.alpha_end}")


@dataclass(frozen=True, kw_only=True)
class DmfConfig(FoldedGuidanceConfig):
    """Decoupled MeanFlow: the late blocks of the network see r, which needs no new weights and has no export."""

    second_time: ClassVar[SecondTime] = "decoupled"

    constant: float = 1e-2
    """The c of the loss log(error + c)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(0.0, self.constant)


@dataclass(frozen=True, kw_only=True)
class AnyflowConfig(FlowMapConfig):
    """AnyFlow (arXiv:2605.13724): one student for any number of steps; with `matching` also its second stage."""

    second_time: Literal["gate", "sum"] = "gate"
    """How the network is given r: a second time embedding mixed into the first ('gate', AnyFlow), or one of t - r added
    to it ('sum')."""
    rollout_steps: tuple[int, ...] = (2, 4, 8, 16, 50)
    """Numbers of steps of the rollouts that are imitated for `matching`, by three jumps each."""
    rollout_learns: Literal["segment", "all"] = "segment"
    """Which of the three jumps the student learns from: the one in the middle, or all of them, as in the public code:
    up to three graphs at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.rollout_steps) == 0 or min(self.rollout_steps) < 1:
            raise ValueError(f"rollout_steps is {self.rollout_steps}; give at least one number of steps, from 1 on")
