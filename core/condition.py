"""The embeddings a network is called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Condition:
    """What a network sees of its prompts. B batch, N tokens, D token width, P pooled width.

    Attributes:
        tokens: [B, N, D] text embeddings.
        pooled: [B, P] pooled text embedding, or None.
        token_counts: [N] float, how many identical tokens each entry stands for, shared by the batch; None is one each.
        time_ids: [B, 6] SDXL micro-conditioning (original size, crop, target size in pixels), or None.
        token_mask: [B, N], 1 for tokens of the text and 0 for padding, or None where all are looked at. Masked
            conditions of different N are joined by padding the shorter.
        guidance: [B] the scale w of u + w (c - u) that a network with a guidance embedding is told, or None.
        control: [B, C, h, w] latents of the pictures that a ControlNet follows, or None.

    Raises:
        ValueError: a shape is wrong or batch sizes differ.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    token_counts: Tensor | None = None
    time_ids: Tensor | None = None
    token_mask: Tensor | None = None
    guidance: Tensor | None = None
    control: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3:
            raise ValueError(f"tokens must be [B, N, D], got shape {tuple(self.tokens.shape)}")
        for name, tensor in (("pooled", self.pooled), ("time_ids", self.time_ids)):
            if tensor is not None and (tensor.ndim != 2 or tensor.shape[0] != self.batch_size):
                raise ValueError(
                    f"{name} must be two-dimensional with the batch size {self.batch_size} of tokens, "
                    f"got shape {tuple(tensor.shape)}"
                )
        counts = self.token_counts
        if counts is not None and counts.shape != self.tokens.shape[1:2]:
            raise ValueError(f"token_counts must be [{self.tokens.shape[1]}], got shape {tuple(counts.shape)}")
        mask, guidance = self.token_mask, self.guidance
        if mask is not None and (mask.shape != self.tokens.shape[:2] or counts is not None):
            raise ValueError(
                f"token_mask must be {tuple(self.tokens.shape[:2])} and stand without token_counts, "
                f"got shape {tuple(mask.shape)}"
            )
        if guidance is not None and guidance.shape != (self.batch_size,):
            raise ValueError(f"guidance must be [{self.batch_size}], got shape {tuple(guidance.shape)}")
        control = self.control
        if control is not None and (control.ndim != 4 or control.shape[0] != self.batch_size):
            raise ValueError(f"control must be [{self.batch_size}, C, h, w], got shape {tuple(control.shape)}")

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move; cast embeddings only. token_counts stay fp32 or wider, for a bf16 count would round above 256."""
        return Condition(
            tokens=self.tokens.to(device=device, dtype=dtype),
            pooled=None if self.pooled is None else self.pooled.to(device=device, dtype=dtype),
            token_counts=None if self.token_counts is None else self.token_counts.to(device=device),
            time_ids=None if self.time_ids is None else self.time_ids.to(device=device),
            token_mask=None if self.token_mask is None else self.token_mask.to(device=device),
            guidance=None if self.guidance is None else self.guidance.to(device=device),
            control=None if self.control is None else self.control.to(device=device, dtype=dtype),
        )

    def repeat(self, n: int) -> Condition:
        """The whole batch n times over: [a, b] becomes [a, b, a, b, ...].

        Raises:
            ValueError: n < 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        return self._map(lambda tensor: tensor.repeat(n, *([1] * (tensor.ndim - 1))))

    def index(self, indices: Tensor | slice) -> Condition:
        """The chosen samples: indices [M] int64, or a slice. The batch axis stays.

        Raises:
            ValueError: a tensor of indices is not one-dimensional int64.
        """
        if isinstance(indices, Tensor) and (indices.ndim != 1 or indices.dtype != torch.int64):
            raise ValueError(f"indices must be int64 of shape [M], got {indices.dtype} {tuple(indices.shape)}")
        return self._map(lambda tensor: tensor[indices.to(tensor.device) if isinstance(indices, Tensor) else indices])

    def expand(self, batch_size: int) -> Condition:
        """A batch of one seen as `batch_size` samples, without a copy; a batch of that size is returned as it is.

        Raises:
            ValueError: this batch is neither 1 nor `batch_size`.
        """
        if self.batch_size == batch_size:
            return self
        if self.batch_size != 1:
            raise ValueError(f"only a batch of 1 can be expanded to {batch_size}, this one has {self.batch_size}")
        return self._map(lambda tensor: tensor.expand(batch_size, *tensor.shape[1:]))

    def where(self, mask: Tensor, other: Condition) -> Condition:
        """Replace samples: mask [B] bool keeps a sample where True and takes it from `other` where False.

        `other` is a batch of the same size or of one, for instance the unconditional embedding of prompt dropout.

        Raises:
            ValueError: the mask is not bool [B], or `other` differs in shape, fields or token_counts.
        """
        if mask.dtype != torch.bool or mask.shape != (self.batch_size,):
            raise ValueError(f"mask must be bool [{self.batch_size}], got {mask.dtype} {tuple(mask.shape)}")
        mine_padded, other = _same_length([self, other.expand(self.batch_size)])
        _require_same_layout(mine_padded, other)

        def pick(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if mine is None or theirs is None:
                return None
            return torch.where(mask.to(mine.device).view(-1, *([1] * (mine.ndim - 1))), mine, theirs)

        tokens = pick(mine_padded.tokens, other.tokens)
        assert tokens is not None
        return Condition(
            tokens,
            pick(self.pooled, other.pooled),
            self.token_counts,
            pick(self.time_ids, other.time_ids),
            pick(mine_padded.token_mask, other.token_mask),
            pick(self.guidance, other.guidance),
            pick(self.control, other.control),
        )

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Join batches in order.

        Raises:
            ValueError: the list is empty, or members differ in token shape, fields or token_counts.
        """
        if len(conditions) == 0:
            raise ValueError("cannot join an empty list of conditions")
        conditions = _same_length(conditions)
        first = conditions[0]
        for condition in conditions[1:]:
            _require_same_layout(first, condition)

        def join(parts: list[Tensor | None]) -> Tensor | None:
            present = [part for part in parts if part is not None]
            return torch.cat(present) if present else None

        return Condition(
            tokens=torch.cat([condition.tokens for condition in conditions]),
            pooled=join([condition.pooled for condition in conditions]),
            token_counts=first.token_counts,
            time_ids=join([condition.time_ids for condition in conditions]),
            token_mask=join([condition.token_mask for condition in conditions]),
            guidance=join([condition.guidance for condition in conditions]),
            control=join([condition.control for condition in conditions]),
        )

    def with_control(self, control: Tensor) -> Condition:
        """The same with the latents [B, C, h, w] of the pictures that a ControlNet follows."""
        return replace(self, control=control.to(self.tokens.device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """Apply `change` to every tensor with a batch axis."""
        return Condition(
            tokens=change(self.tokens),
            pooled=None if self.pooled is None else change(self.pooled),
            token_counts=self.token_counts,
            time_ids=None if self.time_ids is None else change(self.time_ids),
            token_mask=None if self.token_mask is None else change(self.token_mask),
            guidance=None if self.guidance is None else change(self.guidance),
            control=None if self.control is None else change(self.control),
        )


def _same_length(conditions: Sequence[Condition]) -> list[Condition]:
    """Conditions with masks, padded with masked zero tokens to the longest; others as they are."""
    longest = max(condition.tokens.shape[1] for condition in conditions)

    def padded(condition: Condition) -> Condition:
        missing = longest - condition.tokens.shape[1]
        if condition.token_mask is None or missing == 0:
            return condition
        tokens = functional.pad(condition.tokens, (0, 0, 0, missing))
        return replace(condition, tokens=tokens, token_mask=functional.pad(condition.token_mask, (0, missing)))

    return [padded(condition) for condition in conditions]


def _require_same_layout(a: Condition, b: Condition) -> None:
    if a.tokens.shape[1:] != b.tokens.shape[1:]:
        raise ValueError(f"conditions differ in token shape: {tuple(a.tokens.shape)} and {tuple(b.tokens.shape)}")
    for name in ("pooled", "time_ids", "token_mask", "guidance", "control"):
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None) or (x is not None and y is not None and x.shape[1:] != y.shape[1:]):
            shapes = tuple(None if tensor is None else tuple(tensor.shape) for tensor in (x, y))
            raise ValueError(f"conditions differ in {name}: {shapes[0]} and {shapes[1]}")
    x, y = a.token_counts, b.token_counts
    if x is y:
        return
    if x is None or y is None or not torch.equal(x, y.to(device=x.device, dtype=x.dtype)):
        raise ValueError("conditions differ in token_counts, which the whole batch shares: encode them the same way")
