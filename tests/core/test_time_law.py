"""Laws of random times against their distributions in closed form, and the timesteps of a noise table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fewstep.core.families.table import build_family
from fewstep.core.grids import shift_time, unshift_time
from fewstep.core.randomness import Draw
from fewstep.core.settings import TimeLawConfig
from fewstep.core.time_law import draw_times, law_interval, law_times, unclamped_times
from tests.tiny_pipelines import build_sd3, build_sd15

U = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
FLOW = build_family(build_sd3())


def test_the_default_is_the_uniform_law_between_two_hundredths_from_each_end() -> None:
    assert torch.equal(law_times(U, TimeLawConfig(), FLOW), U.clamp(0.02, 0.98))
    assert law_interval(TimeLawConfig(), FLOW) == (0.02, 0.98)


@settings(max_examples=60, deadline=None)
@given(
    law=st.sampled_from(["uniform", "logit_normal"]),
    mean=st.floats(-2, 2),
    std=st.floats(0.3, 2),
    shift=st.floats(0.3, 8),
    low=st.floats(0, 0.6),
    width=st.floats(0.05, 0.4),
    ends=st.sampled_from(["clamp", "truncate"]),
)
def test_times_have_the_distribution_of_the_law(
    law: Any, mean: float, std: float, shift: float, low: float, width: float, ends: Any
) -> None:
    """P(t <= x), from the normal distribution of the logit; truncation divides by the mass inside the interval."""
    shape: dict[str, Any] = {} if law == "uniform" else {"mean": mean, "std": std}
    config = TimeLawConfig(law=law, shift=shift, min=low, max=low + width, ends=ends, **shape)
    t = law_times(U, config, FLOW)
    assert float(t.min()) >= low
    assert float(t.max()) <= low + width
    assert bool((t[1:] >= t[:-1]).all())

    def below(x: float) -> float:
        plain = float(unshift_time(x, shift)) if 0 < x < 1 else x
        if law == "uniform" or plain in (0, 1):
            return plain
        return float(norm.cdf((np.log(plain) - np.log1p(-plain) - mean) / std))

    inside = below(low + width) - below(low)
    for share in (0.25, 0.5, 0.75):
        x = low + share * width
        expected = below(x) if ends == "clamp" else (below(x) - below(low)) / inside
        if ends == "truncate" and inside < 1e-6:
            continue
        assert float((t <= x).double().mean()) == pytest.approx(expected, abs=2e-3)


def test_whole_timesteps_of_a_table_are_all_as_likely() -> None:
    """DMD2's 20 ... 980 of 1000: in canonical time that is another law than uniform, most of it near noise."""
    family = build_family(build_sd15())
    law = TimeLawConfig(unit="timestep", min=20, max=980)
    u = (torch.arange(961 * 4, dtype=torch.float64) + 0.5) / (961 * 4)
    t = law_times(u, law, family)
    steps = family.path.from_flow_time(t)  # pyright: ignore[reportAttributeAccessIssue]
    counts = np.bincount(steps.round().long().numpy(), minlength=1000)
    assert counts[20:981].tolist() == [4] * 961
    assert counts.sum() == 961 * 4
    assert law_interval(law, family) == (float(t.min()), float(t.max()))
    # A quarter of the timesteps each; a uniform time has 41 %, 21 %, 19 % and 20 % in them (and lies beyond for 6.4 %).
    uniform = family.path.from_flow_time(law_times(U, TimeLawConfig(min=0, max=1), family))  # pyright: ignore
    shares = [float(((uniform >= low) & (uniform < low + 250)).double().mean()) for low in (0, 250, 500, 750)]
    assert shares == pytest.approx([0.41, 0.21, 0.19, 0.20], abs=0.015)
    whole = law_times(u, TimeLawConfig(unit="timestep", min=0, max=999), family)
    assert float(whole.max()) == family.path.flow_time_range[1]  # pyright: ignore[reportAttributeAccessIssue]


def test_timesteps_that_a_network_does_not_know_are_named() -> None:
    for family, last in ((build_family(build_sd15()), 999), (FLOW, 1000)):
        law_times(U, TimeLawConfig(unit="timestep", min=1, max=last), family)
        with pytest.raises(ValueError, match=f"up to timestep {last + 1}, and the network knows them up to {last}"):
            law_times(U, TimeLawConfig(unit="timestep", min=1, max=last + 1), family)


def test_a_draw_depends_on_its_stream_alone() -> None:
    draw = Draw(3, [5, 6], torch.device("cpu"))
    law = TimeLawConfig(law="logit_normal", mean=0.5, shift=3.0)
    first, again = (draw_times(draw, "a", law, FLOW) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, draw_times(draw, "b", law, FLOW))
    assert torch.equal(first, shift_time(torch.sigmoid(0.5 + torch.special.ndtri(draw.uniform("a"))), 3.0))
    assert torch.equal(unclamped_times(draw.uniform("a"), law), first)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"min": 0.5, "max": 0.5}, "min 0.5 and max 0.5 must satisfy 0 <= min < max <= 1"),
        ({"min": -0.1}, "must satisfy"),
        ({"max": 1.5}, "must satisfy"),
        ({"max": float("nan")}, "must satisfy"),
        ({"shift": 0.0}, "must be positive"),
        ({"law": "logit_normal", "std": 0.0}, "must be positive"),
        ({"law": "logit_normal", "mean": float("inf")}, "a number"),
        ({"std": 2.0}, "std is 2.0, and law is uniform: leave it out"),
        ({"mean": 2.0}, "mean is 2.0, and law is uniform"),
        ({"unit": "timestep", "min": 0.5, "max": 10}, "must be whole timesteps"),
        ({"unit": "timestep", "min": 0, "max": 10, "shift": 3.0}, "shift is 3.0, and unit timestep"),
        ({"unit": "timestep", "min": 0, "max": 10, "law": "logit_normal"}, "law is logit_normal, and unit timestep"),
        ({"unit": "timestep", "min": 0, "max": 10, "ends": "truncate"}, "ends is truncate, and unit timestep"),
        ({"unit": "timestep", "min": 0, "max": float("inf")}, "must satisfy"),
    ],
)
def test_laws_that_are_none_are_named(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TimeLawConfig(**values)
