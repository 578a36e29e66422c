from __future__ import annotations

from torch import Tensor

from fewstep.core.paths import at_least_fp32


def expand_weight(weight: Tensor, x: Tensor) -> Tensor:
    """View [B] so that it broadcasts over x [B, ...]; fp32 at least.

    Raises:
        ValueError: weight is not [B].
    """
    if weight.shape != x.shape[:1]:
        raise ValueError(f"a weight per sample must be [{x.shape[0]}], got shape {tuple(weight.shape)}")
    return at_least_fp32(weight).view(-1, *([1] * (x.ndim - 1)))


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError, naming each tensor, unless all have one shape: broadcasting would average the wrong pairs."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"the tensors of a loss must have one shape, got {shapes}")
