"""SD1.5 and SDXL in canonical coordinates against diffusers' DDIMScheduler and pipelines."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from fewstep.core.denoiser import Denoiser, guided_velocity
from fewstep.core.families.parts.noise_table import snap_to_integer
from fewstep.core.families.table import build_family
from fewstep.core.families.unet import UnetFamily
from fewstep.core.networks.lora import add_lora
from fewstep.core.paths import to_flow_state, x0_from_velocity
from fewstep.core.teacher import Teacher
from tests.tiny_pipelines import LATENT_SHAPE, PIXELS, build_ddim, build_sd15, build_sdxl

PROMPTS = ["a red cat", "dog 12"]
BUILDERS = {"sd15": build_sd15, "sdxl": build_sdxl}
KINDS = [(name, prediction) for name in BUILDERS for prediction in ("epsilon", "v_prediction")]


def build(name: str, prediction: str):
    """The pipeline, its family and a denoiser on its U-Net."""
    pipeline = BUILDERS[name](prediction_type=prediction)
    family = build_family(pipeline)
    assert isinstance(family, UnetFamily)
    return pipeline, family, Denoiser(pipeline.unet, family)


def stock_output(pipeline, x, timestep, condition):
    """The raw U-Net at an integer timestep."""
    added = None if condition.time_ids is None else {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    return pipeline.unet(x, timestep, condition.tokens, added_cond_kwargs=added, return_dict=False)[0]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value, for x0 at high noise is 1 / alpha times as large as the state."""
    return ((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1)).item()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prediction"), KINDS)
@pytest.mark.parametrize("timestep", [0, 1, 250, 499, 749, 999])
def test_x0_is_ddims_pred_original_sample(name: str, prediction: str, timestep: int) -> None:
    pipeline, family, denoiser = build(name, prediction)
    condition = family.encode_prompts(pipeline, PROMPTS)
    scheduler = pipeline.scheduler
    x0, eps = torch.randn(2, *LATENT_SHAPE), torch.randn(2, *LATENT_SHAPE)
    time = torch.full((2,), timestep)
    x = scheduler.add_noise(x0, eps, time)
    scheduler.set_timesteps(1000)
    output = stock_output(pipeline, x, timestep, condition)
    expected = scheduler.step(output, timestep, x).pred_original_sample
    x_t, t = to_flow_state(family.path, x, time)
    velocity = denoiser(x_t, t, condition)
    assert relative_error(x0_from_velocity(x_t, velocity, t), expected) < 1e-5
    if timestep < 999:
        # eps of the velocity is the one that DDIM steps along.
        alpha = scheduler.alphas_cumprod[timestep].sqrt()
        eps_expected = (x - alpha * expected) / (1 - alpha.square()).sqrt()
        assert relative_error(x_t + (1 - t).view(-1, 1, 1, 1) * velocity, eps_expected) < 1e-5


@pytest.mark.parametrize(("name", "prediction"), KINDS)
def test_one_euler_step_is_one_ddim_step(name: str, prediction: str) -> None:
    pipeline, family, denoiser = build(name, prediction)
    condition, null = family.encode_prompts(pipeline, PROMPTS), family.encode_null(pipeline)
    grid = family.teacher_grid(pipeline, 4)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    x, now, after = torch.randn(2, *LATENT_SHAPE), 749, 499
    time = torch.full((2,), now)
    u, c = (stock_output(pipeline, x, now, side) for side in (null.expand(2), condition))
    expected = scheduler.step(u + 3.0 * (c - u), now, x).prev_sample
    x_t, t = to_flow_state(family.path, x, time)
    x_next = x_t + (grid[2] - grid[1]) * guided_velocity(denoiser, x_t, t, condition, null, 3.0)
    expected_next, _ = to_flow_state(family.path, expected, torch.full((2,), after))
    assert relative_error(x_next, expected_next) < 1e-5


@pytest.mark.parametrize(("name", "prediction"), KINDS)
def test_time_one_is_the_one_step_rule_of_dmd2(name: str, prediction: str) -> None:
    pipeline, family, denoiser = build(name, prediction)
    condition = family.encode_prompts(pipeline, PROMPTS)
    noise = torch.randn(2, *LATENT_SHAPE)
    output = stock_output(pipeline, noise, 999, condition)
    alpha, sigma = (value.sqrt() for value in (family.path.alphas_cumprod[-1], 1 - family.path.alphas_cumprod[-1]))
    x0 = (noise - sigma * output) / alpha if prediction == "epsilon" else alpha * noise - sigma * output
    velocity = denoiser(noise, torch.ones(2), condition)
    assert relative_error(velocity, noise - x0) < 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_velocity_is_continuous_at_the_end_of_the_table(prediction: str) -> None:
    pipeline, family, denoiser = build("sd15", prediction)
    condition = family.encode_prompts(pipeline, PROMPTS)
    assert 0.93 < family.last_time < 0.94
    x_t = torch.randn(2, *LATENT_SHAPE)
    before, after = (denoiser(x_t, torch.full((2,), family.last_time + step), condition) for step in (-1e-6, 1e-6))
    assert relative_error(after, before) < 1e-3


def test_gradients_are_finite_at_both_ends() -> None:
    pipeline, family, denoiser = build("sd15", "epsilon")
    condition = family.encode_prompts(pipeline, PROMPTS)
    x_t = torch.randn(2, *LATENT_SHAPE, requires_grad=True)
    velocity = denoiser(x_t, torch.tensor([0.0, 1.0]), condition)
    velocity.square().sum().backward()
    assert x_t.grad is not None
    assert torch.isfinite(velocity).all()
    assert torch.isfinite(x_t.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in pipeline.unet.parameters() if p.grad is not None)


def test_fractional_timesteps_reach_the_network_and_integers_survive_fp32() -> None:
    _, family, _ = build("sd15", "epsilon")
    indices = torch.arange(1000)
    t = family.path.to_flow_time(indices.double()).float()
    assert torch.equal(snap_to_integer(family.path.from_flow_time(t)), indices.float())
    halves = indices[:-1] + 0.5
    t = family.path.to_flow_time(halves.double()).float()
    assert (snap_to_integer(family.path.from_flow_time(t)) - halves).abs().max() < 1e-3


def test_snapping_a_timestep_keeps_its_tangent() -> None:
    time = torch.tensor([3.0, 3.0 + 1e-4, 3.5], dtype=torch.float64)
    snapped, tangent = torch.func.jvp(snap_to_integer, (time,), (torch.full_like(time, 2.0),))[:2]
    assert snapped.tolist() == [3.0, 3.0, 3.5]
    assert tangent.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_grid_and_initial_state_are_those_of_ddim(name: str) -> None:
    pipeline, family, _ = build(name, "epsilon")
    pipeline.scheduler = PNDMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="leading", steps_offset=1
    )
    grid = family.teacher_grid(pipeline, 2)
    expected = family.path.to_flow_time(torch.tensor([501.0, 1.0], dtype=torch.float64))
    assert grid == tuple(expected.tolist())
    noise = torch.randn(2, *LATENT_SHAPE)
    x_t, _ = to_flow_state(family.path, noise, torch.tensor([501, 501]))
    assert (family.initial_state(noise, grid[0]) - x_t).abs().max() < 1e-6
    assert torch.equal(family.initial_state(noise, 1.0), noise)


def test_sdxl_is_told_the_size() -> None:
    pipeline, family, denoiser = build("sdxl", "epsilon")
    condition = family.encode_prompts(pipeline, PROMPTS)
    assert condition.time_ids is not None
    assert condition.pooled is not None
    assert condition.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert condition.pooled.shape == (2, 16)
    wide = family.encode_prompts(pipeline, PROMPTS, height=16, width=32)
    assert wide.time_ids is not None
    assert wide.time_ids.tolist() == [[16, 32, 0, 0, 16, 32]] * 2
    x_t, t = torch.randn(2, *LATENT_SHAPE), torch.full((2,), 0.5)
    assert (denoiser(x_t, t, condition) - denoiser(x_t, t, wide)).abs().max() > 1e-5
    with pytest.raises(ValueError, match="time_ids"):
        denoiser(x_t, t, replace(condition, time_ids=None))
    # Guidance tells the unconditional side the size of the picture, as the stock pipeline does.
    null = family.encode_null(pipeline)
    expected = guided_velocity(denoiser, x_t, t, wide, family.encode_null(pipeline, height=16, width=32), 2.0)
    assert torch.equal(guided_velocity(denoiser, x_t, t, wide, null, 2.0), expected)


def test_null_of_sdxl_follows_force_zeros_for_empty_prompt() -> None:
    pipeline, family, _ = build("sdxl", "epsilon")
    null = family.encode_null(pipeline)
    assert null.pooled is not None
    assert null.text.abs().max() == 0
    assert null.pooled.abs().max() == 0
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert torch.equal(family.encode_null(pipeline).text, family.encode_prompts(pipeline, [""]).text)


def test_decoding_equals_the_stock_pipeline_and_encoding_scales() -> None:
    pipeline, family, _ = build("sd15", "epsilon")
    arguments = {"latents": torch.randn(2, *LATENT_SHAPE), "num_inference_steps": 1, "guidance_scale": 1.0}
    latents = pipeline(PROMPTS, output_type="latent", **arguments).images
    expected = pipeline(PROMPTS, output_type="pt", **arguments).images
    assert (family.decode_latents(pipeline, latents) - expected).abs().max() < 1e-6
    pixels = torch.rand(2, 3, PIXELS, PIXELS)
    posterior = pipeline.vae.encode(pixels * 2 - 1).latent_dist
    assert (family.encode_pixels(pipeline, pixels) - posterior.mean * 0.18215).abs().max() < 1e-6


def test_channel_statistics_of_the_autoencoder() -> None:
    pipeline, family, _ = build("sdxl", "epsilon")
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    pipeline.vae.register_to_config(latents_mean=mean, latents_std=std)
    noise = torch.randn(1, *LATENT_SHAPE)
    arguments = {"latents": noise, "num_inference_steps": 1, "guidance_scale": 1.0}
    latents = pipeline("cat", output_type="latent", **arguments).images
    expected = pipeline("cat", output_type="pt", **arguments).images
    assert (family.decode_latents(pipeline, latents) - expected).abs().max() < 1e-6
    pixels = torch.rand(1, 3, PIXELS, PIXELS)
    raw = pipeline.vae.encode(pixels * 2 - 1).latent_dist.mean
    view = (1, -1, 1, 1)
    expected = (raw - torch.tensor(mean).view(view)) * 0.13025 / torch.tensor(std).view(view)
    assert (family.encode_pixels(pipeline, pixels) - expected).abs().max() < 1e-6


def test_latent_shape_and_features() -> None:
    pipeline, family, _ = build("sd15", "epsilon")
    assert family.latent_shape(pipeline, None, None) == LATENT_SHAPE
    assert family.latent_shape(pipeline, 8, 32) == (4, 4, 16)
    with pytest.raises(ValueError, match="width must be a positive multiple of 4"):
        family.latent_shape(pipeline, 8, 30)
    assert family.feature_modules(pipeline.unet, None) == [pipeline.unet.mid_block]
    assert family.feature_channels(pipeline.unet, None) == [16]
    with pytest.raises(ValueError, match="middle block alone"):
        family.feature_modules(pipeline.unet, [0])


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_lora_targets_exist(name: str) -> None:
    pipeline, family, _ = build(name, "epsilon")
    add_lora(pipeline.unet, rank=2, alpha=2, targets=family.lora_targets, seed=0)
    assert sum("lora_A" in n and p.requires_grad for n, p in pipeline.unet.named_parameters()) == 40


def test_tables_and_predictions_that_do_not_fit_are_named() -> None:
    pipeline, family, _ = build("sd15", "v_prediction")
    config = pipeline.scheduler.config
    pipeline.scheduler = DDIMScheduler.from_config(config, rescale_betas_zero_snr=True)
    zero_snr = build_family(pipeline)
    assert isinstance(zero_snr, UnetFamily)
    assert zero_snr.last_time == pytest.approx(1.0, abs=2e-8)
    pipeline.scheduler = DDIMScheduler.from_config(config, rescale_betas_zero_snr=True, prediction_type="epsilon")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        Teacher(pipeline, path="tiny")
    pipeline.scheduler = build_ddim("sample")
    with pytest.raises(ValueError, match="prediction_type"):
        Teacher(pipeline, path="tiny")
    pipeline.scheduler = EulerDiscreteScheduler.from_config(build_ddim("epsilon").config)
    euler = build_family(pipeline)
    assert isinstance(euler, UnetFamily)
    assert torch.equal(euler.path.alphas_cumprod, family.path.alphas_cumprod)
