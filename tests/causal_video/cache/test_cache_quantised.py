"""One byte per number: errors within their bounds, and the bounds are reached."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.causal_video.cache.quantised import (
    FP8_LARGEST,
    INT8_LARGEST,
    QuantisedKeysValues,
    quantise,
    stored,
)
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.prefix import KeysValues
from fewstep.causal_video.policy import CachePolicy, QuantiseKind
from tests.causal_video.tiny_causal import chunk_times, fill, latents, shared_student, text
from tests.tiny_networks import distance

KINDS: tuple[QuantiseKind, ...] = ("int8", "fp8")


FP8_RELATIVE, FP8_ABSOLUTE = 2.0**-4, 2.0**-10


def error_bound(x: Tensor, kind: QuantiseKind) -> Tensor:
    """The largest difference between x and what `quantise` restores, number by number, fp32 rounding apart.

    Half a step: scale / 2 for int8; for fp8 the larger of |x| / 16 and scale / 1024.

    Raises:
        ValueError: the kind is "none".
    """
    largest = x.abs().amax(dim=-1, keepdim=True)
    if kind == "int8":
        return (largest / INT8_LARGEST / 2).expand_as(x)
    if kind != "fp8":
        raise ValueError(f"kind must be int8 or fp8, got {kind!r}")
    return torch.maximum(x.abs() * FP8_RELATIVE, largest / FP8_LARGEST * FP8_ABSOLUTE)


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000), scale=st.sampled_from([1e-6, 1.0, 1e4]))
def test_errors_stay_within_their_bound(kind: QuantiseKind, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # A wide spread within a row, so that small numbers meet a large scale.
    x = scale * torch.randn(2, 3, 16, generator=generator).exp() * torch.randn(2, 3, 16, generator=generator)
    packed = quantise(x, kind)
    restored = torch.stack([packed.restore(i, torch.float64) for i in range(2)])
    bound = error_bound(x.double(), kind)
    assert float(((restored - x.double()).abs() / bound).max()) < 1 + 1e-4
    assert packed.numbers.element_size() == 1
    assert packed.scales.shape == (2, 3, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_sharp(kind: QuantiseKind) -> None:
    x = torch.linspace(-1, 1, 20001)[None]
    restored = quantise(x, kind).restore(0, torch.float64)
    used = (restored - x[0].double()).abs() / error_bound(x.double(), kind)[0]
    assert 0.9 < float(used.max()) < 1 + 1e-4


def test_zeros_stay_zero_and_other_numbers_are_refused() -> None:
    zero = quantise(torch.zeros(1, 2, 4), "int8")
    assert float(zero.restore(0, torch.float32).abs().max()) == 0
    with pytest.raises(ValueError, match="not finite"):
        quantise(torch.tensor([[1.0, float("nan")]]), "fp8")
    with pytest.raises(ValueError, match="int8 or fp8"):
        quantise(torch.zeros(1, 2), "none")
    with pytest.raises(ValueError, match="int8 or fp8"):
        error_bound(torch.zeros(1, 2), "none")


def test_layers_are_restored_in_their_dtype_and_without_quantising_nothing_changes() -> None:
    x = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64)
    packed = stored(KeysValues(x, 2 * x), "int8")
    assert isinstance(packed, QuantisedKeysValues)
    keys, values = packed.layer(1)
    assert keys.dtype == torch.float64
    assert float((keys - x[1]).abs().max()) < 0.05
    assert float((values - 2 * x[1]).abs().max()) < 0.1
    plain = stored(KeysValues(x, x), "none")
    assert torch.equal(plain.layer(2)[0], x[2])


@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 1e-5, 0.02), ("fp8", 1e-4, 0.1)])
def test_streams_with_a_quantised_cache_stay_close(kind: QuantiseKind, least: float, most: float) -> None:
    layout = ChunkLayout((1, 2, 2, 2))
    arguments = (shared_student(), latents(), chunk_times(layout), text(), layout)
    exact, _, _ = fill(*arguments, CachePolicy())
    rounded, _, _ = fill(*arguments, CachePolicy(quantise=kind))
    assert torch.equal(exact[:, :, :1], rounded[:, :, :1])
    assert least < distance(rounded[:, :, 1:], exact[:, :, 1:]) < most
