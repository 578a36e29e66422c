"""Settings of a run that makes a few-step student better by a reward. No torch here, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.settings import DataConfig, FakeScoreConfig, StudentConfig, TeacherConfig
from fewstep.dmd.config import LossConfig

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


RewardMethod = Literal["rtdmd", "gndm", "redmd", "nft", "crd", "flash", "euphonium", "flow_grpo"]


# Methods whose loss is distribution matching in itself, those that need a random step before the last one, and those
# that follow samples of an older policy.
MATCHING_METHODS = ("rtdmd", "gndm", "redmd", "flash")


CHAIN_METHODS = ("rtdmd", "gndm", "flash", "euphonium", "flow_grpo")


FORWARD_METHODS = ("nft", "crd")


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """One scorer: weight * (score - mean) / std enters the reward, with the sign that makes higher better."""

    name: str
    """A name of docs/rewards.md, such as digit_log_probability."""
    weight: float = 1.0
    """Factor in the sum; not read for held-out scorers."""
    weights: str | None = None
    """Folder or file of its weights, or the address of a remote scorer."""
    clip: str | None = None
    """The CLIP under the aesthetic head."""
    model: str | None = None
    """open_clip architecture of a bare file."""
    frames: float | None = None
    """Share of the best frames that counts where a scorer of pictures judges videos; empty is all."""
    mean: float = 0.0
    """Subtracted from the score."""
    std: float = 1.0
    """Divides the score."""

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"scorer {self.name}: std is {self.std}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """What is rewarded, and how samples of one prompt are compared."""

    scorers: tuple[ScorerConfig, ...]
    """The trained reward: a list of scorers with their weights."""
    held_out: tuple[ScorerConfig, ...] = ()
    """Scorers that the training never follows, logged beside the reward; at least one of another architecture."""
    group_size: int = 8
    """Samples per prompt that are compared with each other; divides run.batch_size."""
    combination: Literal["sum", "gdpo"] = "sum"
    """'sum' adds the rewards, 'gdpo' normalises each in its groups first, which makes scales irrelevant."""
    scale: Literal["none", "leave_one_out", "group", "residual", "batch"] = "residual"
    """What centred rewards are divided by (docs/rewards.md)."""
    overlap: bool = True
    """Score in a background thread while the fake score and the snapshots are called."""
    chunk: int | None = None
    """Samples scored at a time; empty is the whole slice."""

    def __post_init__(self) -> None:
        # The reader of YAML hands entries of a list over as its own namespaces.
        for name in ("scorers", "held_out"):
            object.__setattr__(self, name, tuple(_scorer(entry) for entry in getattr(self, name)))
        if not self.scorers:
            raise ValueError("reward.scorers is empty; name at least one scorer")
        if self.group_size < 2:
            raise ValueError(f"reward.group_size is {self.group_size}; a comparison needs at least 2")


def _scorer(entry: Any) -> ScorerConfig:
    if isinstance(entry, ScorerConfig):
        return entry
    return ScorerConfig(**(entry if isinstance(entry, Mapping) else vars(entry)))


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The weights of the terms that the student minimises."""

    policy_weight: float = 1.0
    """Of the method's own reward loss."""
    matching_weight: float = 1.0
    """Of distribution matching; beside nft, crd, flow_grpo and euphonium it is an anchor that is not theirs."""
    direct_weight: float = 0.0
    """Of the reward's own gradient on the last step (rtdmd, gndm); every scorer must be differentiable."""
    direct_margin: float = 3.0
    """The hinge relu(margin - reward) of the direct term."""
    matching: Literal["x0", "ambient"] = "x0"
    """'x0' compares scores of the prediction, 'ambient' those above the level at which a step ended (AC-DMD)."""
    matching_steps: Literal["any", "last", "early"] = "any"
    """Which of the student's steps is matched: one drawn each time, the last, or one drawn of those at or above
    pixel_gan.boundary, which leaves the others to the discriminator (flash)."""
    cold_start_steps: int = 0
    """Steps of matching alone before the reward comes in (RTDMD's first stage)."""
    consistency_weight: float = 0.0
    """Of the fake score's consistency regulariser with 'ambient' (RTDMD 0.01)."""
    updates_per_rollout: int = 1
    """Student updates on one rollout, with the ratio as importance weight where the method has one."""
    tilt_scale: float = 2.0
    """Factor of the reward in exp(tilt_scale r) (redmd, gndm)."""
    max_weight: float = 5.0
    """Largest weight of a rollout (redmd)."""
    saliency: bool = False
    """Weigh each element by how strongly it moves the rewards, too (Stream-R1; redmd)."""
    matching_reward_draws: int = 4
    """Times and noises per sample from which the matching reward is estimated (gndm)."""
    matching_reward_reduction: Literal["sum", "mean"] = "sum"
    """'sum' is a log-density ratio in nats, whose estimate is noisy; 'mean' divides it by the number of elements, and
    the tilt is tilt_scale times that number (gndm)."""


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """Policy gradients on the student's random steps (rtdmd, gndm, flow_grpo, euphonium)."""

    transition: Literal["sampler", "cps", "flow_sde", "dance_sde"] = "sampler"
    """'sampler' is the student's own re-noising, the others are those of the papers."""
    eta: float = 0.9
    """Of 'cps'."""
    noise_scale: float = 0.7
    """Diffusion of 'flow_sde' (Flow-GRPO 0.7) and 'dance_sde' (0.3)."""
    trained_steps: int = 0
    """Random steps that get the policy loss in each step, the others share their noise in a group; 0 is all."""
    log_prob: Literal["normal", "distance"] = "normal"
    """The transition's log-probability, or RTDMD's squared distance."""
    clip_range: float = 1e-4
    """Of the ratio, for log-probabilities averaged over elements."""
    advantage_clip: float = 5.0
    """Advantages are clamped to plus or minus this."""
    kl_weight: float = 0.0
    """Of the KL to the student at the start."""


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


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """Regression on newly noised samples of an older policy (nft, crd)."""

    nft_beta: float = 1.0
    """Strength of NFT's interpolation."""
    crd_beta: float = 1.0
    """CRD's temperature."""
    max_advantage: float = 5.0
    """Advantage at which a sample counts as certain."""
    adaptive: bool = False
    """Divide by the mean absolute error, as released for many-step models; it can run away on few steps."""
    kl_weight: float = 0.0
    """Of the distance to the student at the start."""
    lowest_kl_weight: float = 0.0
    """The same for the worst samples (crd)."""
    old: DecayConfig = field(default_factory=DecayConfig)
    """The policy in the loss; nft samples from it, too."""
    sampling: DecayConfig = field(default_factory=DecayConfig)
    """The policy that crd samples from."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is measured beside the reward, on fixed prompts and seeds."""

    every: int = 25
    """Steps between measurements."""
    prompts: int = 10
    """Number of prompts, the first of the file."""
    samples_per_prompt: int = 4
    """Seeds per prompt."""
    patience: int = 3
    """Measurements since a held-out score was best before a message says that it fell while the reward rose."""
    tolerance: float = 2.0
    """Standard errors over the monitored samples by which both must have moved to count."""

    def __post_init__(self) -> None:
        if min(self.every, self.prompts, self.samples_per_prompt, self.patience) < 1 or self.tolerance < 0:
            raise ValueError(f"{self}: all but tolerance must be at least 1, and tolerance not negative")
        if self.prompts * self.samples_per_prompt < 2:
            raise ValueError("monitor.prompts * samples_per_prompt is 1; a spread needs at least 2 samples")


@dataclass(frozen=True, kw_only=True)
class RewardRunConfig:
    """A few-step student made better by a reward (docs/methods/reward.md)."""

    teacher: TeacherConfig
    """The model that the student was distilled from."""
    data: DataConfig
    """What the run reads: prompts, and real latents for the pixel GAN."""
    run: RunConfig
    """Where and how long the run goes."""
    student: StudentConfig
    """The few-step generator; `init` is a run directory of train_dmd.py, an export, or a safetensors file."""
    fake_score: FakeScoreConfig
    """The network that follows the student's distribution; `updates_per_student_update` on each rollout."""
    reward: RewardSettings
    """What is rewarded."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Times of the scores; objective 'dmd' without GAN and pairs."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Weights of the terms."""
    chain: ChainConfig = field(default_factory=ChainConfig)
    """Policy gradients on random steps."""
    forward: ForwardConfig = field(default_factory=ForwardConfig)
    """Regression on samples of an older policy."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Pairs from one state."""
    pixel_gan: PixelGanConfig = field(default_factory=PixelGanConfig)
    """A discriminator on decoded pixels."""
    process: ProcessConfig = field(default_factory=ProcessConfig)
    """Steered rollouts."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """What is measured beside the reward."""
    method: RewardMethod
    """Name of the method, kept with the export."""

    def __post_init__(self) -> None:
        check_student(self)
        check_objective(self)
        check_method(self)
        check_pixel_gan(self)

    @property
    def matches(self) -> bool:
        """Whether there is a fake score and a matching term."""
        return self.objective.matching_weight > 0

    @property
    def latent_reward(self) -> str | None:
        """Folder of the latent reward model that the method asks, if it does."""
        sections = {"flash": self.preference.latent_reward, "euphonium": self.process.latent_reward}
        return sections.get(self.method)


def check_student(config: RewardRunConfig) -> None:
    """Raise ValueError for a student or a loss that this loop does not train."""
    student, loss = config.student, config.loss
    if student.init is None:
        raise ValueError("student.init is empty; give the run directory of a student from scripts/train_dmd.py")
    if student.sampler == "flow_map":
        raise ValueError("student.sampler 'flow_map' is not trained by a reward here; use a student of 'sde' or 'ode'")
    if student.steps < 1:
        raise ValueError(f"student.steps is {student.steps}; it must be at least 1")
    if student.lora_rank > 0:
        raise ValueError(
            "student.lora_rank must be 0: adapters are saved alone, and without student.init they are another student"
        )
    if loss.objective != "dmd" or loss.gan_weight > 0 or loss.regression_weight > 0:
        raise ValueError(
            "loss.objective must be 'dmd', gan_weight and regression_weight 0: the others are train_dmd.py's"
        )
    if not 0.0 < loss.t_min < loss.t_max < 1.0:
        raise ValueError(f"loss.t_min {loss.t_min} and loss.t_max {loss.t_max} must satisfy 0 < t_min < t_max < 1")


def check_objective(config: RewardRunConfig) -> None:
    """Raise ValueError for weights and groups that cannot work, with what to change."""
    objective, reward = config.objective, config.reward
    weights = ("policy_weight", "matching_weight", "direct_weight", "consistency_weight")
    for name in (*weights, "cold_start_steps"):
        if getattr(objective, name) < 0:
            raise ValueError(f"objective.{name} is {getattr(objective, name)}; it must not be negative")
    if min(objective.updates_per_rollout, config.fake_score.updates_per_student_update) < 1:
        raise ValueError("objective.updates_per_rollout and fake_score.updates_per_student_update must be at least 1")
    slices = config.run.gradient_accumulation
    if config.run.batch_size % (reward.group_size * slices):
        raise ValueError(
            f"reward.group_size {reward.group_size} does not divide run.batch_size {config.run.batch_size} cut into "
            f"{slices} slices; every slice holds whole groups"
        )
    if objective.direct_weight > 0 and config.method not in ("rtdmd", "gndm"):
        raise ValueError(f"objective.direct_weight belongs to rtdmd and gndm, not to {config.method}; set it to 0")
    if objective.matching == "ambient" and config.method in ("redmd", "gndm"):
        raise ValueError(f"{config.method} has its own form of matching on x0; set objective.matching to 'x0'")
    if objective.cold_start_steps > 0 and not config.matches:
        raise ValueError("objective.cold_start_steps is matching alone and needs objective.matching_weight > 0")


def check_method(config: RewardRunConfig) -> None:
    """Raise ValueError for settings that the method cannot use, with what to change."""
    method, student, chain = config.method, config.student, config.chain
    if method in MATCHING_METHODS and not config.matches:
        raise ValueError(f"{method} is distribution matching with a reward; set objective.matching_weight > 0")
    if method not in CHAIN_METHODS:
        return
    if student.steps < 2:
        raise ValueError(f"{method} learns from random steps before the last one; student.steps must be at least 2")
    if chain.transition == "sampler" and student.sampler == "ode":
        raise ValueError("the steps of student.sampler 'ode' are not random; set chain.transition to cps or flow_sde")
    if chain.transition in ("flow_sde", "dance_sde") and student.sampler == "sde":
        raise ValueError(
            f"chain.transition {chain.transition!r} explores around the ODE, and student.sampler 'sde' "
            "re-noises; use 'sampler' or 'cps', or a student of 'ode'"
        )
    if not 0 <= chain.trained_steps < student.steps:
        raise ValueError(
            f"chain.trained_steps is {chain.trained_steps}; {student.steps} steps have {student.steps - 1} random ones"
        )


def check_pixel_gan(config: RewardRunConfig) -> None:
    """Raise ValueError for a discriminator that has nothing to do, or steps that are left to one that is not there."""
    gan = config.pixel_gan
    if config.objective.matching_steps == "early" and gan.weight == 0:
        raise ValueError(
            "objective.matching_steps 'early' leaves late steps to the pixel GAN; set pixel_gan.weight > 0"
        )
    if gan.weight > 0 and config.method != "flash":
        raise ValueError(f"pixel_gan belongs to flash, not to {config.method}; set pixel_gan.weight to 0")
    if gan.weight > 0 and config.data.latents is None:
        raise ValueError("pixel_gan.weight needs real pictures; set data.latents to a folder from encode_latents.py")
