"""Settings of the stages: what is read back, what belongs to another stage, and what does not fit."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.reward.config import CausalRewardConfig
from fewstep.causal_video.stages.config import SCORE_SECTIONS, CausalConfig, JointConfig
from fewstep.causal_video.stages.sections import (
    AsdConfig,
    OdeConfig,
    RedmdConfig,
    SelfForcingConfig,
    TfDcmConfig,
    TfScmConfig,
)
from fewstep.core.config import ConfigError, load_config, save_resolved
from fewstep.dmd.config import DmdObjective, GanConfig, MatchingConfig, SidObjective
from fewstep.dmd.reward.config import ScorerConfig
from tests.causal_video.tiny_causal_run import CASES, FAKE_SCORE, STAGES, VideoInputs, tiny_causal

NOWHERE = Path("nowhere")
SHIPPED = {
    "teacher_forcing": "teacher_forcing",
    "diffusion_forcing": "diffusion_forcing",
    "tf_dcm": "tf_dcm",
    "tf_scm": "tf_scm",
    "ode": "ode",
    "self_forcing": "self_forcing",
    "steered": "teacher_forcing",
    "steered_dcm": "tf_dcm",
    "steered_teacher": "diffusion_forcing",
}


def load(*arguments: str) -> CausalConfig:
    return load_config(CausalConfig, arguments, prog="x", description="x")[0]


def shipped(repository: Path, name: str) -> str:
    return str(repository / "configs" / "digits_video" / f"{name}.yaml")


@pytest.mark.parametrize("name", ["tf_dcm", "self_forcing_mixture", "self_forcing_long", "self_forcing_asd", "ode"])
def test_settings_are_read_as_they_were_written(inputs: VideoInputs, tmp_path: Path, name: str) -> None:
    config = tiny_causal(inputs, tmp_path, name)
    save_resolved(tmp_path / "config.yaml", config)
    again = load("--config", str(tmp_path / "config.yaml"))
    assert again == config
    assert again.student.layout == config.student.layout


@pytest.mark.parametrize("name", SHIPPED)
def test_the_section_that_is_there_is_the_stage(repository: Path, name: str) -> None:
    config = load("--config", shipped(repository, name))
    assert config.method == SHIPPED[name]
    assert isinstance(config.stage, STAGES[SHIPPED[name]])
    assert config.is_flow == (SHIPPED[name] in ("teacher_forcing", "diffusion_forcing"))
    assert config.has_causal_teacher == SHIPPED[name].startswith("tf_")
    assert config.reads_videos == (config.data.latents is not None)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_field_of_another_stage_is_refused(repository: Path, name: str) -> None:
    """For every file and every field of the other stages' sections."""
    file = ("--config", shipped(repository, name))
    others = {stage: section for stage, section in STAGES.items() if stage != SHIPPED[name]}
    for stage, section in others.items():
        for field in dataclasses.fields(section):
            with pytest.raises(ConfigError, match=rf"{stage}\.{field.name} on the command line belongs to the section"):
                load(*file, f"--{stage}.{field.name}", "1")
    if name != "self_forcing":
        for key, value in (("matching.score_times.min", "0.1"), ("sid.alpha", "1.0"), ("asd.weight", "1.0")):
            with pytest.raises(ConfigError, match=f"the section {key.partition('.')[0]} belongs to self_forcing"):
                load(*file, f"--{key}", value)


def test_sections_hold_what_their_stage_reads(repository: Path) -> None:
    names = {stage: [field.name for field in dataclasses.fields(section)] for stage, section in STAGES.items()}
    flow = ["frames", "shift", "weight", "condition_drop", "control_drop"]
    assert names["teacher_forcing"] == [*flow, "times", "context_noise"]
    assert names["diffusion_forcing"] == [*flow, "times"]
    dcm = ["frames", "context_noise", "grid_steps", "grid_shift", "target", "skip", "noisy_context"]
    assert names["tf_dcm"] == dcm
    assert names["ode"] == ["source", "pairs", "count", "steps", "frames"]
    readers = {
        "teacher_forcing": ("forcing", "train"),
        "diffusion_forcing": ("forcing", "train"),
        "tf_dcm": ("consistency", "setup", "train"),
        "tf_scm": ("consistency", "config", "setup", "train"),
        "tf_meanflow": ("consistency", "config", "flow_map", "train"),
        "tf_anyflow": ("consistency", "config", "flow_map", "train"),
        "ode": ("ode", "setup"),
        "self_forcing": ("self_forcing", "setup"),
    }
    folder = repository / "causal_video" / "stages"
    losses = ("methods/flow_map.py", "methods/meanflow.py", "batch.py", "tangents.py")
    consistency = [repository / "consistency" / name for name in losses]
    for stage, files in readers.items():
        text = "".join((folder / f"{file}.py").read_text(encoding="utf-8") for file in files)
        if "flow_map" in files:
            # Their losses are those of pictures.
            text += "".join(path.read_text(encoding="utf-8") for path in consistency).replace("settings.", "stage.")
        # The section says itself how many frames learn.
        read = {"new_frames": "learning_frames"}
        unread = [name for name in names[stage] if not re.search(rf"\b(stage|{stage})\.{read.get(name, name)}\b", text)]
        assert unread == [], stage


def test_the_script_names_the_section(repository: Path) -> None:
    script = str(repository / "scripts" / "train_causal_video.py")
    command = (sys.executable, script, "--config", shipped(repository, "teacher_forcing"), "--tf_dcm.grid_steps", "7")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "tf_dcm.grid_steps on the command line belongs to the section tf_dcm" in done.stderr
    assert "the method of this run is teacher_forcing" in done.stderr


def refused(inputs: VideoInputs, name: str, match: str, **changes: Any) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_causal(inputs, NOWHERE, name, {key.replace("__", "."): value for key, value in changes.items()})


def test_students_that_do_not_fit_are_named(inputs: VideoInputs) -> None:
    refused(inputs, "teacher_forcing", r"layout: lengths are \[\]", student__layout=())
    refused(inputs, "teacher_forcing", r"policy: window_frames=1", student__policy=CachePolicy(1))
    refused(inputs, "tf_dcm", r"steps is \[4, 0\]", student__steps=(4, 0))
    refused(inputs, "tf_dcm", "shift is 0", student__shift=0.0)
    refused(inputs, "tf_dcm", "times is empty", student__times=(), student__steps=(4, 2))
    refused(inputs, "tf_dcm", "steps: given .* and times says all steps", student__times=((1.0,),))
    for changes in ({"student__steps": (3,)}, {"student__times": ((1.0,),)}):
        refused(inputs, "teacher_forcing", "trains a flow, which has no schedule of steps", **changes)
    refused(inputs, "tf_scm", r"student\.init is empty", student__init=None)
    refused(inputs, "ode_causal", r"student\.init is empty", student__init=None)


def test_data_that_a_stage_does_not_read_are_refused(inputs: VideoInputs) -> None:
    latents = str(inputs.latents)
    refused(inputs, "teacher_forcing", r"data\.latents is empty", data__latents=None)
    refused(inputs, "ode_causal", r"data\.latents is empty", data__latents=None)
    refused(inputs, "self_forcing", r"data\.latents is empty", data__latents=None, data__image_share=0.5)
    refused(inputs, "self_forcing", "and there is neither: leave it out", data__latents=latents)
    refused(inputs, "ode", "and makes none here: leave it out", data__latents=latents)
    pairs = {"ode__pairs": "x", "ode__count": 64, "ode__steps": 48}
    refused(inputs, "ode_causal", "and makes none here: leave it out", data__latents=latents, **pairs)
    refused(inputs, "ode", r"data\.image_share is no part of ode", data__image_share=0.5)
    refused(inputs, "self_forcing", r"image_share is 1\.5", data__image_share=1.5)
    refused(inputs, "self_forcing", "sample_count is 0", data__sample_count=0)
    refused(inputs, "ode", "count: given 5, and pairs names trajectories", ode__pairs="x")


def test_numbers_of_a_stage_that_cannot_be_are_refused() -> None:
    cases: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (
            TfScmConfig,
            {"tangent": "central", "check_tangent": False},
            "check_tangent: given False, and tangent is 'cen",
        ),
        (TfScmConfig, {"central_step": 0.1}, r"central_step: given 0\.1, and tangent is 'jvp': leave it out"),
        (TfScmConfig, {"time_std": 0.0}, r"time_std is 0\.0; it must be positive"),
        (TfScmConfig, {"tangent_warmup": -1}, "tangent_warmup is -1"),
        (TfScmConfig, {"max_time_share": 1.5}, r"max_time_share is 1\.5"),
        (TfDcmConfig, {"grid_steps": 1}, "grid_steps is 1"),
        (TfDcmConfig, {"grid_shift": 0.0}, "grid_shift is 0"),
        (TfDcmConfig, {"context_noise": 1.0}, r"context_noise is 1\.0; it must lie in \[0, 1\)"),
        (STAGES["teacher_forcing"], {"condition_drop": 1.0}, r"condition_drop is 1\.0; it must lie in \[0, 1\)"),
        (STAGES["diffusion_forcing"], {"shift": -1.0}, r"shift is -1\.0"),
        (OdeConfig, {"count": 0}, "count is 0; it must be at least 1"),
        (SelfForcingConfig, {"rollout_schedules": ((2, 0),)}, "list of counts from 1 on"),
        (SelfForcingConfig, {"new_frames": 1}, "new_frames: given 1, and longest_frames is empty"),
        (AsdConfig, {"weight": 0.0}, "leave the section out for no discriminator"),
    )
    for section, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            section(**changes)


def test_scores_belong_to_self_forcing(inputs: VideoInputs) -> None:
    parts = {
        "fake_score": FAKE_SCORE,
        "matching": MatchingConfig(),
        "sid": SidObjective(),
        "asd": AsdConfig(weight=1.0),
        "redmd": RedmdConfig(scorers=(ScorerConfig(name="clip_light"),)),
        "gan": GanConfig(latents="x", weight=0.1),
        "joint": JointConfig(tf_dcm=TfDcmConfig()),
    }
    assert tuple(parts) == SCORE_SECTIONS
    for name, part in parts.items():
        refused(inputs, "tf_dcm", f"the section {name} belongs to self_forcing", **{name: part})
    config = tiny_causal(inputs, NOWHERE, "self_forcing")
    assert config.objective == DmdObjective()
    assert tiny_causal(inputs, NOWHERE, "self_forcing_sid").objective == SidObjective()
    for name in ("fake_score", "matching"):
        with pytest.raises(ValueError, match=f"self_forcing needs the section {name}"):
            dataclasses.replace(config, **{name: None})
    # One to one is a cycle of two steps.
    assert dataclasses.replace(config, fake_score=dataclasses.replace(FAKE_SCORE, ratio=1)).fake_score is not None
    with pytest.raises(ValueError, match="the sections tf_dcm and self_forcing are given"):
        dataclasses.replace(config, tf_dcm=TfDcmConfig())


def test_rollouts_that_do_not_fit_are_named(inputs: VideoInputs) -> None:
    refused(inputs, "self_forcing_asd", "no chunk has two", student__steps=(1,))
    refused(inputs, "self_forcing", r"longest_frames is 4", self_forcing__longest_frames=4)
    refused(inputs, "self_forcing_long", r"new_frames is 3", self_forcing__new_frames=3)
    times = {"student__times": ((1.0, 0.5),), "student__steps": (4, 2)}
    refused(inputs, "self_forcing_mixture", r"leave student\.times out", **times)
    refused(inputs, "self_forcing", "without data.controls: leave it out", self_forcing__steered_teacher="x")


def test_discriminators_that_do_not_fit_are_named(inputs: VideoInputs) -> None:
    optimizer = FAKE_SCORE.optimizer
    for gan, match in (
        (GanConfig(latents="x", weight=0.1, features="teacher", optimizer=optimizer), "on the fake score's features"),
        (GanConfig(latents="x", weight=0.1, head="conv"), "use 'mlp' or 'multiscale' for videos"),
    ):
        refused(inputs, "self_forcing", match, gan=gan)
    refused(inputs, "self_forcing_gan", "gan with asd", asd=AsdConfig(weight=0.1))
    refused(inputs, "self_forcing_gan", "gan with self_forcing.scores 'causal'", self_forcing__scores="causal")
    refused(inputs, "tf_dcm", "the section gan belongs to self_forcing", gan=GanConfig(latents="x", weight=0.1))


def test_configurations_of_both_scripts_have_other_methods(repository: Path) -> None:
    assert set(CausalConfig.METHODS).isdisjoint(CausalRewardConfig.METHODS)
    assert set(CausalConfig.METHODS) == set(STAGES) == {stage for stage, _ in CASES.values()}
    content = yaml.safe_load(Path(shipped(repository, "astrolabe")).read_text(encoding="utf-8"))
    assert [name for name in content if name in CausalRewardConfig.METHODS] == ["astrolabe"]
