"""The learned weight of a time: 1 at the start, and minus the log of the mean error at the end."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fewstep.consistency.methods.scm import scm_loss
from fewstep.consistency.sections import ScmConfig
from fewstep.consistency.time_weight import build_time_weight
from fewstep.consistency.train import train_step
from tests.consistency.tiny_consistency_run import start_consistency, tiny_consistency
from tests.dmd.tiny_run import TinyInputs


def test_it_starts_at_one_and_depends_on_its_seed_alone() -> None:
    t = torch.linspace(0, 1, 9)
    before = torch.random.get_rng_state()
    one, same, other = (build_time_weight(seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one(t).tolist() == [0.0] * 9
    assert torch.equal(one.hidden.weight, same.hidden.weight)
    assert not torch.equal(one.hidden.weight, other.hidden.weight)


def test_it_learns_minus_the_log_of_the_error_at_each_time() -> None:
    weight = build_time_weight(0).double()
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    # Errors of a known size at each time: the tangent's mean square is 0.2 + t.
    tangent = (0.2 + t).sqrt()[:, None].expand(-1, 5)
    output = torch.zeros_like(tangent)
    optimizer = torch.optim.Adam(weight.parameters(), lr=1e-2)
    for _ in range(1500):
        optimizer.zero_grad()
        scm_loss(output, tangent, log_weight=weight(t)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (weight(t) + (0.2 + t).log()).abs().max() < 0.02
    # At the best weight the weighted error is 1 at every time, so the gradients of all times have one size.
    student = torch.zeros_like(tangent, requires_grad=True)
    scm_loss(student, tangent, log_weight=weight(t).detach()).loss.backward()
    assert student.grad is not None
    sizes = student.grad.norm(dim=1) * tangent.norm(dim=1)
    assert (sizes / sizes.mean() - 1).abs().max() < 0.03


def test_it_is_trained_beside_the_student(inputs: TinyInputs, tmp_path: Path) -> None:
    setup, trainer = start_consistency(tiny_consistency(inputs, tmp_path, "scm_weight"))
    assert setup.weight_role is not None
    parts = (setup.student_role.module, setup.weight_role.module)
    before = [[parameter.detach().clone() for parameter in part.parameters()] for part in parts]
    metrics = train_step(tiny_consistency(inputs, tmp_path, "scm_weight"), setup, trainer)
    assert metrics["log_weight"] == 0.0
    assert metrics["time_weight_grad_norm"] > 0
    for part, values in zip(parts, before, strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(part.parameters(), values, strict=True))
    trainer.close()


def test_it_belongs_to_scm(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_consistency(inputs, tmp_path, "rcm")
    with pytest.raises(ValueError, match="it would change the ratio of the two losses"):
        dataclasses.replace(config, scm=ScmConfig(learned_weight=True))
