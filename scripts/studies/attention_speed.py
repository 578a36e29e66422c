"""Correctness, time and memory of attention with tangents, beside what torch offers; all rows of a case in one run.

Times are taken in turns, one call of each row after the other, so that a slow moment of the machine meets all rows. A
row that is wrong is an error and no time.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fewstep.kernels import mask as masks
from fewstep.kernels.attention import attention, attention_jvp
from fewstep.kernels.attention_reference import attention_jvp_reference
from fewstep.kernels.attention_tiles import KEY_TILE, QUERY_TILES
from fewstep.kernels.mask import AttentionMask
from fewstep.kernels.mask_conversion import dense, flex_block_mask

CHUNKS = 16


MASKS = ("full", "block_causal", "teacher_forcing", "teacher_forcing_active", "window_sink")


# Largest error relative to the largest number of the float64 result.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


CHECKED_QUERIES = 64


@dataclass(frozen=True)
class Case:
    """One problem: [batch, heads, tokens, width] in a dtype on a device, under one of `MASKS`."""

    tokens: int
    mask: str
    heads: int = 8
    width: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass(frozen=True)
class Row:
    """Milliseconds of one way to compute a case (smallest and median of the rounds), and what they mean.

    `useful_gflops` counts the products that the exact mask and the activity of tangents leave, per second; `memory_mb`
    is the peak above the inputs, outputs included, None where it was not measured.
    """

    name: str
    milliseconds: float
    median_milliseconds: float
    useful_gflops: float
    memory_mb: float | None


@dataclass(frozen=True)
class Result:
    """All rows of a case; `error` is that of the tangent against float64, `density` the share of pairs that count.

    `tile_density` is the share of pairs in tiles that are not empty. `error_dense` is the error of torch's dense
    tangent.
    """

    case: Case
    density: float
    tile_density: float
    error: float
    error_dense: float | None
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """The row of that name; KeyError where it was not measured."""
        found = {row.name: row for row in self.rows}
        return found[name]


def build_mask(case: Case) -> AttentionMask:
    """The mask of a case; the packed sequences of teacher forcing have as many tokens as the others.

    Raises:
        ValueError: the name is none of `MASKS`, or the tokens do not split into chunks.
    """
    if case.tokens % (2 * CHUNKS) != 0:
        raise ValueError(f"tokens={case.tokens} must be a multiple of {2 * CHUNKS}, for {CHUNKS} chunks in each half.")
    chunks = [case.tokens // CHUNKS] * CHUNKS
    halves = [case.tokens // (2 * CHUNKS)] * CHUNKS
    if case.mask == "full":
        return masks.full(case.tokens, device=case.device)
    if case.mask == "block_causal":
        return masks.block_causal(chunks, device=case.device)
    if case.mask == "window_sink":
        return masks.block_causal(chunks, window=3, sink=1, device=case.device)
    if case.mask in ("teacher_forcing", "teacher_forcing_active"):
        constant = case.mask == "teacher_forcing_active"
        return masks.teacher_forcing(halves, clean_is_constant=constant, device=case.device)
    raise ValueError(f"mask={case.mask!r} is unknown; choose one of {', '.join(MASKS)}.")


def build_inputs(case: Case, seed: int = 0) -> list[Tensor]:
    """q, k, v and their tangents, normal with seed; under teacher forcing tangents of the clean half are zero."""
    generator = torch.Generator(case.device).manual_seed(seed)
    shape = (case.batch, case.heads, case.tokens, case.width)
    inputs = [torch.randn(shape, generator=generator, device=case.device).to(case.dtype) for _ in range(6)]
    if case.mask.startswith("teacher_forcing"):
        for tangent in inputs[3:]:
            tangent[:, :, : case.tokens // 2] = 0
    return inputs


def pair_counts(mask: AttentionMask) -> tuple[float, float]:
    """(pairs that the mask shows, products of width D that output and tangent need there: 2, 4, 5 or 6 per pair)."""
    lengths = (mask.intervals[..., 1] - mask.intervals[..., 0]).sum(-1, dtype=torch.float64)
    pairs = lengths.sum().item()
    if mask.query_active is None or mask.key_active is None:
        return pairs, 6 * pairs
    active_before = torch.nn.functional.pad(mask.key_active.double().cumsum(0), (1, 0))
    ends = active_before[mask.intervals.long()]
    with_keys = (ends[..., 1] - ends[..., 0]).sum(-1)
    queries = mask.query_active.double()
    both, q_only = (with_keys * queries).sum(), ((lengths - with_keys) * queries).sum()
    k_only, neither = (with_keys * (1 - queries)).sum(), ((lengths - with_keys) * (1 - queries)).sum()
    return pairs, (6 * both + 4 * q_only + 5 * k_only + 2 * neither).item()


def ways(case: Case, mask: AttentionMask, inputs: list[Tensor], *, dense_jvp: bool) -> dict[str, Callable[[], object]]:
    """Each way to compute the case, by its name. `sdpa` rows know no mask: they are the floor."""
    q, k, v, *tangents = inputs
    own = "triton" if case.device.startswith("cuda") else "tiled"
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    ours = attention(leaves[0], leaves[1], leaves[2], mask=mask, backend=own)
    floor = scaled_dot_product_attention(leaves[0], leaves[1], leaves[2])
    cotangent = torch.ones_like(q)

    def backward_of(output: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(output, leaves, cotangent, retain_graph=True)

    found: dict[str, Callable[[], object]] = {
        "forward_jvp": lambda: attention_jvp(q, k, v, *tangents, mask=mask),
        "forward": lambda: attention(q, k, v, mask=mask, backend=own),
        "sdpa_forward": lambda: scaled_dot_product_attention(q, k, v),
        "backward": backward_of(ours),
        "sdpa_backward": backward_of(floor),
    }
    if dense_jvp:
        found["dense_jvp"] = dense_jvp_call(mask, inputs)
    return found


def dense_jvp_call(mask: AttentionMask, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
    """torch.func.jvp through torch's own attention with a dense mask: what there is without this package."""
    q, k, v, *tangents = inputs
    seen = (
        None
        if mask.intervals.shape[2] == 1 and bool((mask.intervals[..., 1] == mask.keys).all())
        else dense(mask)[:, None]
    )

    def call() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            primals = (q, k, v)
            result = torch.func.jvp(
                lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=seen), primals, tuple(tangents)
            )
        return result[0], result[1]

    return call


def flex_call(mask: AttentionMask, inputs: list[Tensor]) -> Callable[[], Tensor]:
    """Compiled FlexAttention under the same mask, forward alone; it has no tangent."""
    from torch.nn.attention.flex_attention import flex_attention

    block_mask = flex_block_mask(mask)
    compiled = torch.compile(flex_attention)
    q, k, v = inputs[:3]

    def call() -> Tensor:
        with torch.no_grad():
            return compiled(q, k, v, block_mask=block_mask)

    return call


def tangent_error(mask: AttentionMask, inputs: list[Tensor], tangent: Tensor) -> float:
    """Largest error of a tangent at some queries, relative to the largest float64 number of it."""
    queries = torch.linspace(0, mask.queries - 1, min(CHECKED_QUERIES, mask.queries)).long().unique()
    q, k, v, tq, tk, tv = (x.double() for x in inputs)
    part = AttentionMask(mask.intervals[:, queries], mask.keys)
    exact = attention_jvp_reference(q[:, :, queries], k, v, tq[:, :, queries], tk, tv, mask=part).tangent
    assert exact is not None
    return ((tangent[:, :, queries].double() - exact).abs().amax() / exact.abs().amax()).item()


def measure(case: Case, *, rounds: int, dense_jvp: bool, flex: bool, memory: bool) -> Result:
    """Check a case against float64, then time all ways to compute it in turns.

    Args:
        case: the problem.
        rounds: timed calls of each way; one that takes over two seconds is timed once.
        dense_jvp: include torch's dense tangent (memory grows with the square of the tokens).
        flex: include compiled FlexAttention.
        memory: measure the peak of the two tangents, each in a process of its own.

    Raises:
        ValueError: the tangent is wrong.
    """
    mask, inputs = build_mask(case), build_inputs(case)
    calls = ways(case, mask, inputs, dense_jvp=dense_jvp)
    tangent = attention_jvp(*inputs, mask=mask).tangent
    assert tangent is not None
    error = tangent_error(mask, inputs, tangent)
    if not error < TOLERANCE[case.dtype]:
        raise ValueError(f"{case}: the tangent is off by {error:.2e}, more than {TOLERANCE[case.dtype]:.0e}; no times.")
    if flex:
        calls["flex_forward"] = flex_call(mask, inputs)
    error_dense = tangent_error(mask, inputs, dense_jvp_call(mask, inputs)()[1]) if dense_jvp else None
    times = time_in_turns(calls, rounds, torch.device(case.device))
    pairs, products = pair_counts(mask)
    work = case.batch * case.heads * case.width * 2e-9
    units = {"forward_jvp": products, "dense_jvp": products, "backward": 5 * pairs}
    square = case.tokens**2
    units |= {"sdpa_forward": 2 * square, "sdpa_backward": 5 * square}
    peaks = {name: peak_memory(case, name) for name in ("forward_jvp", "dense_jvp") if memory and name in calls}
    rows = tuple(
        Row(name, min(t) * 1e3, statistics.median(t) * 1e3, work * units.get(name, 2 * pairs) / min(t), peaks.get(name))
        for name, t in times.items()
    )
    schedule = mask.schedule(QUERY_TILES[-1], KEY_TILE)
    tiles = schedule.full + schedule.partial
    return Result(case, pairs / square, tiles / (tiles + schedule.empty), error, error_dense, rows)


def time_in_turns(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call per round, after one call of warm-up each."""
    slow = {name for name, call in calls.items() if seconds(call, device) > 2}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            if number == 0 or name not in slow:
                times[name].append(seconds(call, device))
    return times


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def peak_memory(case: Case, name: str) -> float:
    """Peak megabytes above the inputs of one way to compute a case, outputs included."""
    if case.device.startswith("cuda"):
        return memory_of_call(case, name)
    # A process keeps memory that it once used, so each measurement gets a new process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(memory_of_call, case, name, torch.get_num_threads()).result()


def memory_of_call(case: Case, name: str, threads: int = 0) -> float:
    """What `peak_memory` runs in its own process."""
    if threads:
        torch.set_num_threads(threads)
    mask, inputs = build_mask(case), build_inputs(case)
    small = Case(2 * CHUNKS, case.mask, dtype=case.dtype, device=case.device)
    for warm in (small, case):
        call_mask, call_inputs = (mask, inputs) if warm is case else (build_mask(small), build_inputs(small))
        call = (
            (lambda: attention_jvp(*call_inputs, mask=call_mask))  # noqa: B023 - called before the next turn
            if name == "forward_jvp"
            else dense_jvp_call(call_mask, call_inputs)
        )
        before = reset_high_water(case.device)
        call()
    return high_water(case.device) - before


def reset_high_water(device: str) -> float:
    """Forget earlier peaks of this process; megabytes in use now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark becomes the present size.
    return high_water(device)


def high_water(device: str) -> float:
    """Peak megabytes of this process on the device since `reset_high_water`."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


COLUMNS = (
    ("tokens", 7),
    ("mask", 24),
    ("tiles", 6),
    ("error", 9),
    ("JVP ms", 10),
    ("MB", 7),
    ("dense ms", 10),
    ("MB", 8),
    ("dense/JVP", 10),
    ("fwd ms", 9),
    ("SDPA ms", 9),
    ("of SDPA", 8),
    ("bwd ms", 9),
    ("SDPA", 9),
)


def table_of(results: list[Result], *, heading: bool = True) -> str:
    """One line per result; "of SDPA" is the rate of output and tangent against that of SDPA forward, in products/s."""
    lines = ["".join(name.rjust(width) for name, width in COLUMNS)] if heading else []
    for result in results:
        rows = {row.name: row for row in result.rows}
        jvp, sdpa = rows["forward_jvp"], rows["sdpa_forward"]
        dense = rows.get("dense_jvp")
        cells = (
            str(result.case.tokens),
            result.case.mask,
            f"{result.tile_density:.3f}",
            f"{result.error:.1e}",
            f"{jvp.milliseconds:.2f}",
            megabytes(jvp.memory_mb),
            "-" if dense is None else f"{dense.milliseconds:.1f}",
            megabytes(None if dense is None else dense.memory_mb),
            "-" if dense is None else f"{dense.milliseconds / jvp.milliseconds:.1f}",
            f"{rows['forward'].milliseconds:.2f}",
            f"{sdpa.milliseconds:.2f}",
            f"{jvp.useful_gflops / sdpa.useful_gflops:.2f}",
            f"{rows['backward'].milliseconds:.2f}",
            f"{rows['sdpa_backward'].milliseconds:.2f}",
        )
        lines.append("".join(cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)))
    return "\n".join(lines)


def megabytes(value: float | None) -> str:
    """A number of megabytes, or a dash."""
    return "-" if value is None else f"{value:.0f}"


def record_of(results: list[Result]) -> list[dict[str, object]]:
    """Results as JSON values."""
    return [{**asdict(result), "case": {**asdict(result.case), "dtype": str(result.case.dtype)}} for result in results]
