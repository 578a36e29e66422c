"""Few-step rollouts: gradients at one step, and samplers against closed forms of a Gaussian."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.table import build_family
from fewstep.core.families.unet import UnetFamily
from fewstep.core.grids import step_grid
from fewstep.core.student import Student
from fewstep.core.two_time import add_second_time, second_time_of
from tests.tiny_pipelines import LATENT_SHAPE, build_sd3, build_sd15

MEAN, STD = 0.4, 1.3
NOTHING = Condition(torch.zeros(1, 1, 1))


class GaussianMap(nn.Module):
    """A denoiser in closed form for data N(MEAN, STD^2): x0 = MEAN + gain(t) (x_t - (1 - t) MEAN), times `scale`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls: list[tuple[float, bool]] = []

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append((t[0].item(), torch.is_grad_enabled()))
        t = t.view(-1, *([1] * (x_t.ndim - 1)))
        a = 1 - t
        variance = (a * STD) ** 2 + t**2
        gain = STD / variance.sqrt() if self.kind == "consistency" else a * STD**2 / variance
        x0 = self.scale * (MEAN + gain * (x_t - a * MEAN))
        return (x_t - x0) / t


def moments(student: Student, steps: int) -> tuple[float, float]:
    """Exact mean and standard deviation after `steps` steps: unit noises give the coefficients of the affine chain."""
    noises = torch.eye(steps, dtype=torch.float64)

    def x0(rows: Tensor) -> float:
        noise = [rows[i].view(1, 1, 1, 1) for i in range(steps)]
        return student.rollout(noise[0], NOTHING, noise[1:], steps - 1).x0.item()

    mean = x0(torch.zeros(steps, dtype=torch.float64))
    return mean, math.sqrt(sum((x0(noises[i]) - mean) ** 2 for i in range(steps)))


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.5), step_grid(4), step_grid(4, shift=3.0)])
def test_renoised_consistency_chain_keeps_the_gaussian_after_each_step(times: Sequence[float]) -> None:
    student = Student(GaussianMap("consistency"), times)  # pyright: ignore[reportArgumentType]
    for steps in range(1, len(times) + 1):
        mean, std = moments(student, steps)
        assert mean == pytest.approx(MEAN, abs=1e-12)
        assert std == pytest.approx(STD, abs=1e-12)


def test_renoised_posterior_mean_chain_collapses() -> None:
    student = Student(GaussianMap("posterior_mean"), step_grid(4))  # pyright: ignore[reportArgumentType]
    mean, std = moments(student, 4)
    assert mean == pytest.approx(MEAN, abs=1e-12)
    assert std == pytest.approx(0.72, abs=5e-3)


def test_samples_have_the_moments() -> None:
    student = Student(GaussianMap("consistency"), step_grid(4))  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, 1, 300, 300, dtype=torch.float64, generator=generator) for _ in range(4)]
    sample = student.sample(noise[0], NOTHING, noise[1:])
    assert sample.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert sample.std().item() == pytest.approx(STD, abs=0.02)
    assert not sample.requires_grad


def test_ode_sampler_is_euler_on_the_velocity() -> None:
    # With the posterior mean the ODE's exact map is the consistency map; Euler reaches it as the steps shrink.
    exact = GaussianMap("consistency")
    noise = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    target = Student(exact, (1.0,)).sample(noise, NOTHING)  # pyright: ignore[reportArgumentType]
    errors = []
    for steps in (64, 128):
        student = Student(GaussianMap("posterior_mean"), step_grid(steps), "ode")  # pyright: ignore[reportArgumentType]
        errors.append((student.sample(noise, NOTHING) - target).abs().max().item())
    assert errors[1] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("sampler", ["sde", "ode"])
@pytest.mark.parametrize("grad_step", [0, 1, 2, None])
def test_gradient_at_exactly_one_step(sampler, grad_step: int | None) -> None:
    denoiser = GaussianMap("consistency")
    times = step_grid(3)
    student = Student(denoiser, times, sampler)  # pyright: ignore[reportArgumentType]
    noise = [torch.randn(2, 1, 2, 2, dtype=torch.float64) for _ in range(3)]
    output = student.rollout(noise[0], NOTHING, noise[1:], grad_step)
    last = 2 if grad_step is None else grad_step
    assert denoiser.calls == [(times[i], i == last) for i in range(last + 1)]
    assert not output.x_t.requires_grad
    assert output.t.tolist() == [times[last]] * 2
    # d x0 / d scale of the last call alone is x0, since x0 = scale (...) and scale is 1.
    (gradient,) = torch.autograd.grad(output.x0.sum(), denoiser.scale)
    assert gradient.item() == pytest.approx(output.x0.sum().item(), rel=1e-12)


def test_rollout_input_is_the_renoised_prediction() -> None:
    student = Student(GaussianMap("consistency"), (1.0, 0.6, 0.3))  # pyright: ignore[reportArgumentType]
    noise = [torch.randn(2, 1, 2, 2, dtype=torch.float64) for _ in range(3)]
    first = student.rollout(noise[0], NOTHING, (), 0)
    assert torch.equal(first.x_t, noise[0])
    second = student.rollout(noise[0], NOTHING, noise[1:], 1)
    assert torch.allclose(second.x_t, 0.4 * first.x0 + 0.6 * noise[1], atol=1e-14)
    third = student.rollout(noise[0], NOTHING, noise[1:], 2)
    assert torch.allclose(third.x_t, 0.7 * second.x0 + 0.3 * noise[2], atol=1e-14)
    assert torch.equal(student.sample(noise[0], NOTHING, noise[1:]), third.x0)


def test_wrapper_is_called_at_the_gradient_step_alone() -> None:
    own, wrapper = GaussianMap("consistency"), GaussianMap("consistency")
    student = Student(own, step_grid(3))  # pyright: ignore[reportArgumentType]
    noise = [torch.randn(1, 1, 2, 2, dtype=torch.float64) for _ in range(3)]
    output = student.rollout(noise[0], NOTHING, noise[1:], 1, denoiser=wrapper)
    assert len(own.calls) == 1
    assert wrapper.calls == [(step_grid(3)[1], True)]
    output.x0.sum().backward()
    assert own.scale.grad is None
    assert wrapper.scale.grad is not None


def test_rollout_of_a_real_network_trains_it() -> None:
    pipeline = build_sd3()
    family = build_family(pipeline)
    student = Student(Denoiser(pipeline.transformer, family), step_grid(2, shift=3.0))
    condition = family.encode_prompts(pipeline, ["cat", "dog"])
    noise = [torch.randn(2, *LATENT_SHAPE) for _ in range(2)]
    output = student.rollout(noise[0], condition, noise[1:])
    assert output.x0.shape == (2, *LATENT_SHAPE)
    assert output.t.tolist() == pytest.approx([0.75, 0.75])
    output.x0.square().mean().backward()
    assert max(p.grad.abs().max().item() for p in pipeline.transformer.parameters() if p.grad is not None) > 0
    # Half-precision noise is lifted once, at the start.
    assert student.sample(noise[0].bfloat16(), condition, [noise[1].bfloat16()]).dtype == torch.float32


def test_unet_student_starts_from_unit_noise_at_a_timestep_below_the_last() -> None:
    # The one-step SDXL student of DMD2 is called with unit noise at timestep 399.
    pipeline = build_sd15()
    family = UnetFamily.from_pipeline(pipeline)
    denoiser = Denoiser(pipeline.unet, family)
    condition = family.encode_prompts(pipeline, ["cat", "dog"])
    t = family.path.to_flow_time(torch.tensor([399.0], dtype=torch.float64)).item()
    noise = torch.randn(2, *LATENT_SHAPE)
    sample = Student(denoiser, (t,)).sample(noise, condition)
    with torch.no_grad():
        eps = pipeline.unet(noise, 399, condition.tokens, return_dict=False)[0]
    alpha = pipeline.scheduler.alphas_cumprod[399].sqrt()
    assert (sample - (noise - (1 - alpha.square()).sqrt() * eps) / alpha).abs().max() < 1e-5


class GaussianFlowMap(nn.Module):
    """The exact average velocity from t down to r for data N(MEAN, STD^2), times `scale`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls: list[tuple[float, float, bool]] = []

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, r: Tensor) -> Tensor:
        start, end = t[0].item(), r[0].item()
        self.calls.append((start, end, torch.is_grad_enabled()))
        shrink = math.sqrt((((1 - end) * STD) ** 2 + end**2) / (((1 - start) * STD) ** 2 + start**2))
        x_r = (1 - end) * MEAN + shrink * (x_t - (1 - start) * MEAN)
        return self.scale * (x_t - x_r) / (start - end)


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.9, 0.2), step_grid(4), step_grid(8, shift=5.0)])
def test_an_exact_flow_map_is_exact_on_any_grid(times: Sequence[float]) -> None:
    denoiser = GaussianFlowMap()
    student = Student(denoiser, times, "flow_map")  # pyright: ignore[reportArgumentType]
    noise = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    assert (student.sample(noise, NOTHING) - (MEAN + STD * noise)).abs().max() < 1e-13
    assert [call[:2] for call in denoiser.calls] == list(zip(times, (*times[1:], 0.0), strict=True))


@pytest.mark.parametrize("grad_step", [0, 1, 2])
def test_a_flow_map_jumps_to_the_end_at_the_gradient_step(grad_step: int) -> None:
    denoiser = GaussianFlowMap()
    times = step_grid(3)
    student = Student(denoiser, times, "flow_map")  # pyright: ignore[reportArgumentType]
    noise = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    output = student.rollout(noise, NOTHING, (), grad_step)
    ends = (*times[1 : grad_step + 1], 0.0)
    expected = [(times[i], ends[i], i == grad_step) for i in range(grad_step + 1)]
    assert denoiser.calls == expected
    assert (output.x0.detach() - (MEAN + STD * noise)).abs().max() < 1e-13
    (gradient,) = torch.autograd.grad(output.x0.sum(), denoiser.scale)
    assert gradient.item() == pytest.approx((output.x0 - output.x_t).sum().item())


def test_a_flow_map_of_a_real_network_needs_two_times() -> None:
    pipeline = build_sd3()
    family = build_family(pipeline)
    student = Student(Denoiser(pipeline.transformer, family), step_grid(2), "flow_map")
    condition = family.encode_prompts(pipeline, ["cat", "dog"])
    noise = torch.randn(2, *LATENT_SHAPE)
    with pytest.raises(ValueError, match="has one time and is given r"):
        student.sample(noise, condition)
    add_second_time(student.denoiser.network, "gate")
    output = student.rollout(noise, condition)
    output.x0.square().mean().backward()
    layers = second_time_of(student.denoiser.network)
    assert layers is not None
    gradient = layers.second.get_submodule("linear_2").get_parameter("weight").grad
    assert gradient is not None
    assert gradient.norm() > 0


def test_what_cannot_be_rolled_out_is_an_error() -> None:
    denoiser = GaussianMap("consistency")
    with pytest.raises(ValueError, match="strictly"):
        Student(denoiser, (0.5, 1.0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="sde or ode or flow_map"):
        Student(denoiser, (1.0,), "heun")  # pyright: ignore[reportArgumentType]
    student = Student(denoiser, step_grid(3))  # pyright: ignore[reportArgumentType]
    noise = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="need 2 noise tensors, got 1"):
        student.rollout(noise, NOTHING, [noise])
    with pytest.raises(ValueError, match="grad_step must be from 0 to 2"):
        student.rollout(noise, NOTHING, [noise, noise], 3)
