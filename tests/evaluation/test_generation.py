"""Images depend on (seed, index) alone, and the shortened prompts change nothing."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

from fewstep.core.families.sd3 import zero_t5
from fewstep.core.randomness import sample_noise
from fewstep.evaluation.generation import StockCall, generate, load_pipeline, plain_call
from fewstep.evaluation.systems import StepGrid, System
from tests.tiny_pipelines import T5_WIDTH, build_sd3, build_sd15, build_sdxl

PROMPTS = ["a cat", "two dogs", "a cat", "", "one bird"]
INDICES = [4, 0, 17, 3, 9]


def stochastic_sd3(*, steps: int = 2):
    pipeline: Any = build_sd3()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    if steps > 1:
        # With a single step the terminal shift would divide by zero.
        pipeline.scheduler.register_to_config(shift_terminal=0.5)
    return pipeline


def draw(pipeline, *, batch_size=64, steps=2, guidance=1.0, seed=0, prompts=PROMPTS, indices=INDICES):
    return generate(
        pipeline, prompts, indices=indices, seed=seed, steps=steps, guidance=guidance, batch_size=batch_size
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("with_t5", [False, True])
@torch.no_grad()
def test_sd3_equals_the_plain_call(with_t5: bool, guidance: float) -> None:
    pipeline: Any = build_sd3(with_t5=with_t5)
    drawn = draw(pipeline, steps=3, guidance=guidance)
    latents = sample_noise(0, INDICES, (4, 8, 8), stream="latents")
    plain = pipeline(PROMPTS, latents=latents, num_inference_steps=3, guidance_scale=guidance, output_type="pt").images
    assert drawn.shape == (5, 3, 16, 16)
    assert (drawn - plain).abs().max() < 1e-5
    assert plain.std() > 0.01


@pytest.mark.parametrize(("real_t5", "tokens"), [(False, 78), (True, 333)])
@torch.no_grad()
def test_t5_of_zero_weights_is_shortened_and_equals_the_plain_call(real_t5: bool, tokens: int) -> None:
    pipeline: Any = build_sd3(with_t5=real_t5)
    if not real_t5:
        encoder, tokenizer = zero_t5(T5_WIDTH)
        pipeline.register_modules(text_encoder_3=encoder, tokenizer_3=tokenizer)
    latents = sample_noise(0, INDICES, (4, 8, 8), stream="latents")
    plain = pipeline(PROMPTS, latents=latents, num_inference_steps=2, guidance_scale=3.0, output_type="pt").images
    lengths = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda module, inputs, keywords: lengths.append(keywords["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    drawn = draw(pipeline, steps=2, guidance=3.0)
    handle.remove()
    assert lengths == [tokens, tokens]
    assert (drawn - plain).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sd3_with_noise_between_steps_does_not_depend_on_the_batch(steps: int) -> None:
    pipeline: Any = stochastic_sd3(steps=steps)
    whole = draw(pipeline, steps=steps)
    for batch_size in (1, 2, 3):
        assert (draw(pipeline, steps=steps, batch_size=batch_size) - whole).abs().max() < 1e-5
    order = [3, 1, 4, 0, 2]
    turned = draw(pipeline, steps=steps, prompts=[PROMPTS[i] for i in order], indices=[INDICES[i] for i in order])
    assert (turned - whole[order]).abs().max() < 1e-5


def build_unet(scheduler):
    pipeline: Any = build_sd15()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [LCMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_stochastic_unet_schedulers_do_not_depend_on_the_batch(scheduler) -> None:
    pipeline: Any = build_unet(scheduler)
    whole = draw(pipeline, steps=3, guidance=3.0)
    assert (draw(pipeline, steps=3, guidance=3.0, batch_size=2) - whole).abs().max() < 1e-5
    assert (draw(pipeline, steps=3, guidance=3.0, batch_size=1) - whole).abs().max() < 1e-5
    assert (draw(pipeline, steps=3, guidance=3.0, seed=1) - whole).abs().max() > 1e-3


@torch.no_grad()
def test_sdxl_equals_the_plain_call() -> None:
    pipeline: Any = build_sdxl()
    latents = sample_noise(5, [0, 1], (4, 8, 8), stream="latents")
    plain = pipeline(
        ["a cat", "x"], latents=latents, num_inference_steps=2, guidance_scale=3.0, output_type="pt"
    ).images
    drawn = draw(pipeline, steps=2, guidance=3.0, seed=5, prompts=["a cat", "x"], indices=[0, 1])
    assert (drawn - plain).abs().max() < 1e-5


def test_noise_between_steps_is_standard_normal_and_follows_seed_and_index() -> None:
    """A network that answers 0 leaves x0 = x, so two steps at 1 and 0.5 return (latents + noise) / 2."""
    pipeline: Any = stochastic_sd3()
    torch.nn.init.zeros_(pipeline.transformer.proj_out.weight)
    torch.nn.init.zeros_(pipeline.transformer.proj_out.bias)
    seen = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    indices = list(range(64))
    draw(pipeline, prompts=["a"] * 64, indices=indices, seed=7)
    config = pipeline.vae.config
    final = (seen[0] - config.shift_factor) * config.scaling_factor
    latents = sample_noise(7, indices, (4, 8, 8), stream="latents")
    noise = 2.0 * final - latents
    assert noise.mean().abs() < 4.0 / (64 * 256) ** 0.5
    assert abs(noise.std().item() - 1.0) < 0.03
    rows = torch.cat([noise, latents]).flatten(1)
    correlation = torch.corrcoef(rows) - torch.eye(128)
    assert correlation.abs().max() < 6.0 / 256**0.5
    seen.clear()
    draw(pipeline, prompts=["b"], indices=[40], seed=7)
    assert (seen[0] - (final[40:41] / config.scaling_factor + config.shift_factor)).abs().max() < 1e-5


def test_same_index_and_prompt_give_the_same_image_and_another_seed_does_not() -> None:
    pipeline: Any = stochastic_sd3()
    twins = draw(pipeline, prompts=["a cat"] * 2, indices=[4, 4])
    assert (twins[0] - twins[1]).abs().max() < 1e-5
    other = draw(pipeline, prompts=["a cat"], indices=[4], seed=1)
    assert (twins[:1] - other).abs().max() > 1e-3


def test_pipeline_is_left_as_it_was() -> None:
    pipeline: Any = stochastic_sd3()
    scheduler, processors = pipeline.scheduler, pipeline.transformer.attn_processors
    state = torch.get_rng_state()
    draw(pipeline)
    assert pipeline.scheduler is scheduler
    assert pipeline.transformer.attn_processors == processors
    assert len(processors) == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert pipeline.config["scheduler"] == ("diffusers", "FlowMatchEulerDiscreteScheduler")


class GlobalNoiseScheduler(FlowMatchEulerDiscreteScheduler):
    """A scheduler without a generator argument, as users write them."""

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_output, timestep, sample, return_dict=True
    ):
        previous = super().step(model_output, timestep, sample, return_dict=False)[0]
        return (previous + 0.1 * torch.randn(previous.shape),)


def test_scheduler_that_draws_globally_is_an_error_unless_alone_in_its_batch() -> None:
    pipeline: Any = build_sd3()
    pipeline.scheduler = GlobalNoiseScheduler()
    with pytest.raises(ValueError, match="GlobalNoiseScheduler draws from torch's global generator"):
        draw(pipeline)
    alone = draw(pipeline, batch_size=1)
    again = draw(pipeline, batch_size=1, prompts=PROMPTS[2:], indices=INDICES[2:])
    assert (alone[2:] - again).abs().max() < 1e-5


@torch.no_grad()
def test_step_grid_reaches_the_pipeline() -> None:
    pipeline: Any = build_sd3(shift=1.0)
    calls = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda module, inputs, keywords: calls.append(float(keywords["timestep"][0])), with_kwargs=True
    )
    grid = StepGrid(sigmas=(1.0, 0.7, 0.2))
    generate(pipeline, ["x"], indices=[0], seed=0, steps=3, guidance=1.0, grid=grid)
    assert calls == pytest.approx([1000.0, 700.0, 200.0])
    calls.clear()

    class Held:
        def get(self, path: str, dtype: str) -> Any:
            assert (path, dtype) == ("folder", "float32")
            return pipeline

        def holds(self, path: str, dtype: str) -> bool:
            return True

    call = StockCall(Held(), System("s", "folder", 3, 1.0, grid), "float32", ("x", "y"))
    assert call.prepare() is False
    assert call.run().shape == (2, 3, 16, 16)
    assert call.images == 2
    assert calls == pytest.approx([1000.0, 700.0, 200.0])
    handle.remove()


@pytest.mark.parametrize(
    ("prompts", "indices", "steps", "batch_size", "message"),
    [
        (["a"], [0, 1], 1, 1, "1 prompts for 2 indices"),
        ([], [], 1, 1, "0 prompts"),
        (["a"], [0], 0, 1, "steps is 0"),
        (["a"], [0], 1, 0, "batch_size 0"),
    ],
)
def test_bad_numbers_are_errors(prompts, indices, steps, batch_size, message) -> None:
    with pytest.raises(ValueError, match=message):
        draw(build_sd3(), prompts=prompts, indices=indices, steps=steps, batch_size=batch_size)


def test_load_pipeline(pipeline_folder, tmp_path) -> None:
    pipeline: Any = load_pipeline(pipeline_folder)
    with torch.no_grad():
        pixels = plain_call(pipeline, ["the digit one"] * 2, steps=1, guidance=1.0)
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels.min() >= 0.0
    assert pixels.max() <= 1.0
    with pytest.raises(ValueError, match="no directory"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)
