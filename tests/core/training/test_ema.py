"""The average of a known sequence, and swapping it in and out without a trace."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from fewstep.core.training.ema import Ema


def make_module(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)
    module.get_parameter("0.bias").requires_grad_(False)
    return module


def fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


@settings(max_examples=30, deadline=None)
@given(decay=st.floats(0, 0.999), steps=st.integers(1, 40), slope=st.floats(-2, 2))
def test_average_of_a_linear_sequence(decay: float, steps: int, slope: float) -> None:
    """w_n = slope n from w_0 = 0: the average is slope (n - d (1 - d^n) / (1 - d))."""
    module = nn.Linear(2, 1).double()
    fill(module, 0.0)
    ema = Ema(module, decay)
    for step in range(steps):
        fill(module, slope * (step + 1))
        ema.update(step)
    expected = slope * (steps - decay * (1 - decay**steps) / (1 - decay))
    for tensor in ema.state_dict().values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, expected), rtol=1e-9, atol=1e-9)


def test_covers_trainable_parameters_and_floating_buffers_in_fp32() -> None:
    ema = Ema(make_module(torch.bfloat16), 0.9)
    state = ema.state_dict()
    expected = {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "2.weight", "2.bias"}
    assert set(state) == expected
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_small_changes_of_bf16_weights_add_up() -> None:
    """One step of the average is below the bf16 spacing at 1: only a wider shadow moves."""
    module = nn.Linear(1, 1, bias=False).bfloat16()
    fill(module, 1.0)
    ema = Ema(module, 0.9999)
    fill(module, 2.0)
    for step in range(100):
        ema.update(step)
    assert ema.state_dict()["weight"].item() == pytest.approx(2 - 0.9999**100, abs=1e-5)


def test_before_its_start_the_average_is_the_live_weights() -> None:
    module = nn.Linear(2, 1)
    ema = Ema(module, 0.5, start_step=3)
    for step in range(3):
        fill(module, float(step))
        ema.update(step)
        assert torch.equal(ema.state_dict()["weight"], module.weight)
    fill(module, 4.0)
    ema.update(3)
    assert ema.state_dict()["weight"].tolist() == [[3.0, 3.0]]


def test_zero_decay_is_the_live_weights() -> None:
    module = make_module()
    ema = Ema(module, 0.0)
    fill(module, 0.3)
    ema.update(0)
    assert torch.equal(ema.state_dict()["2.weight"], module.get_parameter("2.weight"))


def test_unchanged_weights_stay_exactly() -> None:
    module = make_module()
    ema = Ema(module, 0.99)
    for step in range(50):
        ema.update(step)
    assert torch.equal(ema.state_dict()["0.weight"], module.get_parameter("0.weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_swaps_and_restores_bit_for_bit(dtype: torch.dtype) -> None:
    module = make_module(dtype)
    ema = Ema(module, 0.5)
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    ema.update(0)
    live = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with ema.applied(module):
        average = (start["2.weight"].float() + live["2.weight"].float()) / 2
        torch.testing.assert_close(module.get_parameter("2.weight").detach(), average.to(dtype), rtol=0, atol=1e-2)
        assert torch.equal(module.get_parameter("2.weight"), ema.state_dict()["2.weight"].to(dtype))
        assert torch.equal(module.get_parameter("0.bias"), live["0.bias"])
    assert all(torch.equal(tensor, live[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(RuntimeError, match="inside"), ema.applied(module):
        raise RuntimeError("inside")
    assert all(torch.equal(tensor, live[name]) for name, tensor in module.state_dict().items())


def test_copy_to_another_module() -> None:
    module, twin = make_module(), make_module()
    ema = Ema(module, 0.75)
    fill(module, 0.0)
    ema.update(0)
    ema.copy_to(twin)
    torch.testing.assert_close(
        twin.get_parameter("2.weight"), 0.75 * make_module().get_parameter("2.weight"), rtol=1e-6, atol=0
    )
    assert twin.get_parameter("2.weight").requires_grad
    before = ema.state_dict()["2.weight"].clone()
    fill(twin, 9.0)
    assert torch.equal(ema.state_dict()["2.weight"], before)
    with pytest.raises(ValueError, match="no such tensor"):
        ema.copy_to(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"shape \(5, 3\)"):
        ema.copy_to(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4), nn.Linear(4, 2)))


def test_state_survives_safetensors(tmp_path: Path) -> None:
    module = make_module()
    ema = Ema(module, 0.9)
    fill(module, 1.0)
    ema.update(0)
    save_file(ema.state_dict(), tmp_path / "ema.safetensors")
    other = Ema(make_module(), 0.9)
    other.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    assert all(torch.equal(tensor, ema.state_dict()[name]) for name, tensor in other.state_dict().items())
    fill(module, 2.0)
    ema.update(1)
    assert not torch.equal(other.state_dict()["2.weight"], ema.state_dict()["2.weight"])


def test_wrong_states_and_arguments() -> None:
    module = make_module()
    ema = Ema(module, 0.9)
    state = ema.state_dict()
    with pytest.raises(ValueError, match="1 missing"):
        ema.load_state_dict({name: tensor for name, tensor in state.items() if name != "2.bias"})
    with pytest.raises(ValueError, match="1 unexpected"):
        ema.load_state_dict({**state, "3.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"2.bias has shape \(3,\)"):
        ema.load_state_dict({**state, "2.bias": torch.zeros(3)})
    for decay in (1.0, -0.1, 1.5):
        with pytest.raises(ValueError, match="decay"):
            Ema(module, decay)
    with pytest.raises(ValueError, match="start_step"):
        Ema(module, 0.9, start_step=-1)


def test_freezing_for_a_while_changes_nothing() -> None:
    module = nn.Linear(2, 1)
    fill(module, 0.0)
    ema = Ema(module, 0.5)
    module.requires_grad_(False)
    fill(module, 1.0)
    ema.update(0)
    assert ema.state_dict()["weight"].tolist() == [[0.5, 0.5]]


def test_buffers_that_are_not_saved_are_not_averaged() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("running", torch.ones(2))
    module.register_buffer("table", torch.ones(2), persistent=False)
    assert sorted(Ema(module, 0.9).state_dict()) == ["bias", "running", "weight"]
