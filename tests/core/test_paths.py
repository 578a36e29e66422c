"""Every conversion in both directions, the derivatives, and the Gaussian whose velocity is known in closed form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.core import paths
from fewstep.core.paths import EDM, NoisePath, RectifiedFlow, TrigFlow, VariancePreserving

TABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
PATHS: dict[str, NoisePath] = {
    "flow": RectifiedFlow(),
    "trig": TrigFlow(),
    "vp": VariancePreserving(TABLE),
    "edm": EDM(),
}
# Times off the integers, where the derivative of the table has one value only.
TIMES = {
    "flow": torch.tensor([0.01, 0.3, 0.7, 0.99], dtype=torch.float64),
    "trig": torch.tensor([0.01, 0.5, 1.1, 1.56], dtype=torch.float64),
    "vp": torch.tensor([0.4, 17.25, 499.9, 998.7], dtype=torch.float64),
    "edm": torch.tensor([0.002, 0.5, 3.0, 80.0], dtype=torch.float64),
}


@pytest.fixture(params=list(PATHS))
def case(request: pytest.FixtureRequest) -> tuple[NoisePath, Tensor]:
    return PATHS[request.param], TIMES[request.param]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_time_round_trip_and_definition(case: tuple[NoisePath, Tensor]) -> None:
    path, time = case
    t = path.to_flow_time(time)
    close(t, path.sigma(time) / (path.alpha(time) + path.sigma(time)))
    close(path.from_flow_time(t), time)
    close(path.scale_at_flow_time(t), path.alpha(time) + path.sigma(time))


def test_derivatives_equal_autograd_and_finite_differences(case: tuple[NoisePath, Tensor]) -> None:
    path, time = case
    time = time.clone().requires_grad_(True)
    for function, derivative in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        value = function(time)
        if value.requires_grad:
            close(derivative(time), torch.autograd.grad(value.sum(), time)[0])
        step = 1e-5
        with torch.no_grad():
            difference = (function(time + step) - function(time - step)) / (2 * step)
        torch.testing.assert_close(derivative(time).detach(), difference, rtol=1e-6, atol=1e-8)


def test_flow_time_dot_equals_autograd(case: tuple[NoisePath, Tensor]) -> None:
    path, time = case
    time = time.clone().requires_grad_(True)
    expected = torch.autograd.grad(path.to_flow_time(time).sum(), time)[0]
    close(paths.flow_time_dot(path, time).detach(), expected)


def test_states_and_predictions_round_trip(case: tuple[NoisePath, Tensor]) -> None:
    path, time = case
    x0, eps = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
    x = paths.path_add_noise(path, x0, eps, time)
    x_t, t = paths.to_flow_state(path, x, time)
    velocity = eps - x0
    close(x_t, paths.add_noise(x0, eps, t))
    back, back_time = paths.from_flow_state(path, x_t, t)
    close(back, x, 1e-9)
    close(back_time, time)

    alpha, sigma = (c.view(4, 1, 1, 1) for c in (path.alpha(time), path.sigma(time)))
    v = alpha * eps - sigma * x0
    close(paths.velocity_from_path_eps(path, x, eps, time), velocity, 1e-9)
    close(paths.velocity_from_path_x0(path, x, x0, time), velocity, 1e-9)
    close(paths.velocity_from_path_v(path, x, v, time), velocity)
    close(paths.path_v_from_velocity(path, x_t, velocity, time), v)
    path_velocity = path.alpha_dot(time).view(4, 1, 1, 1) * x0 + path.sigma_dot(time).view(4, 1, 1, 1) * eps
    close(paths.path_velocity_from_velocity(path, x_t, velocity, time), path_velocity)
    close(paths.velocity_from_path_velocity(path, x, path_velocity, time), velocity, 1e-9)


@settings(max_examples=40, deadline=None)
@given(t=st.floats(0.001, 0.999), x0=st.floats(-5, 5), eps=st.floats(-5, 5))
def test_canonical_conversions_invert_each_other(t: float, x0: float, eps: float) -> None:
    clean, noise, time = (torch.tensor([[value]], dtype=torch.float64) for value in (x0, eps, t))
    time = time[:, 0]
    x_t = paths.add_noise(clean, noise, time)
    velocity = noise - clean
    close(paths.x0_from_velocity(x_t, velocity, time), clean)
    close(paths.eps_from_velocity(x_t, velocity, time), noise)
    close(paths.velocity_from_x0(x_t, clean, time), velocity)
    close(paths.velocity_from_eps(x_t, noise, time), velocity)
    score = paths.score_from_velocity(x_t, velocity, time)
    close(score, -noise / t)
    close(paths.velocity_from_score(x_t, score, time), velocity)


@settings(max_examples=40, deadline=None)
@given(fraction=st.floats(0, 1), name=st.sampled_from(list(PATHS)))
def test_paths_are_monotone_and_meet_at_equal_ratio(fraction: float, name: str) -> None:
    low, high = PATHS["vp"].flow_time_range  # type: ignore[attr-defined]
    t = torch.tensor([low + fraction * (high - low)], dtype=torch.float64)
    path = PATHS[name]
    time = path.from_flow_time(t)
    close(path.to_flow_time(time), t)
    close(path.sigma(time) / path.alpha(time), t / (1 - t), 1e-9)
    assert paths.flow_time_dot(path, time).item() > 0


def test_variance_preserving_is_the_table_at_integers() -> None:
    path, time = VariancePreserving(TABLE), torch.arange(1000)
    torch.testing.assert_close(path.alpha(time.double()), TABLE.sqrt(), rtol=0, atol=1e-14)
    torch.testing.assert_close(path.sigma(time.double()), (1 - TABLE).sqrt(), rtol=0, atol=1e-14)
    assert path.alpha(time).dtype == torch.float32
    torch.testing.assert_close(path.alpha(time).double(), TABLE.sqrt(), rtol=1e-7, atol=0)
    assert torch.equal(path.from_flow_time(path.to_flow_time(time.double())).round().long(), time)


def test_variance_preserving_interpolates_in_log_ratio() -> None:
    path = VariancePreserving(TABLE)
    log_ratio = 0.5 * ((1 - TABLE) / TABLE).log()
    time = torch.tensor([10.25], dtype=torch.float64)
    expected = 0.75 * log_ratio[10] + 0.25 * log_ratio[11]
    close((path.sigma(time) / path.alpha(time)).log(), expected.view(1))


def test_variance_preserving_from_betas_and_device() -> None:
    betas = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
    path = VariancePreserving.from_betas(betas).to("cpu")
    assert path.alphas_cumprod.dtype == torch.float64
    close(path.alphas_cumprod[:2], torch.stack([1 - betas[0], (1 - betas[0]) * (1 - betas[1])]))


def test_variance_preserving_keeps_the_norm_beyond_its_table() -> None:
    """Pure noise at t = 1 reaches the network as unit noise at the last index."""
    path, eps = VariancePreserving(TABLE), draw(2, 3)
    x, time = paths.from_flow_state(path, eps, torch.tensor([1.0, 0.0], dtype=torch.float64))
    close(x, eps)
    close(time, torch.tensor([999.0, 0.0], dtype=torch.float64))
    low, high = path.flow_time_range
    # Smallest and largest sigma / alpha of the Stable Diffusion table: 0.0292 and 14.6146.
    assert low == pytest.approx(0.0291673 / 1.0291673, abs=1e-6)
    assert high == pytest.approx(14.6146 / 15.6146, abs=1e-6)


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor([0.9]),
        torch.tensor([[0.9, 0.5]]),
        torch.tensor([0.9, 0.0]),
        torch.tensor([1.0, 0.5]),
        torch.tensor([0.5, 0.9]),
        torch.tensor([0.9, math.nan]),
    ],
)
def test_variance_preserving_refuses_bad_tables(table: Tensor) -> None:
    with pytest.raises(ValueError, match="alphas_cumprod"):
        VariancePreserving(table)


def test_ends_of_the_paths() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    close(TrigFlow().from_flow_time(ends), torch.tensor([0.0, math.pi / 2], dtype=torch.float64), 1e-15)
    close(TrigFlow().to_flow_time(torch.tensor([0.0, math.pi / 2], dtype=torch.float64)), ends, 1e-15)
    assert EDM().from_flow_time(ends).tolist() == [0.0, math.inf]
    x_t, velocity = draw(2, 3), draw(2, 3, seed=1)
    close(paths.x0_from_velocity(x_t, velocity, ends)[0], x_t[0], 0)
    close(paths.eps_from_velocity(x_t, velocity, ends)[1], x_t[1], 0)
    # v-prediction is finite at both ends: eps = v at clean data, x0 = -v at pure noise.
    time = TrigFlow().from_flow_time(ends)
    expected = torch.stack([velocity[0] - x_t[0], velocity[1] + x_t[1]])
    close(paths.velocity_from_path_v(TrigFlow(), x_t, velocity, time), expected, 1e-14)


def test_gaussian_velocity_from_eps_prediction_on_the_table() -> None:
    """G1: teacher N(m, s^2). Its optimal eps prediction on the table gives the closed-form canonical velocity."""
    mean, std = 0.7, 1.3
    path = VariancePreserving(TABLE)
    t = torch.linspace(0.05, 0.93, 7, dtype=torch.float64)
    x_t = draw(7, 5)
    x, time = paths.from_flow_state(path, x_t, t)
    alpha, sigma = path.alpha(time)[:, None], path.sigma(time)[:, None]
    eps = sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    column = t[:, None]
    variance = (1 - column) ** 2 * std**2 + column**2
    x0 = mean + (1 - column) * std**2 / variance * (x_t - (1 - column) * mean)
    close(paths.velocity_from_path_eps(path, x, eps, time), (x_t - x0) / column)
    close(paths.score_from_velocity(x_t, (x_t - x0) / column, t), -(x_t - (1 - column) * mean) / variance)


def test_path_ode_of_a_gaussian_is_the_flow_ode() -> None:
    """Trajectories x_t = (1 - t) m + (std_t / std_1) z on both clocks: the chain rule gives dx / dtime."""
    mean, std = -0.4, 0.6
    path = TrigFlow()
    time = torch.tensor([0.9], dtype=torch.float64, requires_grad=True)
    z = 1.7
    t = path.to_flow_time(time)
    x_t = (1 - t) * mean + ((1 - t) ** 2 * std**2 + t**2).sqrt() * z
    x = x_t * path.scale_at_flow_time(t)
    slope = torch.autograd.grad(x.sum(), time, retain_graph=True)[0]
    velocity = torch.autograd.grad(x_t.sum(), time)[0] / paths.flow_time_dot(path, time)
    result = paths.path_velocity_from_velocity(path, x_t, velocity, time).detach()
    close(result, slope)


def test_low_precision_is_computed_in_fp32() -> None:
    x0, eps = draw(2, 3, 4, 4).bfloat16(), draw(2, 3, 4, 4, seed=1).bfloat16()
    t = torch.tensor([0.25, 0.7], dtype=torch.bfloat16)
    out = paths.add_noise(x0, eps, t)
    assert out.dtype == torch.float32
    assert out.shape == (2, 3, 4, 4)
    expected = (1 - t.float().view(2, 1, 1, 1)) * x0.float() + t.float().view(2, 1, 1, 1) * eps.float()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    for path in PATHS.values():
        assert paths.path_add_noise(path, x0, eps, t).dtype == torch.float32


def test_expand_time_shapes() -> None:
    assert paths.expand_time(torch.zeros(4), torch.zeros(4, 3, 8, 8)).shape == (4, 1, 1, 1)
    assert paths.expand_time(torch.zeros(1), torch.zeros(4, 3)).shape == (1, 1)
    assert paths.expand_time(torch.zeros(2, 5), torch.zeros(2, 3, 5, 8, 8)).shape == (2, 1, 5, 1, 1)
    for t, x in (
        (torch.zeros(3), torch.zeros(4, 3)),
        (torch.zeros(2, 5), torch.zeros(2, 5, 3, 3)),
        (torch.zeros(()), torch.zeros(4, 3)),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            paths.expand_time(t, x)
