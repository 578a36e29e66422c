"""A complete run of every stage on a tiny random Wan: inputs on disk, settings, and parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.stages.config import CausalConfig, CausalDataConfig, CausalLossConfig, CausalStudentConfig
from fewstep.causal_video.stages.setup import CausalData, CausalSetup, build_setup
from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.data import LatentDataset
from fewstep.core.randomness import sample_noise
from fewstep.core.settings import FakeScoreConfig, TeacherConfig
from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.config import LossConfig
from tests.tiny_pipelines import save_pipeline
from tests.tiny_videos import VIDEO_LATENTS, build_video_pipeline

PROMPTS = ("a red cat", "two dogs", "blue 7", "house 42")
LAYOUT = (1, 2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0)
FAKE_SCORE = FakeScoreConfig(optimizer=OPTIMIZER, updates_per_student_update=3)
NOISY = {"student.policy": CachePolicy(noisy_from=0)}
LONG = {
    "student.layout": (1, 1, 1),
    "student.policy": CachePolicy(2, 1, "static"),
    "loss.longest_frames": 5,
    "loss.new_frames": 2,
    "loss.exit": "random",
}
# Name of a case: its method and settings by dotted key.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "teacher_forcing": ("teacher_forcing", {}),
    "teacher_forcing_context": ("teacher_forcing", {"loss.context_noise": 0.3, "data.image_share": 0.5}),
    "diffusion_forcing": ("diffusion_forcing", {"loss.weight": "none", "loss.frames": "sum"}),
    "tf_dcm": ("tf_dcm", {"loss.grid_steps": 8}),
    "tf_scm": ("tf_scm", {"loss.tangent_warmup": 4, "loss.time_mean": 0.0}),
    "tf_scm_central": ("tf_scm", {"loss.tangent": "central", "loss.time_mean": 0.0}),
    "ode": ("ode", {"loss.ode_pairs": 5, "loss.ode_steps": 4}),
    "ode_causal": ("ode", {"loss.ode_pairs": 5, "loss.ode_steps": 4, "loss.ode_source": "causal"}),
    "self_forcing": ("self_forcing", {}),
    "self_forcing_noisy": ("self_forcing", {**NOISY, "loss.exit": "random"}),
    "self_forcing_replay": ("self_forcing", {"loss.replay": True}),
    "self_forcing_lora": ("self_forcing", {"student.lora_rank": 2, "data.image_share": 0.6}),
    "self_forcing_mixture": ("self_forcing", {"loss.rollout_schedules": ((2, 1), (1, 1), (3, 2))}),
    "self_forcing_sid": ("self_forcing", {"matching.objective": "sid"}),
    "self_forcing_long": ("self_forcing", LONG),
    "self_forcing_long_replay": ("self_forcing", {**LONG, "loss.replay": True}),
    "self_forcing_asd": ("self_forcing", {"loss.asd_weight": 0.1}),
}


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
    inputs: VideoInputs,
    directory: Path,
    name: str,
    changes: Mapping[str, Any] | None = None,
    *,
    steered_teacher: str | None = None,
) -> CausalConfig:
    """Settings of a run of one case; `changes` maps dotted keys to other values."""
    method, settings = CASES[name]
    causal_teacher = method in ("tf_dcm", "tf_scm") or settings.get("loss.ode_source") == "causal"
    base: dict[str, dict[str, Any]] = {
        "teacher": {"path": str(inputs.teacher), "guidance": 2.0},
        "data": {"prompts": str(inputs.prompts), "latents": str(inputs.latents), "sample_count": 1},
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
            "steps": (3, 2),
            "ema_decay": 0.8,
            "init": str(inputs.init) if causal_teacher else None,
        },
        "loss": {"check_tangent": False},
        "matching": {},
    }
    for key, value in {**settings, **(changes or {})}.items():
        section, _, field = key.partition(".")
        base[section][field] = value
    return CausalConfig(
        method=method,  # pyright: ignore[reportArgumentType]
        teacher=TeacherConfig(**base["teacher"]),
        data=CausalDataConfig(**base["data"]),
        run=RunConfig(**base["run"]),
        student=CausalStudentConfig(**base["student"]),
        loss=CausalLossConfig(**base["loss"]),
        fake_score=FAKE_SCORE if method == "self_forcing" else None,
        matching=LossConfig(**base["matching"]),
        steered_teacher=steered_teacher,
    )


def start_causal(config: CausalConfig) -> tuple[CausalSetup, Trainer]:
    """The parts of a run, ready for `train_step`. Close the trainer at the end."""
    data = CausalData.read(config)
    trainer = Trainer(config.run, RunDirectory(config.run.directory), cpu=True)
    return build_setup(config, data, trainer), trainer
