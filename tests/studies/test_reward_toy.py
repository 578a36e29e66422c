"""Every method reaches the tilt it states on Gaussians, or stays at the teacher where it states none."""

import pytest
import torch
from studies.reward_toy import (
    GaussianLaw,
    Method,
    ToyResult,
    ToyReward,
    follow_guided_sampler,
    normal_points,
    run_reward_toy,
)

MEAN, STD = 0.4, 1.2
CURVED = ToyReward(0.5, 0.3)


def law() -> GaussianLaw:
    return GaussianLaw(torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64))


def shift_error(result: ToyResult) -> float:
    """Error of the mean as a share of the way from the teacher to the target."""
    return abs(result.mean - result.target_mean) / abs(result.target_mean - MEAN)


def test_closed_forms_of_the_tilt() -> None:
    linear = ToyReward(0.5).tilt(law(), 0.8)
    assert (float(linear.mean), float(linear.std)) == pytest.approx((MEAN + 0.8 * 0.5 * 1.44, STD))
    # Quadratic: r = -q/2 (x - b)^2 + const with b = slope / q, precision 1 / S + lambda q.
    curved = CURVED.tilt(law(), 0.8)
    precision = 1 / 1.44 + 0.8 * 0.3
    assert float(curved.std) == pytest.approx(precision**-0.5)
    assert float(curved.mean) == pytest.approx((MEAN / 1.44 + 0.8 * 0.3 * (0.5 / 0.3)) / precision)
    with pytest.raises(ValueError, match="cannot be normalised"):
        ToyReward(0.0, -1.0).tilt(law(), 0.8)


def test_gap_of_the_objective_is_the_kl_to_the_tilt() -> None:
    # KL(q || p) - lambda E r + log Z = KL(q || tilted) for any q, the objective that the methods descend.
    scale, tilted, student = 0.8, CURVED.tilt(law(), 0.8), GaussianLaw(torch.tensor(1.5), torch.tensor(0.7))

    def kl(q: GaussianLaw, p: GaussianLaw) -> float:
        ratio = float(q.std / p.std)
        return 0.5 * (ratio**2 - 1 + float((q.mean - p.mean) / p.std) ** 2) - float(torch.tensor(ratio).log())

    reward = 0.5 * 1.5 - 0.15 * (1.5**2 + 0.7**2)
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((x - MEAN) / STD) ** 2) / (STD * (2 * torch.pi) ** 0.5)
    log_z = float(torch.trapezoid(density * torch.exp(scale * CURVED(x)), x).log())
    assert kl(student, law()) - scale * reward + log_z == pytest.approx(kl(student, tilted), abs=1e-6)


def test_points_are_balanced() -> None:
    points = normal_points(1024, 3)
    assert points.mean(dim=0).abs().max().item() < 1e-10
    assert points.square().mean(dim=0).tolist() == pytest.approx([1.0] * 3, abs=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "rtdmd", "gndmr", "nft", "astrolabe", "crd", "flash_dmd", "euphonium"])
def test_linear_reward_tilts_the_teacher(method: Method) -> None:
    result = run_reward_toy(method, updates=200 if method == "rtdmd" else 120)
    assert shift_error(result) < 0.03
    assert result.std == pytest.approx(result.target_std, rel=0.03)
    assert result.target_mean == pytest.approx(MEAN + result.tilt_scale * 0.5 * STD**2)
    # A tilt that can be told from none.
    assert result.tilt_scale > 0.5


@pytest.mark.parametrize("method", ["grpo", "rtdmd", "gndmr", "crd", "euphonium"])
def test_quadratic_reward_tilts_mean_and_std(method: Method) -> None:
    result = run_reward_toy(method, reward=CURVED, updates=120)
    assert shift_error(result) < 0.03
    assert result.std == pytest.approx(result.target_std, rel=0.03)
    if method != "grpo":
        assert result.std < 0.95 * STD


@pytest.mark.parametrize("method", ["nft", "astrolabe"])
def test_signed_regression_tilts_a_quadratic_reward_to_first_order(method: Method) -> None:
    weak = run_reward_toy(method, reward=CURVED, tilt_scale=0.04, updates=120)
    assert shift_error(weak) < 0.03
    assert weak.std == pytest.approx(weak.target_std, rel=0.01)


@pytest.mark.parametrize("method", ["nft", "flash_dmd"])
def test_linear_methods_miss_the_tilt_of_a_strong_quadratic_reward(method: Method) -> None:
    strong = run_reward_toy(method, reward=CURVED, tilt_scale=0.8, updates=120)
    assert 0.1 < shift_error(strong) < 0.5


@pytest.mark.parametrize("method", ["re_dmd", "stream_r1"])
def test_weights_return_to_the_teacher(method: Method) -> None:
    result = run_reward_toy(method, updates=150)
    assert (result.mean, result.std) == pytest.approx((MEAN, STD), rel=0.01)
    assert result.tilt_scale == 0.0


def test_guidance_without_the_flow_reaches_a_part_of_the_tilt() -> None:
    full = follow_guided_sampler(law(), ToyReward(0.5), 0.8)
    corrector = follow_guided_sampler(law(), ToyReward(0.5), 0.8, corrector_only=True)
    share = (float(corrector.mean) - MEAN) / (float(full.mean) - MEAN)
    assert 0.0 < share < 0.1
    assert float(corrector.std) == pytest.approx(STD, rel=0.01)


def test_sampler_converges_with_its_steps() -> None:
    target = CURVED.tilt(law(), 0.8)
    errors = [abs(float(follow_guided_sampler(law(), CURVED, 0.8, steps=n).std - target.std)) for n in (100, 400)]
    assert errors[1] < 0.003
    assert errors[0] / errors[1] > 3.5


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="is unknown; choose one of grpo"):
        run_reward_toy("dpo")  # pyright: ignore[reportArgumentType]
