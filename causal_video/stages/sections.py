"""The sections of a configuration that causal stages and rewards of streams are made of. No torch here.

Each stage has a section of its own, whose fields are what that stage reads and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.settings import SecondTime
from fewstep.consistency.sections import FlowMapConfig, MeanflowLossConfig
from fewstep.core.settings import DataConfig, StudentConfig
from fewstep.evaluation.scorers.settings import ScorerListConfig

FrameReduction: TypeAlias = Literal["mean", "sum"]
DEFAULT_STEPS = (4, 2)


def require_default(section: Any, name: str, reason: str) -> None:
    """Raise ValueError where a field that nothing would read is given a value of its own."""
    default = type(section).__dataclass_fields__[name].default
    if getattr(section, name) != default:
        raise ValueError(f"{name}: given {getattr(section, name)!r}, and {reason}: leave it out")


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(DataConfig):
    """Prompts, and the size of the videos."""

    sample_count: int = 6
    """Prompts of the contact sheet: the first of the file, with fixed seeds."""

    def __post_init__(self) -> None:
        if self.sample_count < 1:
            raise ValueError(f"sample_count is {self.sample_count}; the contact sheet needs a prompt")


@dataclass(frozen=True, kw_only=True)
class CausalDataConfig(PromptsConfig):
    """What a stage reads: prompts, and videos where it has a use for them."""

    latents: str | None = None
    """Folder of video latents with captions (scripts/encode_videos.py), for the stages that learn from videos; in
    self_forcing for given first frames and controls."""
    controls: str | None = None
    """File of what the network gets for each frame of data.latents beside its caption, such as actions or features of
    sound (`FrameControls`, safetensors); the student gets an input channel for each."""
    control_guidance: float | None = None
    """Guidance on the controls beside that on the text, of a causal teacher, of real scores and of many-step samples; a
    third call, without controls. Empty: both sides of the text's guidance have the controls."""
    image_share: float = 0.0
    """Share of steps in which the first latent frame is given, from data.latents with their captions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.image_share <= 1:
            raise ValueError(f"image_share is {self.image_share}; it is a share from 0 to 1")
        if self.controls is not None and self.latents is None:
            raise ValueError("controls without data.latents: they are rows for the videos of that folder")
        if self.control_guidance is not None and (self.controls is None or not math.isfinite(self.control_guidance)):
            raise ValueError(f"control_guidance is {self.control_guidance}; it is a finite number beside data.controls")


@dataclass(frozen=True, kw_only=True)
class CausalStudentConfig(StudentConfig):
    """The causal generator."""

    layout: tuple[int, ...]
    """Latent frames of each chunk; their sum is the length of the training videos. Streams repeat the last one."""
    policy: CachePolicy = field(default_factory=CachePolicy)
    """What a chunk sees of earlier ones, and how it is kept."""
    steps: tuple[int, ...] = DEFAULT_STEPS
    """Network calls of each chunk; later chunks repeat the last number. More for the first chunk than for others is
    the first-frame enhancement of ASD."""
    shift: float = 5.0
    """Time shift of the step grids."""
    times: tuple[tuple[float, ...], ...] | None = None
    """Times of each chunk in place of the grids of steps and shift, such as [[1, 0.9375, 0.83, 0.625], [1, 0.625]]."""
    second_time: SecondTime = "none"
    """How the network is told where a step ends, in tf_meanflow, tf_anyflow and what goes on from them: a second time
    embedding mixed into the first ('gate', AnyFlow), or one of t - r added to it ('sum', MeanFlow)."""

    controls_in: Literal["channels", "layers"] = "channels"
    """How the network is given data.controls: as input channels, or added to the tokens of every layer (LiveTalk)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            layout = ChunkLayout(self.layout)
        except ValueError as error:
            raise ValueError(f"layout: {error}") from error
        try:
            self.policy.chunk_window(layout)
        except ValueError as error:
            raise ValueError(f"policy: {error}") from error
        if self.second_time != "none" and self.policy.noisy_from is not None:
            raise ValueError(
                f"policy.noisy_from {self.policy.noisy_from} with second_time {self.second_time!r}: flow maps have "
                "clean context; leave noisy_from out"
            )
        if len(self.steps) == 0 or min(self.steps) < 1:
            raise ValueError(f"steps is {list(self.steps)}; give a number of calls, from 1 on, for each chunk")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; it must be positive")
        if self.times is not None:
            if self.shift != type(self).shift:
                raise ValueError(f"shift is {self.shift} beside times, which say all steps: leave shift out")
            if len(self.times) == 0 or min(map(len, self.times)) == 0:
                raise ValueError("times is empty; give the times of at least one chunk, or leave it out")
            require_default(self, "steps", "times says all steps")

    @property
    def longest_steps(self) -> int:
        """Network calls of the chunk that has the most."""
        return max(map(len, self.times)) if self.times is not None else max(self.steps)


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Flow matching of a causal model of many steps; what teacher and diffusion forcing have in common."""

    frames: FrameReduction = "mean"
    """How the losses of latent frames are taken together, each being a mean over its numbers."""
    shift: float = 5.0
    """Time shift of the uniform times."""
    weight: Literal["bell", "none"] = "bell"
    """Weight of a time: a bell around 1/2 as in Causal-rCM's teacher forcing, or none as in its diffusion forcing."""
    condition_drop: float = 0.1
    """Share of samples without their caption, for guidance later."""
    control_drop: float = 0.0
    """Share of samples whose data.controls are zeros, for data.control_guidance later."""

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift is {self.shift}; it must be positive")
        require_share("condition_drop", self.condition_drop)
        require_share("control_drop", self.control_drop)


@dataclass(frozen=True, kw_only=True)
class TeacherForcingConfig(FlowConfig):
    """Flow matching on clean earlier chunks (arXiv:2606.25473)."""

    times: Literal["sample", "chunk"] = "sample"
    """One time for all chunks of a sample (Causal-rCM), or one for each chunk (Causal-Forcing)."""
    context_noise: float = 0.0
    """Largest time to which the clean context is noised; the network is given that time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("context_noise", self.context_noise)


@dataclass(frozen=True, kw_only=True)
class DiffusionForcingConfig(FlowConfig):
    """Flow matching with a time of its own for each chunk, on context as noisy as it is (arXiv:2407.01392)."""

    times: Literal["chunk", "same", "fopp"] = "chunk"
    """One time for each chunk, drawn apart; one for all of them; or times that never fall from a chunk to the next
    (frame-oriented probability propagation, arXiv:2503.07418)."""


@dataclass(frozen=True, kw_only=True)
class TfDcmConfig:
    """Discrete consistency on clean context, along the path of the causal teacher (arXiv:2606.25473)."""

    frames: FrameReduction = "mean"
    """How the losses of latent frames are taken together, each being a mean over its numbers."""
    context_noise: float = 0.0
    """Largest time to which the clean context is noised; the network is given that time."""
    grid_steps: int = 48
    """Steps of the grid that the teacher walks by one."""
    grid_shift: float = 3.0
    """Time shift of that grid."""
    target: Literal["student", "ema"] = "student"
    """What the prediction is drawn to: the student's own one step further (Causal-rCM), or that of its average
    (Causal-Forcing++)."""
    skip: float | None = None
    """Times are uniform before the shift, with a step of this length to the next, in place of those of a grid."""
    noisy_context: bool = False
    """Show the student earlier chunks as student.policy.noisy_from will, noised to the last time of their schedule; the
    causal teacher sees them clean (Causal-rCM)."""

    def __post_init__(self) -> None:
        require_share("context_noise", self.context_noise)
        if self.skip is not None:
            if not 0 < self.skip < 1:
                raise ValueError(f"skip is {self.skip}; it is a length of time between 0 and 1, such as 0.02")
            require_default(self, "grid_steps", f"skip {self.skip} takes its place")
        if self.grid_steps < 2:
            raise ValueError(f"grid_steps is {self.grid_steps}; it must be at least 2")
        if not self.grid_shift > 0:
            raise ValueError(f"grid_shift is {self.grid_shift}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class TfScmConfig:
    """Continuous-time consistency on clean context, along the path of the causal teacher (arXiv:2606.25473)."""

    context_noise: float = 0.0
    """Largest time to which the clean context is noised; the network is given that time."""
    time_mean: float = -0.8
    """Mean of log(t / (1 - t))."""
    time_std: float = 1.6
    """Standard deviation of it."""
    max_time_share: float = 0.0
    """Share of samples that are trained at t = 1 instead, where generation begins (ours)."""
    tangent: Literal["jvp", "central", "discrete"] = "jvp"
    """How to differentiate along the teacher's path: forward mode, central differences of two calls, or the difference
    of the consistency function over one step of the teacher (ours for the tf_dscm of Causal-rCM's code)."""
    central_step: float = 0.005
    """Step of the difference in time; belongs to tangent 'central' and 'discrete'."""
    check_tangent: bool = True
    """Compare the network's tangent with central differences before the first step, and refuse one that follows a
    wiggle in time rather than the path; belongs to tangent 'jvp'."""
    time_smoothing: float = 0.0
    """Standard deviation in time over which the sinusoids of the student's time are averaged before training, such as
    0.01: Wan is not smooth between the times that it was trained at. 0 leaves them."""
    tangent_warmup: int = 0
    """Steps over which the derivative term grows from 0 to its full weight."""
    normalizer: float = 0.1
    """The c of g / (|g| + c)."""
    noisy_context: bool = False
    """As in tf_dcm."""

    def __post_init__(self) -> None:
        require_share("context_noise", self.context_noise)
        for name in ("time_std", "central_step", "normalizer"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.time_smoothing < 1:
            raise ValueError(f"time_smoothing is {self.time_smoothing}; it must be in [0, 1), such as 0.01")
        if self.tangent_warmup < 0:
            raise ValueError(f"tangent_warmup is {self.tangent_warmup}; it must be 0 or more")
        if not 0 <= self.max_time_share <= 1:
            raise ValueError(f"max_time_share is {self.max_time_share}; it is a share from 0 to 1")
        unread = "central_step" if self.tangent == "jvp" else "check_tangent"
        require_default(self, unread, f"tangent is {self.tangent!r}")
        if self.tangent == "discrete" and self.central_step >= 1:
            raise ValueError(f"central_step is {self.central_step}; a step of the teacher is shorter than 1")


@dataclass(frozen=True, kw_only=True)
class TfMeanflowConfig(MeanflowLossConfig):
    """MeanFlow on clean context: the average velocity from t down to r, by u = v - (t - r) du/dt."""

    context_noise: float = 0.0
    """Largest time to which the clean context is noised; the network is given that time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("context_noise", self.context_noise)


@dataclass(frozen=True, kw_only=True)
class TfAnyflowConfig(FlowMapConfig):
    """AnyFlow's first stage on clean context: one student for any number of steps (arXiv:2605.13724)."""

    pairs: Literal["partition"] = "partition"
    """Times (t, r): two shifted uniform ones, half of the samples with r = t and a quarter with r = 0 (AnyFlow)."""
    context_noise: float = 0.0
    """Largest time to which the clean context is noised; the network is given that time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("context_noise", self.context_noise)


@dataclass(frozen=True, kw_only=True)
class OdeConfig:
    """Regression on trajectories of a teacher's ODE (arXiv:2412.07772, 2602.02214)."""

    source: Literal["bidirectional", "causal"] = "bidirectional"
    """Whose trajectories: the bidirectional teacher's, or those of the causal student that the stage starts from, on
    clean context."""
    pairs: str | None = None
    """Folder of trajectories that an earlier run made (its ode_pairs); empty makes them in the run directory."""
    count: int = 64
    """Trajectories that are made."""
    steps: int = 48
    """Steps of the teacher on such a trajectory, at least."""
    frames: FrameReduction = "mean"
    """How the losses of latent frames are taken together, each being a mean over its numbers."""

    def __post_init__(self) -> None:
        for name in ("count", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
            if self.pairs is not None:
                require_default(self, name, "pairs names trajectories that are made already")

    @property
    def makes_causal_pairs(self) -> bool:
        """Whether a run makes trajectories of the causal model that it starts from."""
        return self.source == "causal" and self.pairs is None


@dataclass(frozen=True, kw_only=True)
class SelfForcingConfig:
    """Distribution matching on the student's own rollouts (arXiv:2506.08009)."""

    input: Literal["rollout", "noised_data"] = "rollout"
    """What the student is asked on: its own rollout (Self-Forcing), or videos of data.latents, each of their chunks
    noised to a time of its schedule drawn for it (CausVid)."""
    exit: Literal["cycled", "random", "last"] = "cycled"
    """Where rollouts stop: each exit in turn (Causal-rCM), a random one (Self-Forcing), or always the last."""
    rollout_schedules: tuple[tuple[int, ...], ...] = ()
    """Numbers of steps per chunk, one such list drawn for each rollout in place of student.steps (AnyFlow's mixture of
    step counts); they use student.shift."""
    replay: bool = False
    """Roll out without a graph and make each exit call again in the backward pass: the same gradient in the memory of
    one chunk."""
    longest_frames: int | None = None
    """Latent frames of the longest rollout; the teacher judges the last ones. Empty is the length of the layout."""
    prompt_switches: Literal["none", "recache", "cross_only"] = "none"
    """Whether the prompt of a longer rollout changes once, no later than at the first chunk that learns, and what is
    judged has the later one (LongLive): its stored chunks are computed again under it, or stay as they are."""
    new_frames: int | None = None
    """Latent frames at the end of a longer rollout that learn; empty is all but the first chunk of the window."""
    scores: Literal["bidirectional", "causal"] = "bidirectional"
    """How real and fake score see a video at one noise level: all of it, or under the student's mask, a chunk and
    earlier ones, with a direction that is normalised for each chunk (LongLive 2); teacher.path is then the export of a
    causal stage."""
    steered_teacher: str | None = None
    """Weights of a bidirectional network that knows data.controls, which a run with controls needs: the run of a
    diffusion_forcing stage whose layout is one chunk, one of its checkpoints, an export, or a .safetensors file."""

    def __post_init__(self) -> None:
        if any(len(counts) == 0 or min(counts) < 1 for counts in self.rollout_schedules):
            raise ValueError(f"rollout_schedules is {self.rollout_schedules}; each is a list of counts from 1 on")
        if self.input == "noised_data":
            for name in ("exit", "rollout_schedules", "replay", "longest_frames"):
                require_default(self, name, "input is 'noised_data', where nothing is rolled out")
        if self.scores == "causal":
            for name in ("input", "longest_frames", "steered_teacher"):
                require_default(self, name, "scores is 'causal', which judges rollouts of the layout alone")
        for name in ("new_frames", "prompt_switches"):
            if self.longest_frames is None:
                require_default(self, name, "longest_frames is empty: rollouts of the layout learn as a whole")

    def learning_frames(self, layout: ChunkLayout) -> int:
        """Latent frames at the end of a longer rollout that learn."""
        return layout.frames - layout.lengths[0] if self.new_frames is None else self.new_frames


@dataclass(frozen=True, kw_only=True)
class AsdConfig:
    """Adversarial self-distillation between rollouts of n and n + 1 steps (arXiv:2511.01419)."""

    weight: float
    """Weight of the student's adversarial loss."""
    penalty: float = 1.0
    """Weight of the R1 and R2 penalties of the discriminator."""

    def __post_init__(self) -> None:
        if not self.weight > 0 or self.penalty < 0:
            raise ValueError(
                f"weight is {self.weight} and penalty {self.penalty}; weight must be positive and penalty 0 or more; "
                "leave the section out for no discriminator"
            )


@dataclass(frozen=True, kw_only=True)
class RedmdConfig(ScorerListConfig):
    """Re-DMD (arXiv:2512.04678): matching weighted by exp(tilt_scale reward) of each rollout."""

    tilt_scale: float = 2.0
    """Factor of the reward."""
    max_weight: float | None = None
    """Largest weight of a rollout; empty is none, as published: a reward of 2 then weighs 55 times one of 0."""
    saliency: bool = False
    """Weigh each place of a rollout by how strongly it moves the rewards, too, the weakest of them most (Stream-R1);
    scorers must be differentiable."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tilt_scale > 0:
            raise ValueError(
                f"tilt_scale is {self.tilt_scale}; it must be above 0, and without the section every rollout weighs 1"
            )
        if self.max_weight is not None and not self.max_weight > 0:
            raise ValueError(f"max_weight is {self.max_weight}; it must be above 0, or empty for no limit")


def require_share(name: str, value: float) -> None:
    """Raise ValueError unless a share or time lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it must lie in [0, 1)")
