"""Precision, features and guidance of the wrapper around a network."""

import copy

import pytest
import torch
from torch import nn

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser, guided_velocity
from fewstep.core.families.table import build_family
from tests.tiny_pipelines import LATENT_SHAPE, build_sd3, build_sd15, build_sdxl

PROMPTS = ["a red cat", "dog 12"]
BUILDERS = {"sd3": build_sd3, "sd15": build_sd15, "sdxl": build_sdxl}


def build(name: str = "sd3") -> tuple[Denoiser, Condition, Condition]:
    """A denoiser, a batch of two conditions and the null condition."""
    pipeline = BUILDERS[name]()
    family = build_family(pipeline)
    return (
        Denoiser(family.network(pipeline), family),
        family.encode_prompts(pipeline, PROMPTS),
        family.encode_null(pipeline),
    )


class CountCalls(nn.Module):
    """Stands where a wrapper would and notes the batch size of each call."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.batches: list[int] = []

    def forward(self, x_t, t, condition):
        self.batches.append(len(x_t))
        return self.denoiser(x_t, t, condition)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_x0_is_on_the_line_of_the_velocity(name: str) -> None:
    denoiser, condition, _ = build(name)
    x_t, t = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.2, 0.8])
    expected = x_t - t.view(2, 1, 1, 1) * denoiser(x_t, t, condition)
    assert torch.equal(denoiser.x0(x_t, t, condition), expected)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_half_precision_network_gets_an_exact_time(name: str) -> None:
    denoiser, condition, _ = build(name)
    x_t = torch.randn(2, *LATENT_SHAPE)
    seen: list[torch.Tensor] = []

    def note_time(module, arguments, keywords):
        seen.append(keywords["timestep"] if "timestep" in keywords else arguments[1])

    low = denoiser.copy().to(torch.bfloat16)
    for network in (denoiser.network, low.network):
        network.register_forward_pre_hook(note_time, with_kwargs=True)
    # In bf16 these two times are equal and both are 0.5.
    t = torch.tensor([0.5, 0.5009])
    reference = denoiser(x_t, t, condition)
    velocity = low(x_t, t, condition)
    assert seen[1].dtype == torch.float32
    assert torch.equal(seen[0], seen[1])
    assert seen[1][0] != seen[1][1]
    assert velocity.dtype == torch.float32
    assert (velocity - reference).abs().max() < 0.1 * reference.abs().max()
    # Inputs of lower precision are lifted before the time is used.
    lifted = low(x_t.bfloat16(), t, condition.to(dtype=torch.bfloat16))
    assert lifted.dtype == torch.float32
    assert low.x0(x_t.bfloat16(), t, condition).dtype == torch.float32


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_mixed_precision_computes_in_bf16_around_an_fp32_frame(name: str) -> None:
    denoiser, condition, _ = build(name)
    x_t, t = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.3, 0.7])
    reference = denoiser(x_t, t, condition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = denoiser(x_t, t, condition)
    assert velocity.dtype == torch.float32
    assert 0 < (velocity - reference).abs().max() < 0.1 * reference.abs().max()


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_double_precision_stays_double(name: str) -> None:
    denoiser, condition, _ = build(name)
    x_t, t = torch.randn(2, *LATENT_SHAPE, dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)
    single = denoiser(x_t, t, condition)
    double = denoiser.copy().double()(x_t, t, condition)
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    assert (single - double).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "positions"), [("sd3", 16), ("sd15", 16), ("sdxl", 16)])
def test_features_come_from_the_same_call_and_leave_no_hook(name: str, positions: int) -> None:
    denoiser, condition, _ = build(name)
    x_t, t = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.4, 0.6])
    velocity, features = denoiser.velocity_and_features(x_t, t, condition)
    assert torch.equal(velocity, denoiser(x_t, t, condition))
    assert [feature.shape for feature in features] == [(2, 16, positions)]
    assert sum(len(module._forward_hooks) for module in denoiser.modules()) == 0
    features[0].square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in denoiser.parameters())


def test_features_follow_the_order_of_the_blocks() -> None:
    denoiser, condition, _ = build()
    x_t, t = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.4, 0.6])
    _, (last, first) = denoiser.velocity_and_features(x_t, t, condition, [2, 0])
    _, (only,) = denoiser.velocity_and_features(x_t, t, condition, [0])
    assert torch.equal(first, only)
    assert (last - first).abs().max() > 1e-3


def test_hooks_are_removed_when_the_call_fails() -> None:
    denoiser, condition, _ = build()
    with pytest.raises(RuntimeError):
        denoiser.velocity_and_features(torch.randn(2, 3, 8, 8), torch.ones(2), condition)
    assert sum(len(module._forward_hooks) for module in denoiser.modules()) == 0


def test_features_under_gradient_checkpointing() -> None:
    x_t, t = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.4, 0.6])
    gradients = []
    for checkpointing in (False, True):
        pipeline = build_sd3()
        family = build_family(pipeline)
        condition = family.encode_prompts(pipeline, PROMPTS)
        trained = Denoiser(pipeline.transformer.train(), family)
        if checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        velocity, features = trained.velocity_and_features(x_t, t, condition)
        (velocity.square().sum() + features[0].square().sum()).backward()
        gradients.append(trained.network.get_parameter("pos_embed.proj.weight").grad)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[0].abs().max()


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_guidance_is_u_plus_w_c_minus_u_in_one_call(name: str) -> None:
    denoiser, condition, null = build(name)
    x_t, t = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.2, 0.9])
    c, u = denoiser(x_t, t, condition), denoiser(x_t, t, null.expand(2))
    counter = CountCalls(denoiser)
    for guidance in (0.0, 1.0, 4.5):
        expected = u + guidance * (c - u)
        guided = guided_velocity(counter, x_t, t, condition, null, guidance)
        assert (guided - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    assert counter.batches == [4, 2, 4]


def test_copy_has_its_own_trainable_weights() -> None:
    denoiser, condition, _ = build()
    denoiser.requires_grad_(False)
    twin = denoiser.copy()
    frozen = denoiser.copy(trainable=False)
    before = copy.deepcopy(denoiser.state_dict())
    assert all(p.requires_grad for p in twin.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], value) for name, value in denoiser.state_dict().items())
    x_t, t = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.4, 0.6])
    # The copy keeps the attention that reads token counts.
    assert torch.equal(frozen(x_t, t, condition), denoiser(x_t, t, condition))
