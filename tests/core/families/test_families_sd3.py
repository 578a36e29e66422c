"""SD3 in canonical coordinates against the stock transformer, pipeline and scheduler."""

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.sd3 import T5_TOKENS, Sd3Family
from fewstep.core.families.table import build_family
from fewstep.core.networks.lora import add_lora
from tests.tiny_pipelines import LATENT_SHAPE, PIXELS, build_sd3

PROMPTS = ["a red cat", "dog 12"]


def stock_embeds(pipeline: Any, prompts: list[str] = PROMPTS) -> tuple[Tensor, Tensor]:
    """Prompt and pooled embeddings as the stock pipeline makes them, with all 256 tokens of the T5 part."""
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    return tokens, pooled


def stock_images(pipeline: Any, noise: Tensor, *, steps: int, guidance: float, output_type: str = "latent") -> Tensor:
    return pipeline(
        PROMPTS, latents=noise, num_inference_steps=steps, output_type=output_type, guidance_scale=guidance
    ).images


@pytest.mark.parametrize("sd35", [False, True])
def test_velocity_is_the_transformer_output_at_1000_t(sd35: bool) -> None:
    stock, ours = build_sd3(with_t5=True, sd35=sd35), build_sd3(with_t5=True, sd35=sd35)
    tokens, pooled = stock_embeds(stock)
    family = build_family(ours)
    x_t, t = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.25, 0.9])
    velocity = Denoiser(ours.transformer, family)(x_t, t, family.encode_prompts(ours, PROMPTS))
    expected = stock.transformer(x_t, tokens, pooled, timestep=1000 * t, return_dict=False)[0]
    assert torch.equal(velocity, expected)
    assert velocity.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("sd35", [False, True])
def test_one_counted_token_equals_256_stock_tokens_with_gradient(sd35: bool) -> None:
    stock, ours = build_sd3(sd35=sd35), build_sd3(sd35=sd35)
    tokens, pooled = stock_embeds(stock)
    assert tokens.shape[1] == 77 + 256
    family = build_family(ours)
    condition = family.encode_prompts(ours, PROMPTS)
    assert condition.text.shape[1] == 78
    assert condition.token_counts is not None
    assert condition.token_counts.sum().item() == 77 + 256
    t = torch.tensor([0.3, 1.0])
    x_a = torch.randn(2, *LATENT_SHAPE, requires_grad=True)
    x_b = x_a.detach().clone().requires_grad_()
    out_a = Denoiser(ours.transformer, family)(x_a, t, condition)
    out_b = stock.transformer(x_b, tokens, pooled, timestep=1000 * t, return_dict=False)[0]
    assert (out_a - out_b).abs().max() < 1e-5
    direction = torch.randn_like(out_a)
    (out_a * direction).sum().backward()
    (out_b * direction).sum().backward()
    assert x_a.grad is not None
    assert x_b.grad is not None
    assert (x_a.grad - x_b.grad).abs().max() < 1e-5 * max(1.0, x_b.grad.abs().max().item())
    for (name, a), (_, b) in zip(
        ours.transformer.named_parameters(), stock.transformer.named_parameters(), strict=True
    ):
        if a.grad is not None and b.grad is not None:
            assert (a.grad - b.grad).abs().max() < 2e-5 * max(1.0, b.grad.abs().max().item()), name


def test_a_wrong_count_is_not_the_stock_output() -> None:
    # Guards the tests above: the zero token must weigh enough to be seen.
    pipeline = build_sd3()
    family = build_family(pipeline)
    denoiser = Denoiser(pipeline.transformer, family)
    condition = family.encode_prompts(pipeline, PROMPTS)
    x_t, t = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.5, 0.5])
    uncounted = denoiser(x_t, t, Condition(condition.tokens, condition.pooled))
    assert (uncounted - denoiser(x_t, t, condition)).abs().max() > 1e-4


def test_prepared_transformer_without_counts_is_the_stock_one() -> None:
    stock, ours = build_sd3(sd35=True), build_sd3(sd35=True)
    build_family(ours).prepare_network(ours.transformer)
    noise = torch.randn(2, *LATENT_SHAPE)
    a, b = (stock_images(pipeline, noise, steps=2, guidance=4.5) for pipeline in (stock, ours))
    assert torch.equal(a, b)


def test_null_is_the_empty_prompt() -> None:
    pipeline = build_sd3(with_t5=True)
    null = build_family(pipeline).encode_null(pipeline)
    tokens, pooled = stock_embeds(pipeline, [""])
    assert null.pooled is not None
    assert torch.equal(null.text, tokens)
    assert torch.equal(null.pooled, pooled)
    assert null.token_counts is None


def test_decoding_equals_the_stock_pipeline() -> None:
    pipeline = build_sd3()
    family = build_family(pipeline)
    noise = torch.randn(2, *LATENT_SHAPE)
    latents = stock_images(pipeline, noise, steps=1, guidance=1.0)
    expected = stock_images(pipeline, noise, steps=1, guidance=1.0, output_type="pt")
    pixels = family.decode_latents(pipeline, latents)
    assert pixels.shape == (2, 3, PIXELS, PIXELS)
    assert (pixels - expected).abs().max() < 1e-6


def test_encoding_scales_and_shifts() -> None:
    pipeline = build_sd3()
    family = build_family(pipeline)
    pixels = torch.rand(2, 3, PIXELS, PIXELS)
    posterior = pipeline.vae.encode(pixels * 2 - 1).latent_dist
    latents = family.encode_pixels(pipeline, pixels)
    assert latents.shape == (2, *LATENT_SHAPE)
    assert (latents - (posterior.mean - 0.0609) * 1.5305).abs().max() < 1e-6
    drawn = family.encode_pixels(pipeline, pixels, torch.Generator().manual_seed(1))
    expected = (posterior.sample(torch.Generator().manual_seed(1)) - 0.0609) * 1.5305
    assert (drawn - expected).abs().max() < 1e-6
    assert (drawn - latents).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        family.encode_pixels(pipeline, pixels[:, :1])


def test_latent_shape() -> None:
    pipeline = build_sd3()
    family = build_family(pipeline)
    assert family.latent_shape(pipeline, None, None) == LATENT_SHAPE
    assert family.latent_shape(pipeline, 32, 8) == (4, 16, 4)
    with pytest.raises(ValueError, match="height must be a positive multiple of 4"):
        family.latent_shape(pipeline, 18, 16)


@pytest.mark.parametrize(("shift", "steps"), [(1.0, 4), (3.0, 5), (3.0, 1)])
def test_teacher_grid_is_the_schedulers(shift: float, steps: int) -> None:
    pipeline = build_sd3(shift=shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    grid = build_family(pipeline).teacher_grid(pipeline, steps)
    assert grid == tuple(torch.as_tensor(scheduler.sigmas)[:-1].tolist())
    assert grid[0] == 1.0
    assert len(grid) == steps
    assert len(torch.as_tensor(pipeline.scheduler.timesteps)) == 1000, (
        "the pipeline's own scheduler must not be touched"
    )


def test_schedulers_that_do_not_fit_are_named() -> None:
    pipeline = build_sd3()
    family = build_family(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        family.teacher_grid(pipeline, 2)


def test_features_of_the_middle_and_of_chosen_blocks() -> None:
    pipeline = build_sd3()
    family = build_family(pipeline)
    blocks = pipeline.transformer.transformer_blocks
    assert family.feature_modules(pipeline.transformer, None) == [blocks[1]]
    assert family.feature_modules(pipeline.transformer, [2, 0]) == [blocks[2], blocks[0]]
    assert family.feature_channels(pipeline.transformer, [2, 0]) == [16, 16]
    for wrong in ([3], [-1], [1, 1], []):
        with pytest.raises(ValueError, match="from 0 to 2"):
            family.feature_modules(pipeline.transformer, wrong)


@pytest.mark.parametrize("sd35", [False, True])
def test_lora_targets_exist(sd35: bool) -> None:
    pipeline = build_sd3(sd35=sd35)
    family = build_family(pipeline)
    add_lora(pipeline.transformer, rank=2, alpha=2, targets=family.lora_targets, seed=0)
    trainable = [name for name, p in pipeline.transformer.named_parameters() if p.requires_grad]
    # Per block q, k, v, out of image and q, k, v, out of text and two of the feed-forward, each A and B; the last block
    # projects no text, and the second attention of SD3.5's first block has four layers.
    assert len(trainable) == 2 * (3 * 10 - 1 + (4 if sd35 else 0))


def test_condition_without_pooled_text_is_an_error() -> None:
    pipeline = build_sd3()
    denoiser = Denoiser(pipeline.transformer, build_family(pipeline))
    with pytest.raises(ValueError, match="pooled"):
        denoiser(torch.randn(1, *LATENT_SHAPE), torch.ones(1), Condition(torch.zeros(1, 3, 40)))


def test_constants() -> None:
    assert T5_TOKENS == 256
    assert math.isclose(math.log(T5_TOKENS), 5.545, abs_tol=1e-3)
    assert isinstance(build_family(build_sd3()), Sd3Family)
