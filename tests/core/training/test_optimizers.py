"""Optimizers by name: their first step in closed form, their state through a checkpoint; rates and averages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.core.config import OptimizerConfig
from fewstep.core.settings import StudentConfig
from fewstep.core.training.ema import Ema, EmaSettings, power_of_length
from fewstep.core.training.optimizer_state import load_optimizer, optimizer_to_tensors
from fewstep.core.training.optimizers import build_optimizer
from fewstep.core.training.roles import scheduled_rate

KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adam": {},
    "radam": {},
    "adamw_8bit": {},
    "adam_8bit": {},
    "came": {"betas": (0.9, 0.999, 0.9999)},
}


def make(kind: Any, **changes: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    # Large enough for moments of 8 bits, which small tensors are spared.
    parameter = nn.Parameter(torch.linspace(-1, 1, 8192).reshape(64, 128).clone())
    settings = OptimizerConfig(kind=kind, learning_rate=0.01, weight_decay=0.0, **{**KINDS[kind], **changes})
    return parameter, build_optimizer([("weight", parameter)], settings)


def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "adam", "adamw_8bit", "adam_8bit"])
def test_the_first_step_moves_each_weight_by_the_rate(kind: str) -> None:
    """lr g / (|g| + eps), for both moments are unbiased: exact in fp32, within the 8 bits of the moments else."""
    parameter, optimizer = make(kind)
    before = parameter.detach().clone()
    step(parameter, optimizer, 1)
    assert parameter.grad is not None
    expected = before - 0.01 * parameter.grad.sign()
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=2e-3 if "8bit" in kind else 2e-5)
    wide, optimizer = make(kind, eps=0.5) if "8bit" not in kind else make("adamw", eps=0.5)
    step(wide, optimizer, 1)
    assert wide.grad is not None
    torch.testing.assert_close(wide.detach(), before - 0.01 * wide.grad / (wide.grad.abs() + 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_state_goes_through_files_bit_for_bit(kind: str) -> None:
    parameter, optimizer = make(kind)
    for number in range(3):
        step(parameter, optimizer, number)
    tensors, description = optimizer_to_tensors(optimizer)
    assert len(tensors) >= 2
    other, resumed = make(kind)
    with torch.no_grad():
        other.copy_(parameter)
    load_optimizer(resumed, tensors, description)
    for number in range(3, 6):
        step(parameter, optimizer, number)
        step(other, resumed, number)
    assert torch.equal(parameter, other)
    wrong = {name: tensor[:1] if name.endswith("exp_avg") else tensor for name, tensor in tensors.items()}
    if wrong.keys() == tensors.keys() and any("exp_avg" in name for name in tensors):
        with pytest.raises(ValueError, match="has shape"):
            load_optimizer(make(kind)[1], wrong, description)


def test_8_bit_moments_take_a_quarter_of_the_memory() -> None:
    sizes = {}
    for kind in ("adamw", "adamw_8bit"):
        parameter, optimizer = make(kind)
        step(parameter, optimizer, 1)
        tensors, _ = optimizer_to_tensors(optimizer)
        sizes[kind] = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert sizes["adamw_8bit"] < 0.3 * sizes["adamw"]


def test_rates_fall_as_they_say() -> None:
    def rates(**values: Any) -> list[float]:
        settings = OptimizerConfig(learning_rate=2.0, **values)
        return [scheduled_rate(settings, updates, total=8) for updates in (0, 2, 4, 8)]

    assert rates() == [2.0] * 4
    assert rates(decay="linear") == pytest.approx([2.0, 1.5, 1.0, 0.0])
    assert rates(decay="linear", decay_floor=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.0])
    cosine = [1 + math.cos(math.pi * share) for share in (0, 0.25, 0.5, 1)]
    assert rates(decay="cosine") == pytest.approx(cosine)
    assert rates(decay="cosine", decay_floor=0.5) == pytest.approx([1 + 0.5 * value for value in cosine])
    assert rates(decay="inverse_sqrt", decay_start=2) == pytest.approx([2.0, 2.0, 2 / 2**0.5, 1.0])
    assert rates(warmup_steps=4, decay="linear") == pytest.approx([0.5, 1.125, 1.0, 0.0])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"kind": "came"}, r"allowed are 3 numbers in \[0, 1\) for came"),
        ({"kind": "came", "betas": (0.9, 0.9, 0.9), "eps": 1e-8}, "came has a pair of its own"),
        ({"eps": 0.0}, "eps: given 0.0"),
        ({"eps": float("nan")}, "eps: given nan"),
        ({"decay_floor": 0.5}, "decay_floor: given 0.5 with decay 'none', which has none"),
        ({"decay": "cosine", "decay_floor": 1.0}, "decay_floor: given 1.0"),
        ({"decay": "inverse_sqrt"}, "inverse_sqrt needs a number of updates > 0"),
        ({"decay_start": 5}, "the others none"),
    ],
)
def test_settings_that_do_nothing_are_named(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        OptimizerConfig(learning_rate=1e-3, **values)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_the_power_average_has_the_length_it_is_asked_for(length: float) -> None:
    """The weights of past updates have the standard deviation `length` as a share of the run (EDM2)."""
    gamma = power_of_length(length)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(length**2, rel=1e-9)
    updates = 4000
    module = nn.Linear(1, 1, bias=False)
    ema = EmaSettings(length=length).of(module)
    weights = torch.zeros(updates, dtype=torch.float64)
    for update in range(updates):
        decay = ema.decay_of(update)
        weights[: update + 1] *= decay
        weights[update] += 1 - decay
    times = (torch.arange(updates, dtype=torch.float64) + 1) / updates
    mean = (weights * times).sum()
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float(((weights * (times - mean) ** 2).sum()).sqrt()) == pytest.approx(length, rel=2e-3)


def test_an_average_that_takes_in_every_third_update() -> None:
    """RTDMD's released average: 0.9 at each eighth update, here 0.5 at each third from the second on."""
    module = nn.Linear(1, 1, bias=False)
    found = []
    ema = EmaSettings(0.5, start=1, every=3).of(module)
    for update in range(8):
        with torch.no_grad():
            module.weight.fill_(2.0**update)
        ema.update(update)
        found.append(float(ema.state_dict()["weight"]))
    # Live at update 0; taken in are updates 3 and 6.
    assert found == [1.0, 1.0, 1.0, 4.5, 4.5, 4.5, 34.25, 34.25]
    power = Ema(module, 0.0, power=1.0, every=3)
    assert [power.decay_of(n) for n in (0, 1)] == [0.0, 0.25]
    assert EmaSettings.of_student(StudentConfig(optimizer=OptimizerConfig(learning_rate=1.0), ema_every=8)).every == 8
    with pytest.raises(ValueError, match="ema_every is 0"):
        StudentConfig(optimizer=OptimizerConfig(learning_rate=1.0), ema_every=0)
    with pytest.raises(ValueError, match="with ema_decay 0, which keeps the live weights"):
        StudentConfig(optimizer=OptimizerConfig(learning_rate=1.0), ema_every=8, ema_decay=0.0)
    with pytest.raises(ValueError, match="every must be at least 1"):
        Ema(module, 0.5, every=0)


def test_power_averages_of_a_module_and_their_settings() -> None:
    module = nn.Linear(1, 1, bias=False)
    ema = Ema(module, 0.0, power=1.0, start_step=1)
    values = [3.0, 5.0, 11.0]
    for update, value in enumerate(values):
        with torch.no_grad():
            module.weight.fill_(value)
        ema.update(update)
    # Update 1 is the first: decay 0; then (1 - 1 / 2)^2.
    assert float(ema.state_dict()["weight"]) == pytest.approx(0.25 * 5 + 0.75 * 11)
    optimizer = OptimizerConfig(learning_rate=1.0)
    settings = StudentConfig(optimizer=optimizer, ema_kind="power", ema_length=0.05)
    assert EmaSettings.of_student(settings).of(module).power == pytest.approx(16.97, abs=0.01)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"ema_length": 0.05}, "ema_length is given, which an average of the kind constant does not read"),
        ({"ema_kind": "power", "ema_decay": 0.5}, "ema_decay is given, which an average of the kind power"),
        ({"ema_kind": "power", "ema_length": 0.3}, "must lie between 0 and 0.28"),
    ]
    for values_given, told in wrong:
        with pytest.raises(ValueError, match=told):
            StudentConfig(optimizer=optimizer, **values_given)
