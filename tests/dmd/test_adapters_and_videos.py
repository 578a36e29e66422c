"""DMD and rewards with adapters that were trained before, on given times, and on videos from prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from fewstep.core.export.run import ExportFiles, export_run
from fewstep.core.networks.adapters import adapter_tensors
from fewstep.core.randomness import Draw
from fewstep.core.settings import GridStudentConfig
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.weights import find_weights
from fewstep.dmd.config import DmdConfig
from fewstep.dmd.reward.train import train_reward
from fewstep.dmd.train import train_dmd
from tests.dmd.reward.reward_run import OPTIMIZER, reward_config
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint, start, tiny_config
from tests.tiny_pipelines import build_sdxl, save_pipeline
from tests.tiny_videos import build_video_pipeline

ADAPTERS: dict[str, Any] = {"student.lora_rank": 2, "student.lora_alpha": 3.0, "fake_score.lora_rank": 2}
HALF: dict[str, Any] = {**ADAPTERS, "teacher.dtype": "bfloat16"}


@pytest.fixture(scope="module")
def adapter_run(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a two-step student of adapters, on a bf16 base."""
    folder = tmp_path_factory.mktemp("adapters") / "run"
    assert train_dmd(tiny_config(inputs, folder, {**HALF, "student.steps": 2, "run.steps": 2})) == 0
    return folder


def test_adapters_go_on_or_are_merged(inputs: TinyInputs, adapter_run: Path, tmp_path: Path) -> None:
    """A run that starts from adapters makes the samples they make: on them, and on all weights with them merged."""
    stored, alpha = adapter_tensors(find_weights(str(adapter_run)))
    assert alpha is None
    assert len(stored) > 20
    samples = []
    for number, given in enumerate(({**HALF}, {"teacher.dtype": "bfloat16"})):
        changes = {**given, "student.steps": 2, "student.init": str(adapter_run)}
        setup, trainer = start(tiny_config(inputs, tmp_path / str(number), changes))
        names = {name for name, _ in setup.student_role.parameters}
        assert all(("lora_" in name) == (number == 0) for name in names)
        noise = torch.randn((2, *setup.latent_shape), generator=torch.Generator().manual_seed(1))
        samples.append(setup.student.sample(noise, setup.prompts.rows([0, 1]), [noise]))
        if number == 0:
            own = dict(setup.student_role.parameters)
            assert all(torch.equal(own[f"network.{name}"], tensor) for name, tensor in stored.items())
        trainer.close()
    error = (samples[0] - samples[1]).norm() / samples[1].norm()
    # The merged network computes in fp32, the adapters on a bf16 base in bf16.
    assert 1e-5 < error < 0.03
    wrong = tiny_config(inputs, tmp_path / "wrong", {**HALF, "student.lora_rank": 3, "student.init": str(adapter_run)})
    with pytest.raises(ValueError, match=r"do not fit: 0 missing .* of another rank .*set lora_rank and lora_targets"):
        start(wrong)
    other = {**HALF, "student.lora_alpha": 8.0, "student.init": str(adapter_run)}
    with pytest.raises(ValueError, match=r"trained with lora_alpha 3\.0, and here it is 8\.0"):
        start(tiny_config(inputs, tmp_path / "wrong", other))


def test_adapters_export_on_the_weights_that_training_saw(
    inputs: TinyInputs, adapter_run: Path, tmp_path: Path
) -> None:
    """Merged on the rounded base, and alone for a base in bf16; both start another run and stock diffusers."""
    merged, record = export_run(adapter_run, output=tmp_path / "merged")
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5
    weights = load_file(merged / "transformer" / "diffusion_pytorch_model.safetensors")
    base = load_file(inputs.teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    untouched = "transformer_blocks.0.norm1.linear.weight"
    assert torch.equal(weights[untouched], base[untouched].bfloat16().float())
    assert not torch.equal(weights[untouched], base[untouched])
    alone, record = export_run(adapter_run, output=tmp_path / "alone", files=ExportFiles(lora_only=True))
    assert record.base_dtype == "bfloat16"
    assert "dtype=torch.bfloat16" in (alone / "README.md").read_text(encoding="utf-8")
    stock: Any = StableDiffusion3Pipeline.from_pretrained(inputs.teacher, text_encoder_3=None, tokenizer_3=None)
    stock.load_lora_weights(alone)
    assert any("lora_B" in name and float(p.abs().max()) > 0 for name, p in stock.transformer.named_parameters())
    changes = {**HALF, "student.steps": 2, "student.init": str(alone)}
    setup, trainer = start(tiny_config(inputs, tmp_path / "next", changes))
    stored, _ = adapter_tensors(find_weights(str(adapter_run)))
    own = dict(setup.student_role.parameters)
    assert all(torch.equal(own[f"network.{name}"], tensor) for name, tensor in stored.items())
    trainer.close()
    changes = {"student.steps": 2, "student.init": str(alone)}
    setup, trainer = start(tiny_config(inputs, tmp_path / "full", changes))
    assert all(p.requires_grad for p in setup.student.denoiser.parameters())
    trainer.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtdmd", "nft", "flow_grpo"])
def test_rewards_train_adapters_and_resume_exactly(
    inputs: TinyInputs, adapter_run: Path, tmp_path: Path, method: str
) -> None:
    changes: dict[str, Any] = {
        "student.lora_rank": 2,
        "student.lora_alpha": 3.0,
        "student.optimizer": OPTIMIZER,
        "teacher.dtype": "bfloat16",
    }
    if method == "rtdmd":
        changes["fake_score.lora_rank"] = 2
    config = reward_config(inputs, adapter_run, tmp_path / "straight", method, changes)
    assert train_reward(config) == 0
    resumed = reward_config(inputs, adapter_run, tmp_path / "resumed", method, {**changes, "run.steps": 2})
    assert train_reward(resumed) == 0
    again = reward_config(inputs, adapter_run, tmp_path / "resumed", method, {**changes, "run.resume": "latest"})
    assert train_reward(again) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / folder)[-1]) for folder in ("straight", "resumed"))
    assert_same_checkpoint(left, right)
    assert all("lora_" in name for name in left.tensors["student"])
    assert export_run(tmp_path / "straight")[1].weights == "merged"


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_dmd2s_timesteps_of_a_table_are_trained_and_exported(inputs: TinyInputs, tmp_path: Path, sampler: str) -> None:
    """999, 749, 499, 249, which no even grid in t gives; the export needs no argument for them."""
    teacher = save_pipeline(build_sdxl(), tmp_path / "sdxl")
    steps = (999.0, 749.0, 499.0, 249.0)
    changes = {"teacher.path": str(teacher), "student.timesteps": steps, "student.sampler": sampler, "run.steps": 1}
    config = tiny_config(inputs, tmp_path / "run", changes)
    assert config.student.steps == 4
    assert train_dmd(config) == 0
    output, record = export_run(tmp_path / "run")
    assert record.network_timesteps == steps
    assert record.timesteps is None
    pipeline: Any = DiffusionPipeline.from_pretrained(output)
    seen: list[float] = []
    pipeline.unet.register_forward_pre_hook(lambda _, args, named: seen.append(float(args[1])), with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a cat", num_inference_steps=4, guidance_scale=record.guidance_scale, output_type="latent")
    assert seen == list(steps)


def test_grids_that_no_stock_scheduler_takes_are_refused_before_training(inputs: TinyInputs, tmp_path: Path) -> None:
    teacher = save_pipeline(build_video_pipeline(text_tokens=8), tmp_path / "wan")
    size = {"teacher.path": str(teacher), "data.height": 32, "data.width": 32, "data.frames": 5}
    with pytest.raises(ValueError, match="WanPipeline takes no `sigmas`"):
        start(tiny_config(inputs, tmp_path / "run", {**size, "student.times": (1.0, 0.9, 0.5, 0.2)}))
    folder = save_pipeline(build_sdxl(), tmp_path / "sdxl")
    with pytest.raises(ValueError, match="ends at table index 0"):
        start(tiny_config(inputs, tmp_path / "run", {"teacher.path": str(folder), "student.times": (1.0, 0.02)}))


def test_times_that_cannot_be_are_named(inputs: TinyInputs, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"times": (0.5, 1.0)}, r"times is \[0\.5, 1\.0\]; give one or more falling numbers above 0, at most 1"),
        ({"times": (1.5, 1.0)}, "at most 1"),
        ({"times": ()}, r"times is \[\]"),
        ({"times": (1.0, float("nan"))}, "falling numbers"),
        ({"times": (1.0,), "timesteps": (999.0,)}, "say the same in two units"),
        ({"times": (1.0, 0.5), "steps": 4}, r"steps is 4 and shift 1\.0 beside 2 times"),
        ({"times": (1.0, 0.5), "shift": 3.0}, "leave steps and shift out"),
        ({"timesteps": (float("inf"), 1.0)}, r"timesteps is \[inf, 1\.0\]"),
    ]
    for changes, told in wrong:
        with pytest.raises(ValueError, match=told):
            GridStudentConfig(optimizer=OPTIMIZER, **changes)
    config = tiny_config(inputs, tmp_path / "run", {"student.timesteps": (2000.0, 500.0)})
    with pytest.raises(ValueError, match=r"the teacher's network knows those above 0 up to 1000"):
        start(config)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_videos_are_distilled_from_prompts_alone(inputs: TinyInputs, tmp_path: Path, dtype: str) -> None:
    teacher = save_pipeline(build_video_pipeline(text_tokens=8), tmp_path / "wan")
    changes: dict[str, Any] = {
        "teacher.path": str(teacher),
        "teacher.dtype": dtype,
        "data.height": 32,
        "data.width": 32,
        "data.frames": 5,
        "student.times": (1.0, 0.757, 0.522),
        "run.steps": 3,
    }
    config = tiny_config(inputs, tmp_path / "run", changes)
    assert isinstance(config, DmdConfig)
    assert train_dmd(config) == 0
    output, record = export_run(tmp_path / "run")
    assert record.num_frames == 5
    assert record.sigmas is None
    assert record.times == (1.0, 0.757, 0.522)
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5
    assert (tmp_path / "run" / "samples").is_dir()
    assert '"WanPipeline"' in (output / "model_index.json").read_text(encoding="utf-8")


@pytest.mark.slow
def test_rewards_on_videos_score_frames(inputs: TinyInputs, tmp_path: Path) -> None:
    teacher = save_pipeline(build_video_pipeline(text_tokens=8), tmp_path / "wan")
    size = {"teacher.path": str(teacher), "data.height": 32, "data.width": 32, "data.frames": 5}
    student = {**size, "student.steps": 2, "run.steps": 1}
    assert train_dmd(tiny_config(inputs, tmp_path / "student", student)) == 0
    config = reward_config(inputs, tmp_path / "student", tmp_path / "run", "nft", {**size, "run.steps": 2})
    assert train_reward(config) == 0
    assert export_run(tmp_path / "run")[1].num_frames == 5


@pytest.fixture(scope="module")
def user_lora(inputs: TinyInputs, adapter_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The adapters of a run as a LoRA of anybody: in diffusers' layout, with and without its metadata, and kohya's."""
    folder = tmp_path_factory.mktemp("lora")
    alone, _ = export_run(adapter_run, output=folder / "diffusers", files=ExportFiles(lora_only=True))
    state = load_file(alone / "pytorch_lora_weights.safetensors")
    return {"folder": alone, "file": alone / "pytorch_lora_weights.safetensors", "state": _save(state, folder)}


def _save(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """With the text encoder's part that students cannot take."""
    text = {f"text_encoder.{name.partition('.')[2]}": tensor.clone() for name, tensor in state.items()}
    save_file({**state, **text}, folder / "with_text.safetensors")
    return folder / "with_text.safetensors"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_lora_of_the_user_is_merged_into_the_teacher(
    inputs: TinyInputs, user_lora: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """The teacher is then what stock diffusers makes of the two, and students and exports are made of that."""
    stock: Any = StableDiffusion3Pipeline.from_pretrained(inputs.teacher, text_encoder_3=None, tokenizer_3=None)
    plain = {name: tensor.clone() for name, tensor in stock.transformer.state_dict().items()}
    stock.load_lora_weights(user_lora[kind])
    stock.fuse_lora(lora_scale=0.5)
    stock.unload_lora_weights()
    merged = stock.transformer.state_dict()
    changes: dict[str, Any] = {"teacher.lora": str(user_lora[kind]), "teacher.lora_scale": 0.5, "run.steps": 1}
    setup, trainer = start(tiny_config(inputs, tmp_path / "start", changes))
    own = setup.teacher.denoiser.network.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in merged.items())
    assert sum(not torch.equal(plain[name], merged[name]) for name in plain) > 10
    trainer.close()
    for name, more in (("full", {}), ("adapters", HALF)):
        assert train_dmd(tiny_config(inputs, tmp_path / name, {**changes, **more})) == 0
        output, record = export_run(tmp_path / name)
        assert record.verification is not None
        assert record.verification.sampler_difference < 1e-5
    weights = load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")
    untouched = "transformer_blocks.0.norm1.linear.weight"
    assert torch.equal(weights[untouched], plain[untouched].bfloat16().float())
    with pytest.raises(ValueError, match=r"lora_only with teacher\.lora"):
        export_run(tmp_path / "adapters", output=tmp_path / "alone", files=ExportFiles(lora_only=True))


def test_a_lora_may_stay_the_teachers_alone(inputs: TinyInputs, user_lora: dict[str, Path], tmp_path: Path) -> None:
    """The teacher is the sum, the student starts under it, and a fake score on the same adapters as the teacher."""
    source = {"teacher.lora": str(user_lora["folder"])}
    summed, trainer = start(tiny_config(inputs, tmp_path / "summed", source))
    trainer.close()
    plain, trainer = start(tiny_config(inputs, tmp_path / "plain", {}))
    trainer.close()
    lora = {"fake_score.lora_alpha": 3.0, "fake_score.init": str(user_lora["folder"])}
    changes: dict[str, Any] = {**source, "teacher.lora_apart": True, **ADAPTERS, **lora}
    config = tiny_config(inputs, tmp_path / "run", changes)
    setup, trainer = start(config)
    x, t = Draw(5, [0, 1], trainer.device).noise(setup.latent_shape, "x"), torch.tensor([0.3, 0.9])
    condition = setup.prompts.rows([0, 1])
    teacher = setup.teacher.denoiser(x, t, condition)
    assert torch.allclose(teacher, summed.teacher.denoiser(x, t, condition), atol=1e-6)
    under = plain.teacher.denoiser(x, t, condition)
    assert not torch.allclose(teacher, under, atol=1e-4)
    torch.testing.assert_close(setup.student.denoiser(x, t, condition), under)
    torch.testing.assert_close(setup.fake_score.denoiser(x, t, condition), teacher)
    # One base for all three, and the teacher's adapters take no gradient.
    weights = [dict(module.named_parameters()) for module in (setup.teacher.denoiser, setup.student.denoiser)]
    bases = [{w.data_ptr() for name, w in named.items() if ".lora_" not in name} for named in weights]
    assert bases[0] == bases[1]
    assert not any(weight.requires_grad for weight in weights[0].values())
    trainer.close()
    assert train_dmd(tiny_config(inputs, tmp_path / "trained", changes)) == 0
    _, record = export_run(tmp_path / "trained")
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5
    with pytest.raises(ValueError, match=r"lora_apart is set, and there is no lora"):
        tiny_config(inputs, tmp_path / "run", {"teacher.lora_apart": True})


def test_a_lora_that_does_not_fit_is_named(inputs: TinyInputs, user_lora: dict[str, Path], tmp_path: Path) -> None:
    wrong = {
        str(user_lora["state"]): "weights of the text encoders",
        str(inputs.prompts): r"cannot be read .*; give a LoRA as \.safetensors",
        str(inputs.teacher / "transformer" / "diffusion_pytorch_model.safetensors"): "teacher.lora",
        str(tmp_path / "none"): "cannot be read",
    }
    for source, told in wrong.items():
        with pytest.raises(ValueError, match=told):
            start(tiny_config(inputs, tmp_path / "run", {"teacher.lora": source}))
    with pytest.raises(ValueError, match=r"lora_scale is 0\.5, and there is no lora"):
        tiny_config(inputs, tmp_path / "run", {"teacher.lora_scale": 0.5})
