"""What a network is told beside its state and time: text, labels, pictures, sizes.

Every field has a rule in `FIELDS`, and everything a condition can do is written once over that table: a family that
needs another field adds a line there and no branch anywhere.

Legend: B batch, N text tokens, D token width, P pooled width; C, h, w of latents, F latent frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class FieldRule(NamedTuple):
    """How a field of a condition is treated.

    Attributes:
        axes: its axes; of "B" it has one entry for each sample, without "B" the batch shares it.
        cast: whether it follows the dtype of `Condition.to`; ids, counts, scales and masks keep theirs.
        mask: the field that is its mask, with which members of other lengths are joined.
        of_sample: whether it belongs to the sample and not to the prompt, so that the unconditional side of guidance is
            told the same.
        instead_of: the field whose place it takes on the unconditional side of the same samples.
    """

    axes: tuple[str, ...]
    cast: bool = True
    mask: str | None = None
    of_sample: bool = False
    instead_of: str | None = None


FIELDS: dict[str, FieldRule] = {
    "tokens": FieldRule(("B", "N", "D"), mask="token_mask"),
    "pooled": FieldRule(("B", "P")),
    # A bf16 count would round above 256, and a bf16 size as well.
    "token_counts": FieldRule(("N",), cast=False),
    "time_ids": FieldRule(("B", "6"), cast=False, of_sample=True),
    "token_mask": FieldRule(("B", "N"), cast=False),
    "guidance": FieldRule(("B",), cast=False, of_sample=True),
    "control": FieldRule(("B", "C", "h", "w"), of_sample=True),
    "labels": FieldRule(("B",), cast=False),
    "tokens_2": FieldRule(("B", "N2", "D2"), mask="token_mask_2"),
    "token_mask_2": FieldRule(("B", "N2"), cast=False),
    "image_tokens": FieldRule(("B", "R", "E"), of_sample=True),
    "image_latents": FieldRule(("B", "C", "F", "h", "w"), of_sample=True),
    "image_mask": FieldRule(("B", "C", "F", "h", "w"), of_sample=True),
    "null_tokens": FieldRule(("B", "N3", "D"), mask="null_token_mask", of_sample=True, instead_of="tokens"),
    "null_token_mask": FieldRule(("B", "N3"), cast=False, of_sample=True, instead_of="token_mask"),
}


@dataclass(frozen=True, eq=False)
class Condition:
    """What a network is told. At least tokens or labels are there; the rest is None where a network is not told it.

    Attributes:
        tokens: [B, N, D] text embeddings.
        pooled: [B, P] pooled text embedding.
        token_counts: [N] float, how many identical tokens each entry stands for, shared by the batch; None is one each.
        time_ids: [B, 6] SDXL micro-conditioning (original size, crop, target size in pixels).
        token_mask: [B, N], 1 for tokens of the text and 0 for padding; None where all are looked at. Masked conditions
            of different N are joined by padding the shorter.
        guidance: [B] the scale w of u + w (c - u) that a network with a guidance embedding is told.
        control: [B, C, h, w] latents of the pictures that a ControlNet follows.
        labels: [B] int64 class labels.
        tokens_2, token_mask_2: a second text stream, as tokens and token_mask.
        image_tokens: [B, R, E] embeddings of a picture that is shown, or packed latents of pictures to follow.
        image_latents: [B, C, F, h, w] latents of the given frames, or of F pictures to edit or to follow.
        image_mask: [B, C', F, h, w], 1 where a frame is given.
        null_tokens, null_token_mask: what takes the place of tokens and token_mask on the unconditional side, where its
            text was encoded together with the picture of the sample.

    Raises:
        ValueError: a shape is wrong, batch sizes differ, or neither tokens nor labels are there.
    """

    tokens: Tensor | None = None
    pooled: Tensor | None = None
    token_counts: Tensor | None = None
    time_ids: Tensor | None = None
    token_mask: Tensor | None = None
    guidance: Tensor | None = None
    control: Tensor | None = None
    labels: Tensor | None = None
    tokens_2: Tensor | None = None
    token_mask_2: Tensor | None = None
    image_tokens: Tensor | None = None
    image_latents: Tensor | None = None
    image_mask: Tensor | None = None
    null_tokens: Tensor | None = None
    null_token_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens is None and self.labels is None:
            raise ValueError("a condition needs tokens [B, N, D] or labels [B]")
        present = self.present()
        # The main field says B and the texts their N; the others are held against them.
        sizes: dict[str, int] = {"6": 6}
        for name in ("tokens", "tokens_2", "null_tokens", "labels"):
            if name in present and present[name].ndim == len(FIELDS[name].axes):
                sizes = dict(zip(FIELDS[name].axes, present[name].shape, strict=True)) | sizes
        for name, tensor in present.items():
            expected = [sizes.get(axis, axis) for axis in FIELDS[name].axes]
            fits = tensor.ndim == len(expected)
            if not fits or any(isinstance(a, int) and a != b for a, b in zip(expected, tensor.shape, strict=True)):
                raise ValueError(f"{name} must be [{', '.join(map(str, expected))}], got shape {tuple(tensor.shape)}")
        if self.token_counts is not None and self.token_mask is not None:
            raise ValueError("token_mask must stand without token_counts")

    def present(self) -> dict[str, Tensor]:
        """The fields that are there."""
        fields = {name: getattr(self, name) for name in FIELDS}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    @property
    def batch_size(self) -> int:
        return self._main.shape[0]

    @property
    def device(self) -> torch.device:
        return self._main.device

    @property
    def text(self) -> Tensor:
        """The tokens [B, N, D]. Raises ValueError for a condition without text."""
        if self.tokens is None:
            raise ValueError("this condition has class labels and no text: a network that reads text needs tokens")
        return self.tokens

    @property
    def _main(self) -> Tensor:
        main = self.labels if self.tokens is None else self.tokens
        assert main is not None
        return main

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move; cast embeddings alone (`FieldRule.cast`)."""
        return self._changed(lambda name, x: x.to(device=device, dtype=dtype if FIELDS[name].cast else None))

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

        `other` is a batch of the same size or of one, for instance the unconditional embedding of prompt dropout. What
        belongs to the samples themselves (`FieldRule.of_sample`) stays.

        Raises:
            ValueError: the mask is not bool [B], or `other` differs in shape, fields or token_counts.
        """
        if mask.dtype != torch.bool or mask.shape != (self.batch_size,):
            raise ValueError(f"mask must be bool [{self.batch_size}], got {mask.dtype} {tuple(mask.shape)}")
        mine, theirs = _same_length([self, other.expand(self.batch_size).of_same_samples(self)])
        _require_same_layout(mine, theirs)
        return mine._map_named(
            lambda name, x: torch.where(
                mask.to(x.device).view(-1, *([1] * (x.ndim - 1))), x, theirs.present()[name].to(x.device)
            )
        )

    def of_same_samples(self, other: Condition) -> Condition:
        """This condition with what `other` is told of its samples: sizes, pictures, an embedded guidance."""
        theirs = {name: x for name, x in other.present().items() if FIELDS[name].of_sample}
        theirs |= {FIELDS[name].instead_of or name: x for name, x in theirs.items()}
        return replace(self, **theirs)

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
        return first._map_named(lambda name, _: torch.cat([one.present()[name] for one in conditions]))

    def with_control(self, control: Tensor) -> Condition:
        """The same with the latents [B, C, h, w] of the pictures that a ControlNet follows."""
        return replace(self, control=control.to(self.device))

    def with_guidance(self, scale: float) -> Condition:
        """The same with one embedded guidance for all samples."""
        return replace(self, guidance=torch.full((self.batch_size,), scale, device=self.device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """Apply `change` to every tensor with a batch axis."""
        return self._map_named(lambda _, tensor: change(tensor))

    def _map_named(self, change: Callable[[str, Tensor], Tensor]) -> Condition:
        """Apply `change` to every tensor with a batch axis and its name; the others stay."""
        return self._changed(lambda name, x: change(name, x) if FIELDS[name].axes[0] == "B" else x)

    def _changed(self, change: Callable[[str, Tensor], Tensor]) -> Condition:
        return Condition(**{name: change(name, tensor) for name, tensor in self.present().items()})


def _same_length(conditions: Sequence[Condition]) -> list[Condition]:
    """Conditions with masks, padded with masked zero tokens to the longest; others as they are."""
    padded = list(conditions)
    for name, rule in FIELDS.items():
        if rule.mask is None or any(getattr(one, rule.mask) is None for one in conditions):
            continue
        longest = max(getattr(one, name).shape[1] for one in conditions)
        for place, one in enumerate(padded):
            tokens, mask = getattr(one, name), getattr(one, rule.mask)
            missing = longest - tokens.shape[1]
            if missing > 0:
                tokens = functional.pad(tokens, (0, 0, 0, missing))
                padded[place] = replace(one, **{name: tokens, rule.mask: functional.pad(mask, (0, missing))})
    return padded


def _require_same_layout(a: Condition, b: Condition) -> None:
    for name, rule in FIELDS.items():
        x, y = getattr(a, name), getattr(b, name)
        if rule.axes[0] != "B":
            if x is y:
                continue
            if x is None or y is None or not torch.equal(x, y.to(device=x.device, dtype=x.dtype)):
                raise ValueError(f"conditions differ in {name}, which the whole batch shares: encode them the same way")
        elif (x is None) != (y is None) or (x is not None and x.shape[1:] != y.shape[1:]):
            shapes = tuple(None if tensor is None else tuple(tensor.shape) for tensor in (x, y))
            raise ValueError(f"conditions differ in {name}: {shapes[0]} and {shapes[1]}")
