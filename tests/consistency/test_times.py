"""Laws of the times, exact shares, and the pairs of flow maps."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.consistency.times import (
    TimePair,
    anyflow_times,
    ect_times,
    grid_times,
    logit_normal,
    lognormal_tan,
    mix_max_time,
    ordered_times,
)
from fewstep.consistency.trigflow import time_from_angle
from fewstep.core.grids import shift_time, step_grid
from tests.consistency.analytic import fp64

N = 40_000


def require_pair(pair: TimePair) -> None:
    assert bool(((pair.r >= 0) & (pair.r <= pair.t) & (pair.t <= 1)).all())


@given(normal=st.floats(-6, 6), mean=st.floats(-2, 2), std=st.floats(0.1, 2.5), sigma_data=st.floats(0.2, 3))
def test_lognormal_tan_is_logit_normal(normal: float, mean: float, std: float, sigma_data: float) -> None:
    tau = lognormal_tan(fp64(normal), mean=mean, std=std, sigma_data=sigma_data)
    assert 0 < tau.item() < math.pi / 2
    t = logit_normal(fp64(normal), mean=mean, std=std)
    assert time_from_angle(tau, sigma_data).item() == pytest.approx(t.item(), abs=1e-12)
    # tan(tau) is the noise level of EDM over sigma_data.
    assert math.log(sigma_data * math.tan(tau.item())) == pytest.approx(mean + std * normal, abs=1e-4)


def test_lognormal_tan_keeps_the_dtype_and_bounds() -> None:
    tau = lognormal_tan(torch.tensor([-40.0, 0.0, 40.0]), mean=0.0, std=2.0)
    assert tau.dtype == torch.float32
    assert tau.tolist() == pytest.approx([0.0, math.pi / 4, math.pi / 2])
    with pytest.raises(ValueError, match="std must be positive"):
        lognormal_tan(tau, mean=0.0, std=0.0)
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        lognormal_tan(tau, mean=0.0, std=1.0, sigma_data=-1.0)


@settings(deadline=None)
@given(steps=st.integers(1, 60), skip=st.integers(1, 60), u=st.floats(0, 1, exclude_max=True))
def test_grid_times_are_neighbours(steps: int, skip: int, u: float) -> None:
    if skip > steps:
        with pytest.raises(ValueError, match="skip must be from 1"):
            grid_times(fp64(u), steps=steps, skip=skip)
        return
    pair = grid_times(fp64(u), steps=steps, shift=5.0, skip=skip)
    grid = (*step_grid(steps, shift=5.0), 0.0)
    index = grid.index(pair.t.item())
    assert index == int(u * steps)
    assert pair.r.item() == grid[min(index + skip, steps)]


def test_max_time_takes_its_share() -> None:
    t, u = torch.rand(N, dtype=torch.float64), torch.rand(N, dtype=torch.float64)
    mixed = mix_max_time(t, u, share=0.5)
    assert float((mixed == 1).double().mean()) == pytest.approx(0.5, abs=0.01)
    assert torch.equal(mixed[u >= 0.5], t[u >= 0.5])
    assert torch.equal(mix_max_time(t, u, share=0.0), t)
    angles = mix_max_time(t.float(), u.float(), share=1.0, maximum=math.pi / 2)
    assert bool((angles == torch.tensor(math.pi / 2)).all())
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]"):
        mix_max_time(t, u, share=1.5)
    with pytest.raises(ValueError, match="one shape"):
        mix_max_time(t, u[:1], share=0.5)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
def test_ordered_times(share: float) -> None:
    first, second = logit_normal(torch.randn(2, N, dtype=torch.float64), mean=-0.4, std=1.0)
    pair = ordered_times(first, second, torch.rand(N, dtype=torch.float64), equal_share=share)
    require_pair(pair)
    assert float(pair.equal.double().mean()) == pytest.approx(share, abs=0.01)
    assert torch.equal(pair.t, torch.maximum(first, second))
    free = ~pair.equal
    assert torch.equal(pair.r[free], torch.minimum(first, second)[free])


def test_anyflow_partition_is_exact_and_ignores_the_process() -> None:
    first, second = torch.rand(2, 64, dtype=torch.float64)
    indices = torch.arange(64)
    pair = anyflow_times(first, second, indices)
    require_pair(pair)
    assert int(pair.equal.sum()) == 32
    assert int((pair.r == 0).sum()) == 16
    free = indices % 4 == 3
    torch.testing.assert_close(pair.t, shift_time(torch.maximum(first, second), 5.0))
    torch.testing.assert_close(pair.r[free], shift_time(torch.minimum(first, second), 5.0)[free])
    part = anyflow_times(first[40:], second[40:], indices[40:])
    assert torch.equal(part.r, pair.r[40:])
    with pytest.raises(ValueError, match="must be integers"):
        anyflow_times(first, second, indices.double())
    with pytest.raises(ValueError, match="must be integers"):
        anyflow_times(first, second, indices[:3])


@given(sigma=st.floats(1e-3, 100), stage=st.integers(0, 12), q=st.floats(1.5, 4))
def test_ect_in_its_own_units(sigma: float, stage: int, q: float) -> None:
    pair = ect_times(fp64(sigma / (1 + sigma)), stage=stage, q=q)
    ratio = max(0.0, 1 - q ** -(stage + 1) * (1 + 8 / (1 + math.exp(sigma))))
    sigma_r = (pair.r / (1 - pair.r)).item()
    assert sigma_r == pytest.approx(sigma * ratio, rel=1e-9, abs=1e-12)
    require_pair(pair)


def test_ect_stages() -> None:
    t = fp64(0.001, 0.3, 0.9)
    gaps = [float((t - ect_times(t, stage=stage).r).max()) for stage in range(12)]
    assert all(later <= earlier for earlier, later in pairwise(gaps))
    assert gaps[-1] < 1e-3
    # Stage 0 clamps small times to 0: plain denoising.
    assert ect_times(t, stage=0).r[0].item() == 0.0
    assert ect_times(fp64(1.0), stage=0).r.item() == 1.0
    with pytest.raises(ValueError, match="stage must be"):
        ect_times(t, stage=-1)
    with pytest.raises(ValueError, match="q above 1"):
        ect_times(t, stage=0, q=1.0)
