"""SANA in canonical coordinates against the stock transformer, pipeline and schedulers."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SCMScheduler,
)
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.sana import SanaFamily
from fewstep.core.families.table import build_family
from fewstep.core.networks.lora import add_lora, merge_lora
from fewstep.core.networks.sana_networks import with_dense_time, with_guidance_embedding, with_qk_norm
from fewstep.core.teacher import Teacher
from tests.tiny_sana import LATENT_SHAPE, PIXELS, build_sana

PROMPTS = ["the digit seven", "a handwritten bold number two"]


@pytest.fixture(scope="module")
def pipeline() -> SanaPipeline:
    """One pipeline for the tests that change nothing of it."""
    return build_sana()


@pytest.fixture(scope="module")
def conditions(pipeline: SanaPipeline) -> tuple[Condition, Condition]:
    """Conditions of `PROMPTS` and of the empty prompt; all tiny pipelines have the same text encoder."""
    family = build_family(pipeline)
    return family.encode_prompts(pipeline, PROMPTS), family.encode_null(pipeline)


def noise(seed: int = 1) -> Tensor:
    return torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))


def stock_images(pipeline: Any, noise: Tensor, *, steps: int, guidance: float, output_type: str = "latent") -> Tensor:
    return pipeline(
        PROMPTS,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type=output_type,
        **build_family(pipeline).call_arguments(pipeline),
    ).images


def test_text_is_the_stock_text_without_its_padding(pipeline, conditions) -> None:
    tokens, mask, null_tokens, null_mask = pipeline.encode_prompt(
        PROMPTS, complex_human_instruction=call_default("complex_human_instruction")
    )
    condition, null = conditions
    # Begin, the last token of the instruction, and the words; all tokens of a caption are words.
    assert condition.token_mask.sum(dim=1).tolist() == [5, 7]
    assert condition.tokens.shape == (2, 7, 32)
    assert tokens.shape == (2, 300, 32)
    assert torch.equal(condition.tokens, tokens[:, :7])
    assert torch.equal(condition.token_mask, mask[:, :7])
    assert mask[:, 7:].sum() == 0
    assert null.tokens.shape == (1, 1, 32)
    assert torch.allclose(null.tokens, null_tokens[:1, :1], atol=1e-6)
    assert null_mask.sum(dim=1).tolist() == [1, 1]


def call_default(name: str) -> Any:
    return inspect.signature(SanaPipeline.__call__).parameters[name].default


def test_prompts_do_not_depend_on_their_batch(pipeline, conditions) -> None:
    alone = build_family(pipeline).encode_prompts(pipeline, PROMPTS[:1])
    assert alone.text.shape == (1, 5, 32)
    assert torch.allclose(alone.text, conditions[0].text[:1, :5], atol=1e-5)
    joined = Condition.cat([alone, conditions[0]])
    assert joined.text.shape == (3, 7, 32)
    denoiser = Denoiser(pipeline.transformer, build_family(pipeline))
    x_t = noise()[:1].expand(2, -1, -1, -1)
    out = denoiser(x_t, torch.full((2,), 0.4), joined.index(torch.tensor([0, 1])))
    assert (out[0] - out[1]).abs().max() < 1e-5
    assert out.abs().max() > 0.1


def test_masked_tokens_are_not_looked_at(pipeline, conditions) -> None:
    condition = conditions[0]
    denoiser = Denoiser(pipeline.transformer, build_family(pipeline))
    t = torch.tensor([0.3, 0.8])
    hidden = condition.token_mask[:, :, None] == 0
    other = replace(condition, tokens=torch.where(hidden, 9.0, condition.tokens))
    assert torch.equal(denoiser(noise(), t, condition), denoiser(noise(), t, other))
    seen = replace(other, token_mask=torch.ones_like(condition.token_mask))
    change = (denoiser(noise(), t, condition) - denoiser(noise(), t, seen)).abs().amax(dim=(1, 2, 3))
    assert change[0] > 1e-3
    assert change[1] == 0
    with pytest.raises(ValueError, match="mask of its text tokens"):
        denoiser(noise(), t, Condition(condition.tokens))


@pytest.mark.parametrize("config", [{}, {"dense": True}, {"learnt_variance": True}], ids=["plain", "dense", "variance"])
def test_velocity_is_the_transformer_output(config, conditions) -> None:
    stock, ours = build_sana(**config), build_sana(**config)
    condition, _ = conditions
    t = torch.tensor([0.25, 0.9])
    expected = stock.transformer(
        noise(),
        condition.tokens,
        timestep=t if config.get("dense") else 1000 * t,
        encoder_attention_mask=condition.token_mask,
        return_dict=False,
    )[0]
    velocity = Denoiser(ours.transformer, build_family(ours))(noise(), t, condition)
    assert velocity.shape == (2, *LATENT_SHAPE)
    assert torch.equal(velocity, expected[:, :8])


@pytest.mark.parametrize(
    ("config", "steps", "guidance"),
    [
        ({}, 4, 4.5),
        ({"dense": True}, 3, 1.0),
        ({"dense": True, "shift": 1.0}, 5, 4.5),
        ({"learnt_variance": True}, 2, 2.0),
    ],
)
def test_teacher_sampling_equals_the_stock_pipeline(config, steps, guidance) -> None:
    pipeline = build_sana(**config)
    teacher = Teacher(pipeline, path="tiny")
    expected = stock_images(pipeline, noise(), steps=steps, guidance=guidance)
    found = teacher.sample(noise(), teacher.encode(PROMPTS), steps=steps, guidance=guidance)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_dpm_solver_of_first_order_is_the_teachers_euler(conditions) -> None:
    pipeline: Any = build_sana(dense=True)
    pipeline.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=3.0,
        solver_order=1,
        final_sigmas_type="zero",
    )
    teacher = Teacher(pipeline, path="tiny")
    grid = teacher.family.teacher_grid(pipeline, 4)
    assert len(grid) == 4
    assert 0.99 < grid[0] < 1
    expected = stock_images(pipeline, noise(), steps=4, guidance=1.0)
    found = teacher.sample(noise(), conditions[0], steps=4, guidance=1.0)
    # The pipeline rounds times to whole thousandths for the network, which the dense time hardly sees.
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_schedulers_that_do_not_fit_are_named() -> None:
    pipeline: Any = build_sana()
    family = build_family(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        family.teacher_grid(pipeline, 2)
    for wrong in (DDIMScheduler(), DPMSolverMultistepScheduler(), DPMSolverMultistepScheduler(use_flow_sigmas=True)):
        pipeline.scheduler = wrong
        with pytest.raises(ValueError, match="flow_prediction"):
            build_family(pipeline)


def test_decoding_and_encoding_scale(pipeline) -> None:
    family = build_family(pipeline)
    latents = stock_images(pipeline, noise(), steps=1, guidance=1.0)
    expected = stock_images(pipeline, noise(), steps=1, guidance=1.0, output_type="pt")
    pixels = family.decode_latents(pipeline, latents)
    assert pixels.shape == (2, 3, PIXELS, PIXELS)
    assert (pixels - expected).abs().max() < 1e-5
    encoded = family.encode_pixels(pipeline, pixels)
    raw = pipeline.vae.encode(pixels * 2 - 1).latent
    assert (encoded - raw * 0.41407).abs().max() < 1e-6
    assert torch.equal(encoded, family.encode_pixels(pipeline, pixels, torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        family.encode_pixels(pipeline, pixels[:, :1])


def test_sizes(pipeline) -> None:
    family = build_family(pipeline)
    assert family.latent_shape(pipeline, None, None) == LATENT_SHAPE
    assert family.latent_shape(pipeline, 64, 32) == (8, 8, 4)
    with pytest.raises(ValueError, match="height must be a positive multiple of 32"):
        family.latent_shape(pipeline, 40, 32)
    assert family.call_arguments(pipeline, height=64) == {"height": 64, "width": 32, "use_resolution_binning": False}


@pytest.mark.parametrize(
    ("layers", "expected"), [(20, [2, 8, 14, 19]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (28, [3, 11, 20, 27]), (1, [0])]
)
def test_features_are_those_of_sana_sprint(layers: int, expected: list[int]) -> None:
    pipeline = build_sana(layers=layers)
    family, blocks = build_family(pipeline), pipeline.transformer.transformer_blocks
    assert family.feature_modules(pipeline.transformer, None) == [blocks[number] for number in expected]
    assert family.feature_channels(pipeline.transformer, None) == [16] * len(expected)
    for wrong in ([layers], [-1], [0, 0], []):
        with pytest.raises(ValueError, match=f"from 0 to {layers - 1}"):
            family.feature_modules(pipeline.transformer, wrong)


def test_features_have_their_shape(pipeline, conditions) -> None:
    denoiser = Denoiser(pipeline.transformer, build_family(pipeline))
    _, features = denoiser.velocity_and_features(noise(), torch.tensor([0.2, 0.7]), conditions[0], [2, 0])
    assert [tuple(feature.shape) for feature in features] == [(2, 16, 16), (2, 16, 16)]


def test_lora_targets_exist_and_merge(conditions) -> None:
    pipeline = build_sana()
    family = build_family(pipeline)
    add_lora(pipeline.transformer, rank=2, alpha=2, targets=family.lora_targets, seed=0)
    trained = {name: p for name, p in pipeline.transformer.named_parameters() if p.requires_grad}
    # Per block four layers of each of two attentions and the outer two of the feed-forward, each with A and B.
    assert len(trained) == 2 * 3 * (8 + 2)
    with torch.no_grad():
        for index, parameter in enumerate(trained.values()):
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(index))
    denoiser = Denoiser(pipeline.transformer, family)
    t = torch.tensor([0.25, 0.9])
    before, plain = (
        denoiser(noise(), t, conditions[0]),
        Denoiser(build_sana().transformer, family)(noise(), t, conditions[0]),
    )
    merge_lora(pipeline.transformer)
    assert (denoiser(noise(), t, conditions[0]) - before).abs().max() < 1e-4 * before.abs().max()
    assert (before - plain).abs().max() > 1e-2


def test_guidance_embedding_starts_as_the_network_it_is_made_of(conditions) -> None:
    pipeline = build_sana(dense=True)
    family = build_family(pipeline)
    t = torch.tensor([0.25, 0.9])
    plain = Denoiser(pipeline.transformer, family)(noise(), t, conditions[0])
    state = torch.random.get_rng_state()
    guided: Any = with_guidance_embedding(pipeline.transformer)
    assert torch.equal(torch.random.get_rng_state(), state)
    for scale in (1.0, 4.5):
        told = replace(conditions[0], guidance=torch.full((2,), scale))
        assert (Denoiser(guided, family)(noise(), t, told) - plain).abs().max() < 1e-6
        # A network without the embedding does not look at the scale.
        assert torch.equal(Denoiser(pipeline.transformer, family)(noise(), t, told), plain)
    torch.nn.init.normal_(guided.time_embed.guidance_embedder.linear_2.weight, std=0.1)
    told = replace(conditions[0], guidance=torch.tensor([4.0, 5.0]))
    expected = guided(
        noise(),
        conditions[0].tokens,
        timestep=t,
        guidance=torch.tensor([0.4, 0.5]),
        encoder_attention_mask=conditions[0].token_mask,
        return_dict=False,
    )[0]
    assert (Denoiser(guided, family)(noise(), t, told) - expected).abs().max() < 1e-6
    assert (expected - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="condition has no guidance"):
        Denoiser(guided, family)(noise(), t, conditions[0])
    with pytest.raises(ValueError, match="guidance embedding already"):
        with_guidance_embedding(guided)


def test_stabilisers_keep_the_weights(conditions) -> None:
    pipeline = build_sana()
    network = pipeline.transformer
    changed = with_qk_norm(with_dense_time(network))
    assert changed.config["timestep_scale"] == 0.001
    assert changed.config["qk_norm"] == "rms_norm_across_heads"
    weights = changed.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())
    norms = [tensor for name, tensor in weights.items() if ".norm_" in name and name not in network.state_dict()]
    assert [tuple(norm.shape) for norm in norms] == [(16,)] * (3 * 2 * 2)
    assert all(bool((norm == 1).all()) for norm in norms)
    # Dense time is the same function at a thousand times the time.
    dense, t = with_dense_time(network), torch.tensor([0.25, 0.9])
    slow = Denoiser(dense, SanaFamily(time_scale=1.0))(noise(), t, conditions[0])
    fast = Denoiser(network, SanaFamily(time_scale=1000.0))(noise(), t / 1000, conditions[0])
    assert (slow - fast).abs().max() < 1e-6
    with pytest.raises(ValueError, match="dense already"):
        with_dense_time(dense)
    with pytest.raises(ValueError, match="rms_norm_across_heads"):
        with_qk_norm(changed)


def test_sprint_pipeline_has_a_family_without_a_teachers_grid(pipeline) -> None:
    parts: Any = {name: part for name, part in pipeline.components.items() if name != "scheduler"}
    sprint = SanaSprintPipeline(**parts, scheduler=SCMScheduler())  # pyright: ignore[reportArgumentType]
    family = build_family(sprint)
    assert family == SanaFamily(time_scale=1.0, sprint=True)
    assert family.initial_state(torch.ones(1), 1.0).item() == 1.0
    assert family.initial_state(torch.ones(1), 0.5).item() == pytest.approx(0.5**0.5)
    assert build_family(pipeline).initial_state(torch.ones(1), 0.5).item() == 1.0
    with pytest.raises(ValueError, match="few-step student"):
        family.teacher_grid(sprint, 4)
    a, b = (build_family(pipe).encode_prompts(pipe, PROMPTS) for pipe in (pipeline, sprint))
    assert torch.equal(a.text, b.text)
    assert torch.equal(build_family(sprint).encode_null(sprint).text, build_family(pipeline).encode_null(pipeline).text)
