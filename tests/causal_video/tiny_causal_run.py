"""A complete run of every stage on a tiny random Wan: inputs on disk, settings, and parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.stages.config import CausalConfig, CausalTeacherConfig, JointConfig
from fewstep.causal_video.stages.sections import (
    AsdConfig,
    CausalDataConfig,
    CausalStudentConfig,
    DiffusionForcingConfig,
    OdeConfig,
    SelfForcingConfig,
    TeacherForcingConfig,
    TfAnyflowConfig,
    TfDcmConfig,
    TfMeanflowConfig,
    TfScmConfig,
)
from fewstep.causal_video.stages.setup import CausalData, CausalSetup, build_setup
from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.data import LatentDataset
from fewstep.core.randomness import sample_noise
from fewstep.core.settings import TeacherConfig, ToldFakeScoreConfig
from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.config import GanConfig, MatchingConfig, SidObjective
from tests.tiny_pipelines import save_pipeline
from tests.tiny_videos import VIDEO_LATENTS, build_video_pipeline

PROMPTS = ("a red cat", "two dogs", "blue 7", "house 42")
LAYOUT = (1, 2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0)
FAKE_SCORE = ToldFakeScoreConfig(optimizer=OPTIMIZER, ratio=2)
NOISY = {"student.policy": CachePolicy(noisy_from=0)}
LONG = {
    "student.layout": (1, 1, 1),
    "student.policy": CachePolicy(2, 1, "static"),
    "self_forcing.longest_frames": 5,
    "self_forcing.new_frames": 2,
    "self_forcing.exit": "random",
}
PAIRS = {"ode.count": 5, "ode.steps": 4}
STAGES: dict[str, type[Any]] = {
    "teacher_forcing": TeacherForcingConfig,
    "diffusion_forcing": DiffusionForcingConfig,
    "tf_dcm": TfDcmConfig,
    "tf_scm": TfScmConfig,
    "tf_meanflow": TfMeanflowConfig,
    "tf_anyflow": TfAnyflowConfig,
    "ode": OdeConfig,
    "self_forcing": SelfForcingConfig,
}
SCORED = ("self_forcing",)
FLOWS = ("teacher_forcing", "diffusion_forcing")
# Name of a case: its stage and settings by dotted key, or sections by name.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "teacher_forcing": ("teacher_forcing", {}),
    "teacher_forcing_context": ("teacher_forcing", {"teacher_forcing.context_noise": 0.3, "data.image_share": 0.5}),
    "diffusion_forcing": (
        "diffusion_forcing",
        {"diffusion_forcing.weight": "none", "diffusion_forcing.frames": "sum"},
    ),
    "tf_dcm": ("tf_dcm", {"tf_dcm.grid_steps": 8}),
    "tf_scm": ("tf_scm", {"tf_scm.tangent_warmup": 4, "tf_scm.time_mean": 0.0, "tf_scm.check_tangent": False}),
    "tf_scm_central": ("tf_scm", {"tf_scm.tangent": "central", "tf_scm.time_mean": 0.0}),
    "tf_meanflow": (
        "tf_meanflow",
        {"student.second_time": "sum", "tf_meanflow.time_mean": 0.0, "tf_meanflow.check_tangent": False},
    ),
    "tf_anyflow": (
        "tf_anyflow",
        {
            "student.second_time": "gate",
            "tf_anyflow.pairs": "partition",
            "tf_anyflow.tangent": "central",
            "tf_anyflow.velocity": "data",
        },
    ),
    "ode": ("ode", PAIRS),
    "ode_causal": ("ode", {**PAIRS, "ode.source": "causal"}),
    "self_forcing": ("self_forcing", {}),
    "self_forcing_noisy": ("self_forcing", {**NOISY, "self_forcing.exit": "random"}),
    "self_forcing_replay": ("self_forcing", {"self_forcing.replay": True}),
    "self_forcing_lora": ("self_forcing", {"student.lora_rank": 2, "data.image_share": 0.6}),
    "self_forcing_mixture": ("self_forcing", {"self_forcing.rollout_schedules": ((2, 1), (1, 1), (3, 2))}),
    "self_forcing_sid": ("self_forcing", {"sid": SidObjective()}),
    "self_forcing_long": ("self_forcing", LONG),
    "self_forcing_long_replay": ("self_forcing", {**LONG, "self_forcing.replay": True}),
    "self_forcing_jumps": ("self_forcing", {"student.second_time": "gate"}),
    "self_forcing_asd": ("self_forcing", {"asd": AsdConfig(weight=0.1)}),
    "self_forcing_gan": ("self_forcing", {"gan": lambda inputs: with_gan(inputs)}),
    "self_forcing_joint": (
        "self_forcing",
        {"joint": lambda inputs: with_joint(), "causal_teacher": lambda inputs: with_teacher(inputs)},
    ),
}


def with_joint(**settings: Any) -> JointConfig:
    """Continuous consistency beside the rollouts, at a share at which both are felt; or other settings."""
    stage = settings or {"tf_scm": TfScmConfig(time_mean=0.0, check_tangent=False)}
    return JointConfig(weight=0.3, **stage)


def with_teacher(inputs: "VideoInputs") -> CausalTeacherConfig:
    """The causal teacher of a joint stage."""
    return CausalTeacherConfig(weights=str(inputs.init), guidance=1.5)


def with_gan(inputs: "VideoInputs") -> GanConfig:
    """A discriminator that sees the tiny videos."""
    return GanConfig(latents=str(inputs.latents), weight=0.1, discriminator_weight=0.5)


@dataclass(frozen=True)
class VideoInputs:
    """Paths of what a run reads; `init` holds the weights of an earlier stage."""

    teacher: Path
    prompts: Path
    latents: Path
    init: Path


def write_inputs(folder: Path) -> VideoInputs:
    """A random teacher, four prompts, five videos with captions, and weights that differ from the teacher's."""
    teacher = save_pipeline(build_video_pipeline(text_tokens=8), folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    latents = 0.2 + 0.8 * sample_noise(9, range(5), VIDEO_LATENTS, stream="data")
    LatentDataset(latents, tuple(f"video {number}" for number in range(5))).save(folder / "latents")
    other: Any = build_video_pipeline(text_tokens=8, seed=1)
    other.transformer.save_pretrained(folder / "init", safe_serialization=True)
    init = folder / "init" / "diffusion_pytorch_model.safetensors"
    return VideoInputs(teacher, folder / "prompts.txt", folder / "latents", init)


def tiny_causal(
    inputs: VideoInputs, directory: Path, name: str, changes: Mapping[str, Any] | None = None
) -> CausalConfig:
    """Settings of a run of one case; `changes` maps dotted keys to other values, or names to other sections.

    Videos are given where the stage reads some, else their size.
    """
    stage, settings = CASES[name]
    told = {**settings, **(changes or {})}
    given: dict[str, Any] = {key: value(inputs) if callable(value) else value for key, value in told.items()}
    causal_teacher = stage in ("tf_dcm", "tf_scm", "tf_meanflow") or given.get("ode.source") == "causal"
    if stage == "ode":
        reads_videos = causal_teacher and "ode.pairs" not in given
    else:
        reads_videos = stage != "self_forcing" or given.get("data.image_share", 0) > 0 or "data.controls" in given
        reads_videos = reads_videos or given.get("self_forcing.input") == "noised_data" or "joint" in given
    data = {"latents": str(inputs.latents)} if reads_videos else {"height": 32, "width": 32}
    base: dict[str, dict[str, Any]] = {
        "teacher": {"path": str(inputs.teacher), "guidance": 2.0},
        "data": {"prompts": str(inputs.prompts), "sample_count": 1, **data},
        "run": {
            "directory": str(directory),
            "seed": 5,
            "steps": 4,
            "batch_size": 4,
            "checkpoint_every": 2,
            "keep_checkpoints": 20,
            "sample_every": 1000,
            "log_every": 1,
        },
        "student": {
            "optimizer": OPTIMIZER,
            "layout": LAYOUT,
            "ema_decay": 0.8,
            "init": str(inputs.init) if causal_teacher else None,
            **({} if stage in FLOWS else {"steps": (3, 2)}),
        },
        stage: {},
    }
    sections: dict[str, Any] = {"fake_score": FAKE_SCORE, "matching": MatchingConfig()} if stage in SCORED else {}
    for key, value in given.items():
        section, dot, field = key.partition(".")
        if dot:
            base[section][field] = value
        else:
            sections[section] = value
    classes = {**STAGES, "teacher": TeacherConfig, "data": CausalDataConfig, "run": RunConfig}
    classes["student"] = CausalStudentConfig
    made = {section: classes[section](**values) for section, values in base.items()}
    return CausalConfig(**made, **sections)


def start_causal(config: CausalConfig) -> tuple[CausalSetup, Trainer]:
    """The parts of a run, ready for `train_step`. Close the trainer at the end."""
    data = CausalData.read(config)
    trainer = Trainer(config.run, RunDirectory(config.run.directory), cpu=True)
    return build_setup(config, data, trainer), trainer
