"""A teacher of one size and students of another: every stage runs, resumes exactly, and the small network exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from fewstep.causal_video.export.pipeline import export_causal_run
from fewstep.causal_video.stages.config import CausalTeacherConfig
from fewstep.causal_video.stages.setup import CausalData
from fewstep.causal_video.stages.train import train_causal_video
from fewstep.core.settings import ToldFakeScoreConfig
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from tests.causal_video.tiny_causal_run import OPTIMIZER, VideoInputs, start_causal, tiny_causal
from tests.dmd.tiny_run import assert_same_checkpoint
from tests.tiny_pipelines import save_pipeline
from tests.tiny_videos import build_video_pipeline

STAGES = ("teacher_forcing", "diffusion_forcing", "tf_dcm", "tf_scm", "ode", "ode_causal", "self_forcing")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan of two blocks beside the teacher's three."""
    pipeline, large = build_video_pipeline(text_tokens=8, seed=3, blocks=2), build_video_pipeline(text_tokens=8)
    # Sizes of one model share their text encoder and autoencoder.
    pipeline.register_modules(text_encoder=large.text_encoder, vae=large.vae)
    return save_pipeline(pipeline, tmp_path_factory.mktemp("small") / "it")


@pytest.fixture(scope="module")
def small_init(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an earlier stage of the small one."""
    other: Any = build_video_pipeline(text_tokens=8, seed=4, blocks=2)
    folder = tmp_path_factory.mktemp("small_init")
    other.transformer.save_pretrained(folder, safe_serialization=True)
    return folder / "diffusion_pytorch_model.safetensors"


def changes_of(stage: str, small: Path, init: Path, *, adapters: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {"student.path": str(small)}
    if stage in ("tf_dcm", "tf_scm", "ode_causal"):
        found["student.init"] = str(init)
    if adapters:
        found["student.lora_rank"] = 2
    if stage == "self_forcing":
        found["fake_score"] = ToldFakeScoreConfig(
            optimizer=OPTIMIZER,
            ratio=2,
            path=str(small),
            lora_rank=2 if adapters else 0,
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_small_student_of_a_large_teacher_resumes_exactly_and_exports(
    inputs: VideoInputs, small: Path, small_init: Path, tmp_path: Path, stage: str, adapters: bool
) -> None:
    changes = changes_of(stage, small, small_init, adapters=adapters)
    assert train_causal_video(tiny_causal(inputs, tmp_path / "straight", stage, changes)) == 0
    assert train_causal_video(tiny_causal(inputs, tmp_path / "resumed", stage, {**changes, "run.steps": 2})) == 0
    again = {**changes, "run.resume": "latest"}
    assert train_causal_video(tiny_causal(inputs, tmp_path / "resumed", stage, again)) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / folder)[-1]) for folder in ("straight", "resumed"))
    assert_same_checkpoint(left, right)
    output, record = export_causal_run(tmp_path / "straight", steps=[2] if "forcing" in stage[:20] else None)
    assert record.verification.sampler_difference < 1e-5
    pipeline: Any = DiffusionPipeline.from_pretrained(output)
    assert len(pipeline.transformer.blocks) == 2


def test_roles_of_two_sizes_in_self_forcing(inputs: VideoInputs, small: Path, small_init: Path, tmp_path: Path) -> None:
    """The score is the large teacher's, student and fake score are small; with adapters they share one small base."""
    changes = changes_of("self_forcing", small, small_init, adapters=True)
    setup, trainer = start_causal(tiny_causal(inputs, tmp_path, "self_forcing", changes))
    assert setup.scores is not None
    networks: list[Any] = [setup.teacher.denoiser.network, setup.student.transformer]
    networks.append(setup.scores.fake.denoiser.network)
    assert [len(network.blocks) for network in networks] == [3, 2, 2]
    frozen = [{p.data_ptr() for p in network.parameters() if not p.requires_grad} for network in networks]
    assert frozen[1] == frozen[2]
    assert frozen[0].isdisjoint(frozen[1])
    rows = {row.name: row for row in trainer.memory_report({"teacher": setup.teacher.denoiser})}
    adapters = sum(p.numel() * 4 for p in setup.scores.fake.parameters() if p.requires_grad)
    assert rows["fake_score"].weight_bytes == adapters
    trainer.close()


def test_models_of_another_space_are_refused_before_anything_is_loaded(inputs: VideoInputs, tmp_path: Path) -> None:
    other = build_video_pipeline(text_tokens=8, expand_timesteps=True)
    folder = save_pipeline(other, tmp_path / "other")
    config = tiny_causal(inputs, tmp_path / "run", "teacher_forcing", {"student.path": str(folder)})
    for weights in folder.glob("*/*.safetensors"):
        weights.write_bytes(b"")
    with pytest.raises(ValueError, match=r"student\.path .*other has expand_timesteps True in model_index\.json"):
        CausalData.read(config)
    nowhere = tiny_causal(inputs, tmp_path / "run", "teacher_forcing", {"student.path": str(tmp_path / "none")})
    with pytest.raises(ValueError, match="neither a folder nor the name of a model"):
        CausalData.read(nowhere)


def test_another_text_encoder_is_refused(inputs: VideoInputs, small: Path, tmp_path: Path) -> None:
    """The small model's text encoder, with one number changed."""
    folder = tmp_path / "other"
    shutil.copytree(small, folder)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    config = tiny_causal(inputs, tmp_path / "run", "teacher_forcing", {"student.path": str(folder)})
    with pytest.raises(ValueError, match=r"student\.path .*other has another text_encoder than the teacher"):
        CausalData.read(config)


def test_what_no_family_can_call_is_refused_by_its_setting(inputs: VideoInputs, small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(small, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stochastic_sampling": True}), encoding="utf-8")
    config = tiny_causal(inputs, tmp_path / "run", "teacher_forcing", {"student.path": str(folder)})
    with pytest.raises(ValueError, match=r"student\.path .*other cannot be used: .* must have .*stochastic_sampling"):
        CausalData.read(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_is_read_once_in_the_teachers_dtype(inputs: VideoInputs, small: Path, dtype: torch.dtype) -> None:
    from fewstep.core.families.family import network_dtype
    from fewstep.core.teacher import Teacher

    teacher = Teacher.load(inputs.teacher, dtype=dtype)
    base = teacher.base(str(small))
    assert base is teacher.base(str(small))
    assert teacher.base(None) is teacher.denoiser
    assert network_dtype(base.network) == dtype
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teacher_forcing", "tf_scm", "self_forcing"])
def test_adapters_on_a_teacher_of_8_bits(inputs: VideoInputs, tmp_path: Path, stage: str) -> None:
    """A stage without a start shares the quantised weights; one that goes on has the plain weights of that start."""
    changes: dict[str, Any] = {"student.lora_rank": 2, "teacher.dtype": "bfloat16", "teacher.quantise": "int8"}
    if stage == "self_forcing":
        changes["fake_score"] = ToldFakeScoreConfig(optimizer=OPTIMIZER, ratio=2, lora_rank=2)
    assert train_causal_video(tiny_causal(inputs, tmp_path / "run", stage, {**changes, "run.steps": 2})) == 0
    _, record = export_causal_run(tmp_path / "run", steps=[2] if stage == "teacher_forcing" else None)
    assert record.verification.sampler_difference < 1e-5


@pytest.mark.parametrize("case", ["tf_dcm", "tf_scm", "tf_meanflow", "self_forcing_joint"])
def test_a_small_student_follows_a_large_causal_teacher(
    inputs: VideoInputs, small: Path, small_init: Path, tmp_path: Path, case: str
) -> None:
    """The stages in the teacher's model, the student of another size: its target is the large one's velocity."""
    stage = case.removesuffix("_joint")
    large = CausalTeacherConfig(weights=str(inputs.init), path=str(inputs.teacher), guidance=1.5)
    changes = {**changes_of(stage, small, small_init), "student.init": str(small_init), "causal_teacher": large}
    setup, trainer = start_causal(tiny_causal(inputs, tmp_path / "parts", case, changes))
    trainer.close()
    assert setup.networks is not None
    assert setup.networks.teacher is not None
    held = setup.networks.teacher
    assert (held.network.layers, setup.student.layers, held.guidance) == (3, 2, 1.5)
    stored = load_file(inputs.init)["patch_embedding.weight"]
    assert torch.equal(held.network.transformer.patch_embedding.weight, stored)
    assert not any(parameter.requires_grad for parameter in held.network.parameters())
    assert train_causal_video(tiny_causal(inputs, tmp_path / "run", case, changes)) == 0
    _, record = export_causal_run(tmp_path / "run")
    assert record.verification.sampler_difference < 1e-5


def test_a_causal_teacher_of_another_latent_space_is_refused(inputs: VideoInputs, tmp_path: Path) -> None:
    other = save_pipeline(build_video_pipeline(text_tokens=8), tmp_path / "other")
    file = other / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "text_dim": 40}))
    wrong = CausalTeacherConfig(weights=str(inputs.init), path=str(other))
    with pytest.raises(ValueError, match=r"causal_teacher\.path .* has text_dim 40"):
        CausalData.read(tiny_causal(inputs, tmp_path / "run", "tf_dcm", {"causal_teacher": wrong}))
