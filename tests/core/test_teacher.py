"""The teacher's sampler against stock pipelines, and the errors of loading."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.denoiser import guided_velocity
from fewstep.core.families.table import build_family
from fewstep.core.teacher import Teacher
from tests.tiny_pipelines import LATENT_SHAPE, PIXELS, build_sd3, build_sd15, build_sdxl, save_pipeline

PROMPTS = ["a red cat", "dog 12"]


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved SD3 pipeline without T5."""
    return save_pipeline(build_sd3(), tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def broken_folder(sd3_folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder to take something out of."""
    return Path(shutil.copytree(sd3_folder, tmp_path / "model"))


def stock_latents(pipeline: Any, noise: Tensor, steps: int, guidance: float) -> Tensor:
    return pipeline(
        PROMPTS, latents=noise, num_inference_steps=steps, output_type="latent", guidance_scale=guidance
    ).images


@pytest.mark.slow
@pytest.mark.parametrize("with_t5", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sample_equals_the_stock_sd3_pipeline(with_t5: bool, shift: float) -> None:
    stock = build_sd3(with_t5=with_t5, shift=shift)
    teacher = Teacher(build_sd3(with_t5=with_t5, shift=shift), path="tiny")
    noise, condition = torch.randn(2, *LATENT_SHAPE), teacher.encode(PROMPTS)
    for guidance in (1.0, 4.5):
        for steps in (1, 2, 5):
            expected = stock_latents(stock, noise, steps, guidance)
            ours = teacher.sample(noise, condition, steps=steps, guidance=guidance)
            assert (ours - expected).abs().max() < 1e-5, (guidance, steps)
            assert (ours - noise).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("build", [build_sd15, build_sdxl])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sample_equals_stock_ddim(build, prediction: str) -> None:
    stock = build(prediction_type=prediction)
    teacher = Teacher(build(prediction_type=prediction), path="tiny")
    noise, condition = torch.randn(2, *LATENT_SHAPE), teacher.encode(PROMPTS)
    for guidance in (1.0, 4.5):
        for steps in (1, 2, 5):
            expected = stock_latents(stock, noise, steps, guidance)
            ours = teacher.sample(noise, condition, steps=steps, guidance=guidance)
            # Values reach 1 / alpha = 15 times those of the noise, hence the relative error.
            assert (ours - expected).abs().max() < 1e-5 * expected.abs().max(), (guidance, steps)


def test_loading_keeps_the_numbers_and_freezes(sd3_folder: Path) -> None:
    teacher = Teacher.load(sd3_folder)
    stock = build_sd3()
    noise = torch.randn(2, *LATENT_SHAPE)
    ours = teacher.sample(noise, teacher.encode(PROMPTS), steps=2, guidance=4.5)
    assert (ours - stock_latents(stock, noise, 2, 4.5)).abs().max() < 1e-5
    assert teacher.path == str(sd3_folder)
    assert teacher.null_condition.batch_size == 1
    assert teacher.pipeline.text_encoder_3 is None
    modules = [m for m in teacher.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    assert len(modules) == 4
    assert not any(p.requires_grad or m.training for m in modules for p in m.parameters())
    low = Teacher.load(sd3_folder, dtype=torch.bfloat16)
    assert next(low.denoiser.parameters()).dtype == torch.bfloat16
    assert low.sample(noise, low.encode(PROMPTS), steps=1, guidance=2.0).dtype == torch.float32


def test_velocity_x0_and_gradient_to_the_input(sd3_folder: Path) -> None:
    teacher = Teacher.load(sd3_folder)
    condition = teacher.encode(PROMPTS)
    x_t, t = torch.randn(2, *LATENT_SHAPE, requires_grad=True), torch.tensor([0.3, 0.6])
    velocity = teacher.velocity(x_t, t, condition, 3.0)
    expected = guided_velocity(teacher.denoiser, x_t, t, condition, teacher.null_condition, 3.0)
    assert torch.equal(velocity, expected)
    x0 = teacher.x0(x_t, t, condition, 3.0)
    assert torch.equal(x0, x_t - t.view(2, 1, 1, 1) * velocity)
    (gradient,) = torch.autograd.grad(x0.sum(), x_t)
    assert gradient.abs().max() > 0.1


def test_pixels_and_shapes(sd3_folder: Path) -> None:
    teacher = Teacher.load(sd3_folder)
    assert teacher.latent_shape() == LATENT_SHAPE
    assert teacher.latent_shape(8, 16) == (4, 4, 8)
    pixels = teacher.decode(torch.randn(3, *LATENT_SHAPE))
    assert pixels.shape == (3, 3, PIXELS, PIXELS)
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert teacher.encode_pixels(pixels).shape == (3, *LATENT_SHAPE)


def test_freed_text_encoders(sd3_folder: Path) -> None:
    teacher = Teacher.load(sd3_folder)
    condition = teacher.encode(PROMPTS)
    teacher.free_text_encoders()
    assert teacher.pipeline.text_encoder is None
    assert teacher.pipeline.text_encoder_2 is None
    assert teacher.sample(torch.randn(2, *LATENT_SHAPE), condition, steps=1, guidance=2.0).shape == (2, *LATENT_SHAPE)
    with pytest.raises(ValueError, match="freed"):
        teacher.encode(PROMPTS)
    with pytest.raises(ValueError, match="no prompt"):
        Teacher.load(sd3_folder).encode([])


def test_half_precision_keeps_an_unstable_autoencoder_in_fp32(tmp_path: Path) -> None:
    pipeline = build_sdxl()
    assert pipeline.vae.config.force_upcast
    teacher = Teacher.load(save_pipeline(pipeline, tmp_path), dtype=torch.float16)
    assert next(teacher.denoiser.parameters()).dtype == torch.float16
    assert teacher.pipeline.vae.dtype == torch.float32
    assert teacher.decode(torch.randn(1, *LATENT_SHAPE).half()).dtype == torch.float32


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder_2", "tokenizer", "scheduler"])
def test_missing_component_is_named(broken_folder: Path, name: str) -> None:
    shutil.rmtree(broken_folder / name)
    with pytest.raises(ValueError, match=rf"component {name} \(\w+\) is missing"):
        Teacher.load(broken_folder)


def test_missing_t5_says_how_to_do_without(broken_folder: Path) -> None:
    index = json.loads((broken_folder / "model_index.json").read_text())
    index["text_encoder_3"] = ["transformers", "T5EncoderModel"]
    (broken_folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r'text_encoder_3.*set "text_encoder_3" to \[null, null\]'):
        Teacher.load(broken_folder)


def test_missing_or_unsafe_weights_are_named(broken_folder: Path) -> None:
    weights = broken_folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"component vae \(AutoencoderKL\).*no \.safetensors weights"):
        Teacher.load(broken_folder)


def test_missing_index_folder_or_hub_name(broken_folder: Path, tmp_path: Path) -> None:
    (broken_folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        Teacher.load(broken_folder)
    (broken_folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        Teacher.load(broken_folder)
    for wrong in (tmp_path / "nowhere", "./models/nowhere", "nowhere"):
        with pytest.raises(ValueError, match="neither a folder nor the name of a model"):
            Teacher.load(wrong)


def test_unreachable_hub_model_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="could not be fetched"):
        Teacher.load("fewstep-no-such-owner/no-such-model")


def test_unknown_pipeline_class_lists_the_known() -> None:
    class OtherPipeline:
        pass

    with pytest.raises(
        ValueError, match=r"OtherPipeline; known are .*StableDiffusion3Pipeline, StableDiffusionPipeline"
    ):
        build_family(OtherPipeline())  # pyright: ignore[reportArgumentType]
