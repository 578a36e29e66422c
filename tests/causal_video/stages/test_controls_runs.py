"""Steered students from the first stage to a stream: runs, resume, exports, self-forcing, and mistakes."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.causal_video.export.pipeline import export_causal_run
from fewstep.causal_video.model.controls import FrameControls, controls_of
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.settings import FILE_NAME, StreamDefaults, load_defaults
from fewstep.causal_video.stages.config import CausalConfig
from fewstep.causal_video.stages.self_forcing import RolloutInputs, generate, plan_rollout, rollout_inputs
from fewstep.causal_video.stages.train import train_causal_video, train_step
from fewstep.causal_video.stages.watch import student_videos
from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
from fewstep.causal_video.stream.play import World
from fewstep.core.config import load_config
from fewstep.core.data import LatentDataset
from fewstep.core.randomness import Draw
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from tests.causal_video.tiny_causal import largest
from tests.causal_video.tiny_causal_run import VideoInputs, start_causal, tiny_causal
from tests.dmd.tiny_run import assert_same_checkpoint

NAMES = ("left", "right")
PATCHES = "transformer.patch_embedding.weight"


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two controls of five videos of three frames."""
    values = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(2))
    return FrameControls(values, NAMES).save(tmp_path_factory.mktemp("controls"))


@pytest.fixture(scope="module")
def forced(inputs: VideoInputs, controls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of teacher forcing with controls."""
    folder = tmp_path_factory.mktemp("forced") / "run"
    assert train_causal_video(tiny_causal(inputs, folder, "teacher_forcing", {"data.controls": str(controls)})) == 0
    return folder


@pytest.fixture(scope="module")
def judge(inputs: VideoInputs, controls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bidirectional network with controls: diffusion forcing of one chunk."""
    folder = tmp_path_factory.mktemp("judge") / "run"
    changes = {"data.controls": str(controls), "student.layout": (3,), "run.steps": 1}
    assert train_causal_video(tiny_causal(inputs, folder, "diffusion_forcing", changes)) == 0
    return folder


@pytest.mark.slow
def test_a_steered_run_is_resumed_exactly(inputs: VideoInputs, controls: Path, forced: Path, tmp_path: Path) -> None:
    for changes in ({"run.steps": 2}, {"run.resume": "latest"}):
        config = tiny_causal(inputs, tmp_path, "teacher_forcing", {"data.controls": str(controls), **changes})
        assert train_causal_video(config) == 0
    left, right = (load_checkpoint(list_checkpoints(folder)[-1]) for folder in (forced, tmp_path))
    assert left.step == 4
    assert_same_checkpoint(left, right)
    weight = load_file(list_checkpoints(forced)[-1] / "student.safetensors")[PATCHES]
    assert weight.shape[1] == 6
    assert 1e-4 < float(weight[:, 4:].abs().max()) < 1e-2
    assert load_defaults(forced) == StreamDefaults(actions=NAMES)


def test_an_export_is_steered_by_name(forced: Path, tmp_path: Path) -> None:
    output, record = export_causal_run(forced, tmp_path / "export", weights="live", steps=[2, 1])
    assert record.defaults.actions == NAMES
    assert record.verification.sampler_difference < 1e-6
    assert record.stock_difference < 1e-5
    assert json.loads((output / FILE_NAME).read_text())["stream"]["actions"] == ["left", "right"]
    assert 'session.step(action="left")' in (output / "README.md").read_text()
    pipe = CausalVideoPipeline.from_pretrained(output)
    made = {action: pipe.open("a red cat").step(action) for action in ("none", *NAMES)}
    for action, other in (("left", "none"), ("left", "right"), ("right", "none")):
        assert largest(made[action].latents, made[other].latents) > 1e-5
    hard = CausalVideoPipeline.from_pretrained(output)
    with torch.no_grad():
        hard.network.transformer.patch_embedding.weight[:, 4:] *= 1000
    pictures = [World(hard, "a red cat").step(action).pictures for action in NAMES]
    assert pictures[0] != pictures[1]
    frames = [hard.open("a red cat").step(action).images() for action in NAMES]
    assert np.abs(frames[0].astype(int) - frames[1].astype(int)).max() > 2
    with pytest.raises(ValueError, match="this student is steered by actions"):
        pipe("a red cat", chunks=1)
    (forced / FILE_NAME).rename(tmp_path / FILE_NAME)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    del content["stream"]
    (forced / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="names none under stream"):
        export_causal_run(forced, tmp_path / "nameless", steps=[1])
    (tmp_path / FILE_NAME).rename(forced / FILE_NAME)


def test_contact_sheets_follow_the_controls(inputs: VideoInputs, controls: Path, forced: Path, tmp_path: Path) -> None:
    changes = {"data.controls": str(controls), "student.init": str(forced)}
    videos = []
    for folder in ("a", "b"):
        config = tiny_causal(inputs, tmp_path / folder, "teacher_forcing", changes)
        setup, trainer = start_causal(config)
        with torch.no_grad():
            setup.student.transformer.patch_embedding.weight[:, 4:] *= 300
        assert setup.controls is not None
        if folder == "b":
            setup.controls.values[1] += 1.0
        videos.append(student_videos(setup, [0, 1, 3], flow_guidance=config.teacher.guidance))
        trainer.close()
    assert torch.equal(videos[0][[0, 2]], videos[1][[0, 2]])
    assert largest(videos[0][1], videos[1][1]) > 1e-3


@pytest.mark.parametrize("name", ["self_forcing_asd", "self_forcing_sid"])
def test_self_forcing_is_judged_with_the_controls(
    inputs: VideoInputs, controls: Path, forced: Path, judge: Path, tmp_path: Path, name: str
) -> None:
    changes = {"data.controls": str(controls), "student.init": str(forced), "self_forcing.steered_teacher": str(judge)}
    config = tiny_causal(inputs, tmp_path, name, changes)
    setup, trainer = start_causal(config)
    draw = Draw(5, [0, 1, 2], trainer.device)
    plan = plan_rollout(config, setup.settings, 0)
    inputs_of_slice = rollout_inputs(config, setup, plan, draw, 0)
    condition = inputs_of_slice.condition
    assert inputs_of_slice.image is None
    assert setup.real is not None
    assert setup.controls is not None
    rows, _, captions = setup.real.rows(draw.indices, trainer.device)
    assert torch.equal(condition.text, captions.text)
    given = controls_of(condition, 3)
    assert given is not None
    assert torch.equal(given[:, :, :, 5, 2], setup.controls.values[rows])
    other = setup.controlled(captions, [(row + 1) % 5 for row in rows])
    with torch.no_grad():
        videos = [generate(setup, plan, draw=draw, inputs=RolloutInputs(c)).new for c in (condition, other)]
        assert largest(videos[0], videos[1]) > 1e-5
        assert setup.scores is not None
        t = torch.tensor([0.3, 0.6, 0.9])
        scores = [setup.teacher.velocity(videos[0], t, c, 2.0) for c in (condition, other)]
        fakes = [setup.scores.fake(videos[0], t, c).velocity for c in (condition, other)]
    average = load_file(list_checkpoints(judge)[-1] / "student_ema.safetensors")[PATCHES]
    network: Any = setup.teacher.denoiser.network
    assert torch.equal(network.patch_embedding.weight, average)
    assert min(largest(*scores), largest(*fakes)) > 1e-6
    with pytest.raises(ValueError, match="called without controls"):
        setup.teacher.velocity(videos[0], t, setup.prompts.rows([0, 1, 2]), 1.0)
    for _ in range(2):
        metrics = train_step(config, setup, trainer)
        trainer.advance()
    assert float(metrics["fake_grad_norm"]) > 0  # pyright: ignore[reportPossiblyUnboundVariable]
    trainer.close()


@pytest.mark.slow
def test_later_stages_are_resumed_and_exported(
    inputs: VideoInputs, controls: Path, forced: Path, judge: Path, tmp_path: Path
) -> None:
    """Consistency from the first stage, and self-forcing from that, interrupted and not."""
    shared = {"data.controls": str(controls), "data.image_share": 0.5}
    first = tiny_causal(inputs, tmp_path / "dcm", "tf_dcm", {**shared, "student.init": str(forced), "run.steps": 1})
    assert train_causal_video(first) == 0
    for folder, changes in (("straight", {}), ("resumed", {"run.steps": 1}), ("resumed", {"run.resume": "latest"})):
        given = {**shared, "student.init": str(tmp_path / "dcm"), "run.steps": 2, **changes}
        given["self_forcing.steered_teacher"] = str(judge)
        config = tiny_causal(inputs, tmp_path / folder, "self_forcing", given)
        assert train_causal_video(config) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / folder)[-1]) for folder in ("straight", "resumed"))
    assert left.step == 2
    assert_same_checkpoint(left, right)
    assert load_defaults(tmp_path / "straight").actions == NAMES
    _, record = export_causal_run(tmp_path / "straight")
    assert record.defaults.actions == NAMES
    assert record.verification.sampler_difference < 1e-6


def test_the_script_writes_what_the_configuration_reads(
    inputs: VideoInputs, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    options = ("--teacher", str(inputs.teacher), "--output", str(folder), "--count", "2")
    monkeypatch.setattr(sys, "argv", ["make_digits_steered.py", *options])
    runpy.run_path(str(repository / "scripts" / "make_digits_steered.py"), run_name="__main__")
    dataset, controls = LatentDataset.load(folder), FrameControls.load(folder / "controls.safetensors")
    controls.check(dataset.latents)
    assert controls.values.shape == (2, 4, 7)
    file = ["--config", str(repository / "configs" / "digits_video" / "steered.yaml")]
    config, _ = load_config(CausalConfig, file, prog="x", description="x")
    assert config.data.controls == f"{config.data.latents}/controls.safetensors"
    assert sum(config.student.layout) == 7
    # The bidirectional teacher of self-forcing: the whole video as one chunk, which sees no earlier one.
    judge = ["--config", str(repository / "configs" / "digits_video" / "steered_teacher.yaml")]
    config, _ = load_config(CausalConfig, judge, prog="x", description="x")
    assert config.method == "diffusion_forcing"
    assert config.student.layout == (7,)
    assert config.student.policy == CachePolicy()


def test_what_does_not_fit_is_named(
    inputs: VideoInputs, controls: Path, forced: Path, judge: Path, tmp_path: Path
) -> None:
    controlled = {"data.controls": str(controls)}
    steered = {"self_forcing.steered_teacher": str(judge)}
    apart = {"teacher.lora": "style.safetensors", "teacher.lora_apart": True}
    for name, changes, message in (
        ("self_forcing", {**controlled, **steered, **apart}, r"lora_apart with self_forcing\.steered_teacher"),
        ("self_forcing", steered, r"steered_teacher without data\.controls: leave it out"),
        ("self_forcing", controlled, "the bidirectional teacher knows no controls"),
        ("self_forcing", {**controlled, **steered, "data.latents": None}, r"controls without data\.latents"),
        ("self_forcing_long", {**controlled, **steered}, "controls end where their videos do"),
        ("ode", {**controlled, "data.latents": str(inputs.latents)}, r"data\.controls is no part of ode"),
        ("teacher_forcing", {**controlled, "student.lora_rank": 2}, "would leave the new input channels at zero"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_causal(inputs, tmp_path, name, changes)
    values = torch.zeros(5, 2, 3)
    files = {
        "short": FrameControls(values[:, :, :2], NAMES).save(tmp_path / "short"),
        "few": FrameControls(values[:4], NAMES).save(tmp_path / "few"),
        "other": FrameControls(values, ("up", "down")).save(tmp_path / "other"),
        "more": FrameControls(torch.zeros(5, 3, 3), (*NAMES, "up")).save(tmp_path / "more"),
    }
    checkpoint = list_checkpoints(forced)[-1]
    weights = tmp_path / "alone" / "weights.safetensors"
    weights.parent.mkdir()
    shutil.copy(checkpoint / "student_ema.safetensors", weights)
    # An export says its controls in the folder above its weights.
    export = tmp_path / "export" / "transformer"
    export.mkdir(parents=True)
    plain = {name.removeprefix("transformer."): value for name, value in load_file(weights).items()}
    save_file(plain, export / "diffusion_pytorch_model.safetensors")
    shutil.copy(forced / FILE_NAME, export.parent)
    for changes, message in (
        ({"data.controls": str(files["other"]), "student.init": str(export.parent)}, r"controls \['left', 'right'\]"),
        ({"data.controls": str(tmp_path / "none")}, "is no file: give the controls.safetensors"),
        ({"data.controls": str(files["short"])}, r"data\.controls holds \[5, 2, 2\]"),
        ({"data.controls": str(files["few"])}, r"data\.controls holds \[4, 2, 3\]"),
        ({"data.controls": str(files["other"]), "student.init": str(forced)}, r"the controls \['left', 'right'\]"),
        ({"data.controls": str(files["other"]), "student.init": str(checkpoint)}, r"the controls \['left', 'right'\]"),
        ({"data.controls": str(files["more"]), "student.init": str(weights)}, "takes 2 control channels beside 4"),
        ({"student.init": str(forced)}, "takes 2 control channels beside 4 of latents, and this run has 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train_causal_video(tiny_causal(inputs, tmp_path / "run", "teacher_forcing", changes))
    assert not (tmp_path / "run" / "config.yaml").exists()
