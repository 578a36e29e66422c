"""Key ranges as tensors: their canonical form, and how rules about chunks and matrices of truth values become ranges.

Legend: B batch, Nq queries, Nk keys, R ranges per query.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Beside it fp32 keeps a thousandth of a score, and a weight of exp(-1e4) is 0 in every dtype.
LARGEST_BIAS = 1e4


def check_intervals(intervals: Tensor, keys: int) -> None:
    """Raise ValueError unless the ranges are int32 [1 or B, Nq, R, 2] within the keys, and canonical."""
    shape = tuple(intervals.shape)
    if intervals.dtype != torch.int32 or len(shape) != 4 or shape[0] < 1 or shape[2] < 1 or shape[3] != 2:
        raise ValueError(
            f"intervals are {intervals.dtype} {list(shape)}, but must be int32 [1 or B, queries, ranges, 2] with at "
            "least one range; a query that sees nothing has the range (0, 0)."
        )
    if keys < 0 or keys >= 2**31:
        raise ValueError(f"keys={keys} must be a number of keys from 0 to 2^31 - 1.")
    if intervals.numel() == 0:
        return
    starts, ends = intervals[..., 0], intervals[..., 1]
    if int(ends.amax()) > keys or int(intervals.amin()) < 0:
        raise ValueError(
            f"intervals reach from {int(intervals.amin())} to {int(ends.amax())}, but there are {keys} keys; cut the "
            f"ranges to [0, {keys}]."
        )
    used = ends > starts
    follows = (starts[..., 1:] > ends[..., :-1]) & used[..., :-1] | ~used[..., 1:]
    if not bool((used | (ends == 0) & (starts == 0)).all()) or not bool(follows.all()):
        raise ValueError(
            "intervals are not canonical: sorted, disjoint, touching ranges merged, padding (0, 0) at the end. Pass "
            "them through canonical_intervals first."
        )


def canonical_intervals(ranges: Tensor) -> Tensor:
    """Sort and merge key ranges, and drop empty ones.

    Args:
        ranges: integers [B, Nq, any number, 2] as (start, end), in any order, overlapping or not; end <= start is
            empty.

    Returns:
        int32 [B, Nq, R, 2] with the smallest R >= 1 that holds every query.
    """
    starts, ends = ranges[..., 0].long(), ranges[..., 1].long()
    batch, queries, count = starts.shape
    if starts.numel() == 0:
        return torch.zeros(batch, queries, 1, 2, dtype=torch.int32, device=ranges.device)
    used = ends > starts
    starts, order = starts.masked_fill(~used, 2**31).sort(dim=-1)
    used, ends = used.gather(-1, order), ends.gather(-1, order)
    reach = ends.masked_fill(~used, -1).cummax(dim=-1).values
    opens = used.clone()
    opens[..., 1:] &= starts[..., 1:] > reach[..., :-1]
    # Empty ranges go to one place beyond the last, which is cut off.
    place = (opens.cumsum(-1) - 1).masked_fill(~used, count)
    merged = ranges.new_zeros((batch, queries, count + 1, 2), dtype=torch.long)
    merged[..., 0].scatter_(-1, place.masked_fill(~opens, count), starts)
    merged[..., 1].scatter_reduce_(-1, place, ends, "amax")
    return merged[:, :, : max(1, int(opens.sum(-1).amax()))].to(torch.int32)


def chunk_bounds(chunks: Sequence[int], window: int | None, sink: int) -> list[int]:
    """First token of each chunk, and the number of tokens at the end; raises ValueError for what makes no mask."""
    if len(chunks) == 0:
        raise ValueError("chunks is empty; give the number of tokens of each chunk, at least one.")
    check_lengths("chunks (tokens of each)", chunks, least=1)
    check_lengths("window (chunks, the own one included)", [1 if window is None else window], least=1)
    check_lengths("sink (chunks)", [sink], least=0)
    return [0, *itertools.accumulate(chunks)]


def visible_chunks(bounds: list[int], chunk: int, after: int, window: int | None, sink: int) -> list[tuple[int, int]]:
    """Tokens of the chunks before `after` that lie in the sink or in the window that ends with `chunk`."""
    if window is None:
        return [(0, bounds[after])]
    return [(0, bounds[min(sink, after)]), (bounds[max(0, chunk - window + 1)], bounds[after])]


def repeat_rows(ranges: list[list[tuple[int, int]]], counts: Sequence[int], device: torch.device | str) -> Tensor:
    """Canonical int32 [1, sum of counts, R, 2] where entry n of `ranges` holds for counts[n] queries in a row."""
    most = max((len(entry) for entry in ranges), default=1)
    padded = [entry + [(0, 0)] * (most - len(entry)) for entry in ranges]
    canonical = canonical_intervals(torch.tensor(padded, dtype=torch.long).view(1, len(ranges), most, 2))
    return canonical[0].repeat_interleave(torch.tensor(counts, dtype=torch.long), dim=0)[None].to(device)


def write_runs(seen: Tensor, first: int, target: Tensor) -> None:
    """Write the runs of True in each row of `seen` [n, Nk] to `target` [n, ranges, 2]; rows start at query `first`."""
    edge = seen.new_zeros((len(seen), 1))
    before, here = torch.cat((edge, seen), dim=1), torch.cat((seen, edge), dim=1)
    rows, starts = (here & ~before).nonzero(as_tuple=True)
    ends = (before & ~here).nonzero(as_tuple=True)[1]
    counts = torch.bincount(rows, minlength=len(seen))
    most = int(counts.amax())
    if most > target.shape[1]:
        raise ValueError(
            f"Query {first + int(counts.argmax())} needs {most} ranges of keys and max_intervals is {target.shape[1]}. "
            "Raise max_intervals, or order the tokens so that what a query sees lies together."
        )
    place = torch.arange(len(rows), device=seen.device) - (counts.cumsum(0) - counts)[rows]
    target[rows, place] = torch.stack((starts, ends), dim=-1).to(torch.int32)


def check_lengths(name: str, values: Sequence[int], *, least: int) -> None:
    """Raise ValueError for a number below `least`."""
    if any(value < least for value in values):
        raise ValueError(f"{name}: {list(values)}, but each must be at least {least}.")


def check_activity(name: str, active: Tensor | None, tokens: int, device: torch.device) -> None:
    """Raise ValueError unless the promise is None or bool [tokens] on the device of the mask."""
    if active is None:
        return
    if active.dtype != torch.bool or tuple(active.shape) != (tokens,) or active.device != device:
        raise ValueError(
            f"{name} is {active.dtype} {list(active.shape)} on {active.device}, but must be bool [{tokens}] on "
            f"{device}: one entry per token, False where tangents are exactly zero."
        )


def either_promise(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Active where neither promises zero."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def check_key_bias(bias: Tensor, keys: int, device: torch.device) -> None:
    """Raise ValueError unless a bias is floating [1 or B, Nk] on the mask's device, without gradient or tangent."""
    if not isinstance(bias, Tensor):
        raise ValueError(f"key_bias is {type(bias).__name__}; give a tensor [1 or B, {keys}], or mask.ranges for none.")
    if is_batched(bias) or forward_ad.unpack_dual(bias).tangent is not None:
        raise ValueError(
            "key_bias carries a tangent, or batches of a vmap; it is a constant of the call. Make it outside of the "
            "function that is differentiated or mapped, or add it as a column of q and k."
        )
    if bias.ndim != 2 or bias.shape[1] != keys or not bias.is_floating_point():
        raise ValueError(f"key_bias is {bias.dtype} {list(bias.shape)}, but must be floating [1 or B, {keys}].")
    if bias.device != device or (bias.requires_grad and torch.is_grad_enabled()):
        raise ValueError(
            f"key_bias is on {bias.device} (mask: {device}), requires_grad {bias.requires_grad}; it is a constant on "
            "the mask's device: .to(device), .detach()."
        )


def finite_bias(bias: Tensor) -> Tensor:
    """The bias in fp32 at least, within 1e4: a row of which all keys are hidden is then as if none was, and no NaN."""
    wide = bias.detach().to(torch.promote_types(bias.dtype, torch.float32))
    found = wide.clamp(-LARGEST_BIAS, LARGEST_BIAS).contiguous()
    # All that is computed inside of a torch.func.jvp is wrapped, and kernels read numbers.
    while is_wrapped(found):
        found = torch._C._functorch.get_unwrapped(found)  # pyright: ignore[reportAttributeAccessIssue]
    return found


def is_wrapped(x: Tensor) -> bool:
    """Whether a transform of torch.func has wrapped a tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]


def is_batched(x: Tensor) -> bool:
    """Whether a tensor has batches of a vmap, under whatever else has wrapped it."""
    while is_wrapped(x):
        if torch._C._functorch.is_batchedtensor(x):  # pyright: ignore[reportAttributeAccessIssue]
            return True
        x = torch._C._functorch.get_unwrapped(x)  # pyright: ignore[reportAttributeAccessIssue]
    return False
