"""Short trainings whose answer is known, and samplers with the exact functions."""

import pytest
import torch
from studies.consistency_toy import (
    CONSISTENCY,
    OBJECTIVES,
    ToyBatch,
    ToyNetwork,
    ToyObjective,
    ToySettings,
    run_toy,
    toy_errors,
    toy_loss,
    train_toy,
)
from studies.toy_mixture import Mixture
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.student import Student
from tests.consistency.analytic import BIMODAL, Gaussian, fp64

NORMAL = Mixture((1.0,), (0.7,), (1.6,))


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("teacher", [NORMAL, BIMODAL], ids=["gaussian", "mixture"])
def test_short_training_reaches_the_truth(teacher: Mixture, objective: ToyObjective) -> None:
    errors = run_toy(teacher, ToySettings(objective, steps=350, pretraining=100, batch=256))
    # About a twentieth of the default training, which reaches 0.01 with every objective on both teachers.
    assert errors.mean < (0.08 if objective in ("scm_flow", "anyflow") else 0.05)


@pytest.mark.slow
def test_the_teacher_itself_is_far_from_the_truth() -> None:
    teacher = train_toy(NORMAL, ToySettings("scm_flow", steps=0, pretraining=600, batch=256))
    x, t = torch.randn(64), torch.full((64,), 0.7)
    torch.testing.assert_close(teacher.velocity(x, t), NORMAL.velocity(x, t), rtol=0, atol=0.2)
    assert toy_errors(teacher, NORMAL, consistency=True).mean > 0.2
    assert toy_errors(teacher, NORMAL, consistency=False).mean > 0.1
    plain = train_toy(BIMODAL, ToySettings("scm_flow", steps=0, pretraining=400, batch=256))
    assert toy_errors(plain, BIMODAL, consistency=True).mean > 0.1
    assert toy_errors(plain, BIMODAL, consistency=False).mean > 0.1


class Exact(nn.Module):
    """Called like a denoiser; its velocity makes the consistency function exact."""

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return Gaussian().flow_student(x, t.view(-1, 1))


def test_errors_of_the_exact_map_are_zero() -> None:
    class ExactToy(ToyNetwork):
        def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return Gaussian().average_velocity(x, t, r)

    network = ExactToy(2)
    assert toy_errors(network, NORMAL, consistency=True).largest < 1e-5
    assert toy_errors(network, NORMAL, consistency=False).largest < 1e-5


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.5), (1.0, 0.9, 0.75, 0.5), (1.0, 0.02)])
def test_exact_consistency_sampler_gives_the_data(times: tuple[float, ...]) -> None:
    n = 100_000
    noise, *renoise = torch.randn(len(times), n, 1, dtype=torch.float64)
    condition = Condition(torch.zeros(n, 1, 1))
    x0 = Student(Exact(), times).sample(noise, condition, renoise)  # type: ignore[arg-type]
    assert x0.mean().item() == pytest.approx(0.7, abs=0.02)
    assert x0.std().item() == pytest.approx(1.6, abs=0.015)


def test_unscaled_noise_below_one_is_too_wide() -> None:
    # x = eps taken as the state at 80/81: f* is linear, so two points give mean and standard deviation.
    t = fp64(80 / 81)
    ends = torch.cat([Gaussian().consistency(fp64(sign), t) for sign in (-1.0, 1.0)])
    assert ends.mean().item() == pytest.approx(0.686, abs=1e-3)
    assert (0.5 * (ends[1] - ends[0])).item() == pytest.approx(1.618, abs=2e-3)
    scaled = torch.cat([Gaussian().consistency(sign * t, t) for sign in (-1.0, 1.0)])
    assert (0.5 * (scaled[1] - scaled[0])).item() == pytest.approx(1.598, abs=2e-3)


def test_training_repeats_from_its_seed_and_reports() -> None:
    losses: list[float] = []
    settings = ToySettings("meanflow", steps=3, pretraining=2, batch=16, width=8)
    first = train_toy(NORMAL, settings, lambda step, loss: losses.append(loss))
    second = train_toy(NORMAL, settings)
    assert len(losses) == 5
    assert torch.equal(first(*torch.ones(3, 4)), second(*torch.ones(3, 4)))
    other = train_toy(NORMAL, ToySettings("meanflow", steps=3, pretraining=2, batch=16, width=8, seed=1))
    assert not torch.equal(first(*torch.ones(3, 4)), other(*torch.ones(3, 4)))


def test_unknown_objective_is_named() -> None:
    batch = ToyBatch(*torch.rand(5, 4))
    with pytest.raises(ValueError, match="choose one of scm_trig"):
        toy_loss(ToyNetwork(4), NORMAL, batch, ToySettings("shortcut"), 0.0)  # type: ignore[arg-type]
    assert set(CONSISTENCY) < set(OBJECTIVES)
