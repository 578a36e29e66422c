"""Trunk, features and heads of the fake score."""

import math

import pytest
import torch
from torch.nn import functional

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.discriminator import DiscriminatorHeads, build_heads
from fewstep.core.fake_score import FakeScore
from fewstep.core.families.table import build_family
from tests.tiny_pipelines import LATENT_SHAPE, build_sd3, build_sd15


def build(builder=build_sd3) -> tuple[Denoiser, Condition]:
    pipeline = builder()
    family = build_family(pipeline)
    return Denoiser(family.network(pipeline), family), family.encode_prompts(pipeline, ["cat", "dog"])


def test_without_heads_it_is_the_denoiser() -> None:
    denoiser, condition = build()
    x_t, t = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.4, 0.6])
    output = FakeScore(denoiser)(x_t, t, condition)
    assert output.logits is None
    assert torch.equal(output.velocity, denoiser(x_t, t, condition))


@pytest.mark.parametrize(("builder", "blocks"), [(build_sd3, None), (build_sd3, [0, 2]), (build_sd15, None)])
def test_logits_start_at_chance_and_train_trunk_and_heads(builder, blocks) -> None:
    denoiser, condition = build(builder)
    discriminator = build_heads(denoiser, blocks, width=8, seed=3)
    fake_score = FakeScore(denoiser, heads=discriminator, blocks=blocks)
    x_t, t = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.4, 0.6])
    output = fake_score(x_t, t, condition)
    assert output.logits is not None
    assert torch.equal(output.velocity, denoiser(x_t, t, condition))
    assert output.logits.tolist() == [0.0, 0.0]
    chance = functional.softplus(output.logits).mean() + functional.softplus(-output.logits).mean()
    assert chance.item() == pytest.approx(2 * math.log(2), abs=1e-6)
    optimizer = torch.optim.SGD(fake_score.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        logits = fake_score(x_t, t, condition).logits
        assert logits is not None
        functional.softplus(torch.tensor([1.0, -1.0]) * logits).sum().backward()
        optimizer.step()
    trunk = [p.grad.abs().max().item() for p in denoiser.parameters() if p.grad is not None]
    heads = [p.grad.abs().max().item() for p in discriminator.parameters() if p.grad is not None]
    assert max(trunk) > 0
    assert min(heads) > 0
    assert len(heads) == 8 * (1 if blocks is None else 2)


def test_adversarial_gradient_reaches_the_input_of_a_frozen_fake_score() -> None:
    denoiser, condition = build()
    heads = build_heads(denoiser, None, width=8, seed=0)
    torch.nn.init.normal_(heads.get_parameter("heads.0.logit.weight"))
    fake_score = FakeScore(denoiser, heads=heads).requires_grad_(False)
    x_t = torch.randn(2, *LATENT_SHAPE, requires_grad=True)
    fake_score(x_t, torch.tensor([0.4, 0.6]), condition).logits.sum().backward()
    assert x_t.grad is not None
    assert x_t.grad.abs().max() > 0
    assert all(p.grad is None for p in fake_score.parameters())


def test_heads_depend_on_their_seed_alone() -> None:
    states = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        states.append(DiscriminatorHeads([16, 24], width=8, seed=seed).state_dict())
        assert torch.equal(torch.random.get_rng_state(), before)
    assert len(states[0]) == 16
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["heads.0.first.weight"], states[2]["heads.0.first.weight"])
    assert not torch.equal(states[0]["heads.0.second.weight"], states[0]["heads.1.second.weight"])


def test_logit_is_the_mean_over_positions_and_heads() -> None:
    heads = DiscriminatorHeads([4, 4], width=8, seed=0)
    for place in range(2):
        torch.nn.init.normal_(heads.get_parameter(f"heads.{place}.logit.weight"))
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 7)
    logits = heads([a, b])
    assert logits.shape == (3,)
    assert torch.allclose(logits, (heads.heads[0](a) + heads.heads[1](b)) / 2)
    each = torch.stack([heads.heads[0](a[:, :, n : n + 1]) for n in range(5)])
    assert torch.allclose(heads.heads[0](a), each.mean(dim=0), atol=1e-6)
    assert heads([a.bfloat16(), b.bfloat16()]).dtype == torch.float32


def test_wrong_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one feature map"):
        DiscriminatorHeads([], width=8, seed=0)
    with pytest.raises(ValueError, match="1 heads got 2 feature maps"):
        DiscriminatorHeads([4], width=8, seed=0)([torch.zeros(1, 4, 2)] * 2)
    denoiser, _ = build()
    with pytest.raises(ValueError, match="from 0 to 2"):
        FakeScore(denoiser, blocks=[5])
