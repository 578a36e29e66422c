"""SANA with a ControlNet: the family against the stock pipeline, tangents, features, and what it starts from."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.denoiser import guided_velocity
from fewstep.core.families.sana_control import ControlledSana, SanaControlFamily, controlnet_of, with_controlnet
from fewstep.core.families.table import build_family
from fewstep.core.tangents.network import check_denoiser_jvp, use_jvp_attention
from fewstep.core.teacher import Teacher
from tests.tiny_sana import LATENT_SHAPE, PIXELS, build_controlled_sana, build_sana

PROMPTS = ["the digit seven", "a bold two"]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(build_controlled_sana(), path="tiny")


def told(teacher: Teacher, seed: int = 0) -> tuple[Tensor, Condition]:
    """Control pictures in [0, 1], and the prompts with their latents."""
    pixels = torch.rand((2, 3, PIXELS, PIXELS), generator=torch.Generator().manual_seed(seed))
    return pixels, teacher.encode(PROMPTS).with_control(teacher.encode_pixels(pixels))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_teacher_equals_the_stock_pipeline(teacher: Teacher, guidance: float) -> None:
    pixels, condition = told(teacher)
    latents = torch.randn((2, *LATENT_SHAPE), generator=torch.Generator().manual_seed(1))
    own = teacher.sample(latents, condition, steps=3, guidance=guidance)
    pipeline: Any = teacher.pipeline
    stock = pipeline(
        PROMPTS,
        control_image=2 * pixels - 1,
        latents=latents.clone(),
        sigmas=[1.0, 2 / 3, 1 / 3],
        num_inference_steps=3,
        guidance_scale=guidance,
        height=PIXELS,
        width=PIXELS,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    assert (stock - own).abs().max() < 2e-4 * own.abs().max()


def test_velocity_is_that_of_both_networks_by_hand(teacher: Teacher) -> None:
    _, condition = told(teacher)
    x_t = torch.randn((2, *LATENT_SHAPE), generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0.2, 0.8])
    pipeline: Any = teacher.pipeline
    text = {"encoder_hidden_states": condition.tokens, "encoder_attention_mask": condition.token_mask}
    with torch.no_grad():
        residuals = pipeline.controlnet(x_t, timestep=t, controlnet_cond=condition.control, return_dict=False, **text)
        expected = pipeline.transformer(
            x_t, timestep=t, controlnet_block_samples=tuple(residuals[0]), return_dict=False, **text
        )[0]
        found = teacher.denoiser(x_t, t, condition)
        other = teacher.denoiser(x_t, t, told(teacher, seed=5)[1])
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found - other).abs().max() > 1e-2


def test_guidance_keeps_the_picture_on_both_sides(teacher: Teacher) -> None:
    _, condition = told(teacher)
    x_t, t = torch.randn((2, *LATENT_SHAPE), generator=torch.Generator().manual_seed(3)), torch.tensor([0.4, 0.6])
    with torch.no_grad():
        found = guided_velocity(teacher.denoiser, x_t, t, condition, teacher.null_condition, 3.0)
        assert condition.control is not None
        null = teacher.null_condition.expand(2).with_control(condition.control)
        a, b = teacher.denoiser(x_t, t, condition), teacher.denoiser(x_t, t, null)
    assert torch.allclose(found, b + 3 * (a - b), atol=1e-4)


def test_tangents_and_features_pass_through_both(teacher: Teacher) -> None:
    student = teacher.denoiser.copy()
    use_jvp_attention(student.network)
    _, condition = told(teacher)
    x_t, t = torch.randn((2, *LATENT_SHAPE), generator=torch.Generator().manual_seed(4)), torch.tensor([0.3, 0.7])
    check = check_denoiser_jvp(student, x_t, t, condition)
    assert check.state.error < 1e-2
    assert check.time.error < 1e-2
    with torch.no_grad():
        velocity, features = teacher.denoiser.velocity_and_features(x_t, t, condition, (0, 2))
        assert torch.allclose(velocity, student(x_t, t, condition), atol=1e-4)
    assert [tuple(feature.shape) for feature in features] == [(2, 16, 16), (2, 16, 16)]
    assert teacher.family.feature_channels(teacher.denoiser.network, None) == [16, 16, 16]
    network: Any = student.network
    assert all(name.startswith(("transformer.", "controlnet.")) for name in network.attn_processors)


def test_a_fresh_controlnet_adds_nothing_and_starts_as_the_first_blocks() -> None:
    plain: Any = build_sana(dense=True)
    before = Teacher(plain, path="plain")
    teacher = Teacher(with_controlnet(plain, layers=2), path="controlled")
    assert build_family(teacher.pipeline) == SanaControlFamily(time_scale=1.0)
    assert isinstance(teacher.denoiser.network, ControlledSana)
    _, condition = told(teacher)
    x_t, t = torch.randn((2, *LATENT_SHAPE), generator=torch.Generator().manual_seed(6)), torch.tensor([0.1, 0.9])
    with torch.no_grad():
        assert torch.equal(before.denoiser(x_t, t, condition), teacher.denoiser(x_t, t, condition))
    mine: Any = teacher.pipeline
    first = mine.controlnet.transformer_blocks[1].attn2.to_q.weight
    assert torch.equal(first, plain.transformer.transformer_blocks[1].attn2.to_q.weight)


def test_what_does_not_fit_is_named(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="called at 1000 t"):
        with_controlnet(build_sana(), layers=2)
    for layers in (0, 3):
        with pytest.raises(ValueError, match=f"layers is {layers}; choose 1 to 2 of 3 blocks"):
            controlnet_of(build_sana(dense=True).transformer, layers=layers)
    with pytest.raises(ValueError, match="learnt a variance"):
        build_family(with_controlnet(build_sana(dense=True, learnt_variance=True), layers=1))
    x_t, t = torch.zeros((2, *LATENT_SHAPE)), torch.tensor([0.4, 0.6])
    with pytest.raises(ValueError, match="needs a control picture"):
        teacher.denoiser(x_t, t, teacher.encode(PROMPTS))
    with pytest.raises(ValueError, match=r"control must be \[2, C, h, w\]"):
        teacher.encode(PROMPTS).with_control(torch.zeros(1, *LATENT_SHAPE))
    condition = told(teacher)[1]
    with pytest.raises(ValueError, match="conditions differ in control"):
        Condition.cat([condition, replace(condition, control=None)])
    rows = condition.index(torch.tensor([1, 1, 0])).control
    assert rows is not None
    assert condition.control is not None
    assert torch.equal(rows, condition.control[[1, 1, 0]])
