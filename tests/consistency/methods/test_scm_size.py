"""The update that sCM asks for does not depend on the size of the latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from fewstep.consistency.methods.scm import normalise_tangent, scm_loss
from fewstep.core.config import OptimizerConfig
from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trainer import Trainer
from fewstep.core.training.watch import grad_over_eps
from tests.core.training.toy_run import run_config

EPS, WIDTH = 1e-8, 64


def build_network() -> SD3Transformer2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=64,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=32,
            pos_embed_max_size=64,
        )


def first_step(network: SD3Transformer2DModel, side: int, reduction: str) -> float:
    """Adam's first step over its rate, the mean over all weights: |g| / (|g| + eps)."""
    generator = torch.Generator().manual_seed(side)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    network.zero_grad()
    velocity = network(
        draw(2, 4, side, side),
        encoder_hidden_states=draw(2, 8, 32),
        pooled_projections=draw(2, 32),
        timestep=torch.tensor([300.0, 700.0]),
        return_dict=False,
    )[0]
    direction = normalise_tangent(draw(*velocity.shape))
    scm_loss(velocity, direction, reduction=reduction).loss.backward()  # pyright: ignore[reportArgumentType]
    gradients = [weight.grad.abs() for weight in network.parameters() if weight.grad is not None]
    steps = sum(float((one / (one + EPS)).sum()) for one in gradients)
    return steps / sum(one.numel() for one in gradients)


@pytest.mark.slow
def test_the_first_step_is_the_same_at_all_sizes() -> None:
    network = build_network()
    found = {reduction: [first_step(network, side, reduction) for side in (8, 32, 64)] for reduction in ("mean", "sum")}
    assert max(found["sum"]) / min(found["sum"]) < 1.05
    assert min(found["sum"]) > 0.95
    # The fault: a mean over a direction of length 1 leaves half of the rate.
    assert max(found["mean"]) / min(found["mean"]) > 1.5
    # As docs/methods/scm.md has them.
    assert found["mean"] == pytest.approx([0.906, 0.631, 0.518], abs=0.01)
    assert found["sum"] == pytest.approx([0.984, 0.975, 0.964], abs=0.01)


def test_gradients_are_held_against_eps(tmp_path: Path) -> None:
    trainer = Trainer(run_config(tmp_path), RunDirectory(str(tmp_path), resume=None), cpu=True)
    role = trainer.add_role("student", torch.nn.Linear(3, 4), OptimizerConfig(learning_rate=0.1, eps=1e-6))
    # 16 numbers: a norm of 4 is a root mean square of 1.
    assert grad_over_eps(4.0, role) == pytest.approx(1e6)
    assert grad_over_eps(None, role) is None
    trainer.close()
