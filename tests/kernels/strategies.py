"""Random attention masks for hypothesis, each beside the matrix that its rule gives without any ranges."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fewstep.kernels import mask as masks
from fewstep.kernels.mask import AttentionMask
from fewstep.kernels.mask_intervals import canonical_intervals

BUILDERS = ("full", "causal", "block_causal", "teacher_forcing", "documents", "lengths")


@dataclass(frozen=True)
class MaskCase:
    """A mask, and the bool [1 or B, Nq, Nk] it has to equal."""

    mask: AttentionMask
    seen: Tensor


def chunk_lists(max_tokens: int, *, least: int = 1) -> st.SearchStrategy[list[int]]:
    """One to five chunk lengths, together at most `max_tokens`."""
    return st.lists(st.integers(least, max(least, max_tokens // 5)), min_size=1, max_size=5)


def windows() -> st.SearchStrategy[tuple[int | None, int]]:
    """(window, sink) in chunks."""
    return st.tuples(st.none() | st.integers(1, 4), st.integers(0, 3))


def chunk_of(chunks: list[int]) -> Tensor:
    """The chunk of each token."""
    return torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(chunks))


def block_causal_rule(chunks: list[int], window: int | None, sink: int) -> Tensor:
    """bool [1, N, N] of `block_causal`, pair by pair."""
    cq, ck = chunk_of(chunks)[:, None], chunk_of(chunks)[None]
    seen = ck <= cq
    if window is not None:
        seen = seen & ((ck > cq - window) | (ck < sink))
    return seen[None]


def teacher_forcing_rule(chunks: list[int], window: int | None, sink: int) -> Tensor:
    """bool [1, 2 N, 2 N] of `teacher_forcing`, pair by pair."""
    chunk = chunk_of(chunks).repeat(2)
    noisy = torch.arange(len(chunk)) >= len(chunk) // 2
    cq, ck, nq, nk = chunk[:, None], chunk[None], noisy[:, None], noisy[None]
    near = torch.ones_like(cq == ck) if window is None else (ck > cq - window) | (ck < sink)
    clean_clean = ~nq & ~nk & (ck <= cq) & near
    noisy_clean = nq & ~nk & (ck < cq) & near
    noisy_noisy = nq & nk & (ck == cq)
    return (clean_clean | noisy_clean | noisy_noisy)[None]


@st.composite
def builder_cases(draw: st.DrawFn, *, max_tokens: int = 120, batch: int | None = None) -> MaskCase:
    """A mask from one of the builders. `batch` is that of masks with one entry per sample; None draws it."""
    builder = draw(st.sampled_from(BUILDERS))
    tokens = st.integers(1, max_tokens)
    if builder == "full":
        queries, keys = draw(tokens), draw(tokens)
        return MaskCase(masks.full(queries, keys), torch.ones(1, queries, keys, dtype=torch.bool))
    if builder == "causal":
        count = draw(tokens)
        return MaskCase(masks.causal(count), torch.ones(1, count, count, dtype=torch.bool).tril())
    if builder == "block_causal":
        chunks, (window, sink) = draw(chunk_lists(max_tokens)), draw(windows())
        return MaskCase(masks.block_causal(chunks, window=window, sink=sink), block_causal_rule(chunks, window, sink))
    if builder == "teacher_forcing":
        chunks, (window, sink) = draw(chunk_lists(max_tokens // 2)), draw(windows())
        constant = draw(st.booleans())
        mask = masks.teacher_forcing(chunks, window=window, sink=sink, clean_is_constant=constant)
        return MaskCase(mask, teacher_forcing_rule(chunks, window, sink))
    if builder == "documents":
        parts = draw(chunk_lists(max_tokens, least=0).filter(any))
        return MaskCase(masks.documents(parts), (chunk_of(parts)[:, None] == chunk_of(parts)[None])[None])
    queries, keys = draw(tokens), draw(tokens)
    samples = draw(st.integers(1, 3)) if batch is None else batch
    visible = torch.tensor(draw(st.lists(st.integers(0, keys), min_size=samples, max_size=samples)))
    seen = (torch.arange(keys) < visible[:, None, None]).expand(-1, queries, -1)
    return MaskCase(masks.lengths(visible, queries=queries, keys=keys), seen)


@st.composite
def range_cases(
    draw: st.DrawFn,
    *,
    max_tokens: int = 120,
    batch: int | None = None,
    least: int = 1,
    tokens: tuple[int, int] | None = None,
) -> MaskCase:
    """Unordered, overlapping, empty ranges for each query, with empty rows and columns among them.

    `tokens` fixes (Nq, Nk); else both are drawn from `least` on.
    """
    queries, keys = tokens or (draw(st.integers(least, max_tokens)), draw(st.integers(least, max_tokens)))
    samples = draw(st.integers(1, 3)) if batch is None else draw(st.sampled_from([1, batch]))
    count = draw(st.integers(1, 4))
    # Neighbouring queries that see the same keys make full tiles, which independent rows never do.
    repeat = draw(st.sampled_from([1, 8, 40]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = -(-queries // repeat)
    ranges = torch.randint(0, keys + 1, (samples, rows, count, 2), generator=generator)
    kind = torch.rand(samples, rows, generator=generator)
    ranges[kind < 0.3] = torch.tensor([0, keys])
    # Sorted ends lie apart, so these queries need all of their ranges.
    ranges[kind > 0.6] = ranges[kind > 0.6].flatten(1).sort().values.unflatten(1, (count, 2))
    ranges = ranges.repeat_interleave(repeat, dim=1)[:, :queries]
    columns = torch.arange(keys)
    seen = ((columns >= ranges[..., :1]) & (columns < ranges[..., 1:])).any(dim=2)
    return MaskCase(AttentionMask(canonical_intervals(ranges), keys), seen)


@st.composite
def mask_cases(draw: st.DrawFn, *, max_tokens: int = 120, batch: int | None = None, activity: bool = True) -> MaskCase:
    """A mask of either kind; with `activity` often one with promises about tangents, random ones or the builder's."""
    case = draw(builder_cases(max_tokens=max_tokens, batch=batch) | range_cases(max_tokens=max_tokens, batch=batch))
    mask = case.mask
    if not activity:
        return dataclasses.replace(case, mask=mask.with_activity(queries=None, keys=None))
    if draw(st.integers(0, 2)) == 0:
        return case
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sides: list[Tensor | None] = []
    for count in (mask.queries, mask.keys):
        repeat = draw(st.sampled_from([1, 8, 40]))
        active = torch.rand(-(-count // repeat), generator=generator) < 0.5
        sides.append(active.repeat_interleave(repeat)[:count] if draw(st.integers(0, 2)) else None)
    return dataclasses.replace(case, mask=mask.with_activity(queries=sides[0], keys=sides[1]))
