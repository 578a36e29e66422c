"""What the published SANA-Sprint adds to the plain losses: a learned weight, and StyleGAN-T's heads."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.consistency.methods.scm import normalise_tangent, scm_loss
from fewstep.consistency.sana_sprint.config import SprintConsistencyConfig, SprintDiscriminatorConfig
from fewstep.consistency.time_weight import EmbeddingWeight
from fewstep.consistency.train import train_consistency, train_step
from fewstep.core.config import OptimizerConfig
from fewstep.core.networks.projected_heads import LocalNorm, ProjectedHead, ProjectedHeads
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.training.roles import evaluating, frozen
from tests.consistency.sana_sprint.tiny_sprint_run import HEADS, tiny_sprint, write_sprint_inputs
from tests.consistency.tiny_consistency_run import start_consistency
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint

PUBLISHED: dict[str, Any] = {
    "sana_sprint.consistency": SprintConsistencyConfig(check_tangent=False, learned_weight=True, normalizer=0.2),
    "sana_sprint.discriminator": SprintDiscriminatorConfig(optimizer=HEADS["optimizer"], head="projected"),
}


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return write_sprint_inputs(tmp_path_factory.mktemp("sana"))


def test_the_loss_is_the_published_one_for_data_of_half_the_size() -> None:
    """The code's loss: (1 / (sd tan)) / exp(l) |F - F' - g|^2 + l, a mean over all elements, with sd = 1/2, and its
    tangent normalised with c = 0.1; g of data of variance one is 1 / sd times as long, which makes c 0.2."""
    generator = torch.Generator().manual_seed(0)
    network = torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    tangent = torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64)
    t, variance = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), torch.tensor([0.3, -1.0, 2.0]).double()
    g = 0.5 * tangent
    g = g / (g.flatten(1).norm(dim=1)[:, None, None, None] + 0.1)
    tan = 0.5 * t / (1 - t)
    shape = (-1, 1, 1, 1)
    error = (network - network.detach() - g).square()
    published = (error / tan.view(shape) / variance.exp().view(shape) + variance.view(shape)).mean()
    prior = math.log(2) - torch.logit(t)
    found = scm_loss(network, normalise_tangent(tangent, constant=0.2), log_weight=prior - variance)
    torch.testing.assert_close(found.loss + prior.mean(), published, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(found.loss, network, retain_graph=True)
    (expected,) = torch.autograd.grad(published, network)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0)


def test_the_learned_weight_settles_at_minus_the_log_of_the_error() -> None:
    """The least exp(w) e - w is at w = -log e, here for two embeddings with errors 4 and 0.1."""
    weight, errors = EmbeddingWeight(2), torch.tensor([4.0, 0.1])
    assert weight(torch.eye(2)).tolist() == [0.0, 0.0]
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.02)
    for _ in range(2000):
        w = weight(torch.eye(2))
        loss = (w.exp() * errors - w).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(weight(torch.eye(2)), -errors.log(), rtol=0, atol=1e-3)


def test_a_run_as_published_moves_weight_student_and_heads_in_their_steps(sana: TinyInputs, tmp_path: Path) -> None:
    config = tiny_sprint(sana, tmp_path, changes=PUBLISHED)
    setup, trainer = start_consistency(config)
    assert setup.weight_role is not None
    assert setup.heads_role is not None
    roles = {"student": setup.student_role, "weight": setup.weight_role, "heads": setup.heads_role}

    def state() -> dict[str, Tensor]:
        kept = {n: [*(p for _, p in r.parameters), *r.buffers.values()] for n, r in roles.items()}
        return {name: torch.cat([tensor.detach().flatten().float() for tensor in kept[name]]) for name in kept}

    states, records = [state()], []
    for _ in range(2):
        records.append(train_step(config, setup, trainer))
        trainer.advance()
        states.append(state())
    trainer.close()
    moved = [{n: not torch.equal(a[n], b[n]) for n in a} for a, b in pairwise(states)]
    # The spectral norms are part of the heads' state, and stay in the student's step.
    assert moved == [
        {"student": True, "weight": True, "heads": False},
        {"student": False, "weight": False, "heads": True},
    ]
    assert records[0].keys() >= {"scm_loss", "log_weight", "adversarial_loss", "time_weight_grad_norm"}
    assert float(records[1]["discriminator_loss"]) == pytest.approx(1.0, abs=0.5)


@pytest.mark.slow
def test_a_run_as_published_resumes_exactly(sana: TinyInputs, tmp_path: Path) -> None:
    for steps in (2, 3):
        folder = tmp_path / f"resumed{steps}"
        assert train_consistency(tiny_sprint(sana, folder, changes={**PUBLISHED, "run.steps": steps})) == 0
        assert train_consistency(tiny_sprint(sana, folder, changes={**PUBLISHED, "run.resume": "latest"})) == 0
    assert train_consistency(tiny_sprint(sana, tmp_path / "straight", changes=PUBLISHED)) == 0
    straight = load_checkpoint(list_checkpoints(tmp_path / "straight")[-1])
    assert {"time_weight", "heads"} <= straight.tensors.keys()
    assert any("_u" in name for name in straight.tensors["heads"])
    for steps in (2, 3):
        assert_same_checkpoint(straight, load_checkpoint(list_checkpoints(tmp_path / f"resumed{steps}")[-1]))


def test_local_norms_share_statistics_in_eights_and_not_between_parts() -> None:
    norm, x = LocalNorm(3), torch.randn(20, 3, 5, generator=torch.Generator().manual_seed(0))
    found = norm(x, [16, 4])
    for part in (slice(0, 8), slice(8, 16), slice(16, 20)):
        expected = functional.batch_norm(x[part], None, None, training=True, eps=1e-5)
        torch.testing.assert_close(found[part], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(norm(x, [20])[16:], found[16:], atol=1e-3)


def test_heads_are_bounded_and_see_the_ring_of_tokens() -> None:
    head = ProjectedHead(6)
    features = torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(1))
    # A few calls in training mode, and the largest singular value of each weight is 1.
    for _ in range(60):
        head(features, [4])
    assert head(features, [4]).shape == (4, 12)
    for layer in (head.first, head.second, head.logit):
        assert isinstance(layer, nn.Module)
        matrix = layer.weight
        assert isinstance(matrix, Tensor)
        assert float(torch.linalg.matrix_norm(matrix.flatten(1), ord=2)) == pytest.approx(1.0, abs=1e-3)
    with evaluating(head):
        state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        head(features, [4])
        # Moved along the ring, the logits move with the tokens.
        rolled = head(features.roll(3, dims=2), [4])
        torch.testing.assert_close(rolled, head(features, [4]).roll(3, dims=1), rtol=1e-4, atol=1e-5)
    assert head.training
    assert all(torch.equal(state[name], tensor) for name, tensor in head.state_dict().items())
    heads = ProjectedHeads([6, 4], seed=3)
    maps = [features, torch.randn(4, 4, 12)]
    again = ProjectedHeads([6, 4], seed=3)
    assert heads(maps).shape == (4, 24)
    torch.testing.assert_close(again(maps, [4]), ProjectedHeads([6, 4], seed=3)(maps), rtol=0, atol=0)
    with frozen(heads):
        assert not any(parameter.requires_grad for parameter in heads.parameters())


def test_settings_that_nothing_reads_are_named() -> None:
    with pytest.raises(ValueError, match="head_width is 8, which head 'projected' does not read"):
        SprintDiscriminatorConfig(optimizer=OptimizerConfig(learning_rate=1e-3), head="projected", head_width=8)
