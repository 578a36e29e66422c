"""The check of tangents: it accepts right ones to the digits they have, and finds each way to get them wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fewstep.kernels.attention import attention
from fewstep.kernels.check_jvp import Float64Inside, check_jvp


@torch.library.custom_op("fewstep_test::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """2 x, without forward mode."""
    return 2 * x


class WrongCube(Function):
    """x^3 with a tangent of 2 x^2 dx."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x**2 * tangents[0]


class WithoutForwardMode(Function):
    """x^3 with a gradient alone."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)


def small_network(dtype: torch.dtype = torch.float64, *, dropout: float = 0.0) -> nn.Sequential:
    """A smooth network of width 6."""
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 6)).to(dtype)


def draw(dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """A point [4, 6] and a direction."""
    return (torch.randn(4, 6, dtype=dtype),), (torch.randn(4, 6, dtype=dtype),)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.1)]
)
def test_right_tangent_is_accepted(dtype: torch.dtype, bound: float) -> None:
    network, (primals, tangents) = small_network(dtype), draw(dtype)
    found = check_jvp(network, primals, tangents)
    with torch.no_grad():
        tangent = torch.func.jvp(network, primals, tangents)[1]
    assert found.error < bound
    assert found.norm == pytest.approx(float(tangent.double().norm()), rel=1e-12)
    assert 2.0**-16 <= found.step <= 2.0**-3


def test_numbers_of_a_known_function() -> None:
    x = torch.tensor([0.5, 2.0], dtype=torch.float64)
    found = check_jvp(torch.sin, (x,), (torch.tensor([3.0, 0.0], dtype=torch.float64),))
    assert found.norm == pytest.approx(3 * math.cos(0.5), rel=1e-14)
    assert found.error < 1e-12
    assert found.uncertainty < 1e-6
    # A cubic is exact from the second column of the table on, so one halving suffices.
    found = check_jvp(lambda x: x**3, (x,), (torch.ones_like(x),), halvings=1, largest_step=0.5)
    assert (found.step, found.error < 1e-14) == (0.25, True)


def test_gradients_are_neither_needed_nor_made() -> None:
    network, (primals, tangents) = small_network(), draw()
    check_jvp(network, primals, tangents)
    assert [parameter.grad for parameter in network.parameters()] == [None] * 4


def test_attention_passes_and_fused_attention_does_not() -> None:
    primals = tuple(torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    tangents = tuple(torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    assert check_jvp(attention, primals, tangents).error < 1e-10
    assert check_jvp(attention, primals, (None, tangents[1], None)).error < 1e-10
    with pytest.raises(ValueError, match=r"no forward mode.*use_jvp_attention"):
        check_jvp(scaled_dot_product_attention, primals, tangents)
    with sdpa_kernel(SDPBackend.MATH):
        assert check_jvp(scaled_dot_product_attention, primals, tangents).error < 1e-10


MISTAKES: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (lambda x: doubled(x), r"tangent is zero.*custom_op without forward mode"),
    (lambda x: x.sin() + 0.1 * doubled(x), r"away from the central difference.*custom_op"),
    (lambda x: x.detach().sin(), "tangent is zero"),
    (lambda x: x * x.detach(), "a detach in the path"),
    (lambda x: WrongCube.apply(x), r"the tangent is 3\.3e-01 away.*Function with a wrong jvp"),
    (lambda x: WithoutForwardMode.apply(x), "the function has no forward mode"),
    (lambda x: torch.where((x * 1e4).round() == 0, x, (x * 1e4).round() / 1e4), "tangent is zero"),
    (lambda x: x + torch.rand(()), "two calls with the same input differ"),
    (lambda x: (x - x.detach()).abs().sqrt() + x, "tangent is not finite"),
    (lambda x: x / 0, "output is not finite"),
    (lambda x: x > 0, "must return one floating tensor, got torch.bool"),
]


@pytest.mark.parametrize(("function", "message"), MISTAKES)
def test_mistake_is_found(function: Callable[[Tensor], Tensor], message: str) -> None:
    primals, tangents = draw()
    with pytest.raises(ValueError, match=message):
        check_jvp(function, primals, tangents)


def test_function_that_is_constant_in_the_direction_passes() -> None:
    primals, tangents = draw()
    found = check_jvp(lambda x: x.detach() * 0 + 3, primals, tangents)
    assert (found.error, found.norm) == (0.0, 0.0)


def test_mistake_deep_in_a_network_is_found() -> None:
    """The part that loses its tangent is one of two branches, and the other one has most of the output."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = small_network(), small_network()

        def forward(self, x: Tensor) -> Tensor:
            return self.main(x) + 0.05 * doubled(self.side(x))

    primals, tangents = draw()
    with pytest.raises(ValueError, match="custom_op"):
        check_jvp(Branches(), primals, tangents)
    single = tuple(x.float() for x in primals), tuple(x.float() for x in tangents)
    with pytest.raises(ValueError, match="custom_op"):
        check_jvp(Branches().float(), *single)


def test_dropout_is_named() -> None:
    network, (primals, tangents) = small_network(dropout=0.1), draw()
    with pytest.raises(ValueError, match=r"dropout or other random numbers.*eval\(\)"):
        check_jvp(network, primals, tangents)
    assert check_jvp(network.eval(), primals, tangents).error < 1e-10


def test_function_that_knows_of_tangents_is_found() -> None:
    """Another output under forward mode, as from a compiled region that takes another path."""

    def function(x: Tensor) -> Tensor:
        has_tangent = torch.autograd.forward_ad.unpack_dual(x).tangent is not None
        return x.sin() + (0.1 if has_tangent else 0.0)

    with pytest.raises(ValueError, match="a call with and a call without tangents differ"):
        check_jvp(function, *draw())


def test_half_precision_failure_advises_float32() -> None:
    primals, tangents = draw(torch.bfloat16)
    with pytest.raises(ValueError, match="check a copy of the network in float32"):
        check_jvp(small_network(torch.bfloat16), primals, tangents, tolerance=1e-6)
    # Inputs and outputs are fp32 around a bf16 network; its dtype says what to expect.
    network = small_network(torch.bfloat16)
    wide = tuple(x.float() for x in primals), tuple(x.float() for x in tangents)
    found = check_jvp(lambda x: network(x.bfloat16()).float(), *wide, dtype=torch.bfloat16)
    assert found.error < 0.1


def test_uncertain_difference_is_said() -> None:
    """A frequency far above what the smallest step resolves."""
    x = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="too uncertain to judge"):
        check_jvp(lambda x: (1e6 * x).sin(), (x,), (x,))
    assert check_jvp(lambda x: (1e6 * x).sin(), (x,), (x,), largest_step=1e-7).error < 1e-6


def test_steps_out_of_the_domain_are_left_out() -> None:
    x = torch.full((3,), 1e-3, dtype=torch.float64)
    found = check_jvp(torch.log, (x,), (torch.ones_like(x),))
    assert found.error < 1e-8
    assert found.step < 1e-3
    with pytest.raises(ValueError, match="not finite around this input"):
        check_jvp(torch.log, (x,), (torch.ones_like(x),), halvings=2)


def test_fp32_inside_fp64() -> None:
    """Time embeddings in fp32 blur differences; under the mode they are fp64."""

    def embedding(t: Tensor) -> Tensor:
        frequencies = torch.arange(4, dtype=torch.float32).exp()
        return (t.float()[:, None] * frequencies).sin().to(torch.float32).double()

    t = torch.tensor([700.1, 3.3], dtype=torch.float64)
    blurred = check_jvp(embedding, (t,), (torch.ones_like(t),), tolerance=1.0)
    with Float64Inside():
        sharp = check_jvp(embedding, (t,), (torch.ones_like(t),))
    assert blurred.error > 1e-7
    assert sharp.error < 1e-10
    assert t.float().dtype == torch.float32


@pytest.mark.parametrize(
    ("primals", "tangents", "options", "message"),
    [
        ((torch.ones(2),), (), {}, "one tangent or None per primal, got 0 for 1"),
        ((torch.ones(2),), (torch.ones(3),), {}, "primal 0 is torch.float32 of shape"),
        ((torch.ones(2),), (torch.ones(2).double(),), {}, "its tangent torch.float64"),
        ((torch.ones(2, dtype=torch.int64),), (None,), {}, "primal 0 is torch.int64"),
        ((torch.ones(2),), (None,), {}, "the direction is zero"),
        ((torch.ones(2),), (torch.ones(2),), {"halvings": 0}, "halvings must be at least 1"),
        ((torch.ones(2),), (torch.ones(2),), {"largest_step": 0.0}, "largest_step positive"),
    ],
)
def test_arguments(primals: Any, tangents: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_jvp(torch.sin, primals, tangents, **options)
