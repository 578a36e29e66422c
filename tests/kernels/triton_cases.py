"""Calls of the Triton attention kernels, compared with float64; run on a GPU, or in Triton's interpreter as a script.

The script, `TRITON_INTERPRET=1 python -m tests.kernels.triton_cases`, prints one JSON object: for each case, and each
quantity of it, the error and the error that is allowed. The variable has to be set before Triton is imported.

Errors are relative, in the L2 norm. Allowed is twice the error of the same formulas in plain PyTorch in the dtype of
the case, plus a floor; for fp16 and bf16 at most a few roundings, since plain PyTorch rounds scores as well. Output
buffers are full of NaN before a kernel writes to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.kernels import mask as masks
from fewstep.kernels.attention_backward_triton import attention_backward
from fewstep.kernels.attention_jvp_triton import attention_forward, attention_forward_jvp
from fewstep.kernels.attention_reference import attention_jvp_reference, attention_reference
from fewstep.kernels.mask import AttentionMask
from fewstep.kernels.mask_conversion import dense
from fewstep.kernels.tuning.table import TileConfig

FLOORS = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 1.5e-3}
CEILINGS = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 5e-3}
# Visibility and the activity of keys change every 16 tokens, the activity of queries every 32: with the tiles of the
# interpreter, whole tiles of either side are inactive.
BLOCK = 16
QUERY_BLOCK = 32


@dataclass(frozen=True)
class Case:
    """One call. `mask` names an entry of MASKS; `tangents` holds the letters of q, k, v that have one."""

    mask: str
    dtype: torch.dtype = torch.float32
    heads: int = 1
    key_heads: int = 1
    width: int = 16
    value_width: int = 16
    tangents: str = "qkv"
    layout: str = "contiguous"
    batch: int = 1
    config: TileConfig | None = None
    size: int = 1
    magnitude: float = 1.0

    @property
    def name(self) -> str:
        """Unique among the cases."""
        heads = f"{self.heads}over{self.key_heads}x{self.width}and{self.value_width}"
        tiles = "" if self.config is None else f"-{self.config.query_tile}by{self.config.key_tile}"
        tiles += "-early" if self.config is not None and self.config.early else ""
        dtype = str(self.dtype).removeprefix("torch.")
        tangents = self.tangents or "none"
        return f"{self.mask}-{dtype}-{heads}-t{tangents}-{self.layout}-{self.size}-{self.magnitude:g}{tiles}"


def blocks_of_keys(tokens: int, *, keep: int) -> AttentionMask:
    """A mask with full, partial and empty tiles in an irregular order, and rows that see nothing if `keep` is small."""

    def sees(i: Tensor, j: Tensor) -> Tensor:
        return (i // QUERY_BLOCK * 7 + j // BLOCK * 3 + i % 2 * (j // BLOCK % 2)) % 5 < keep

    return masks.from_predicate(sees, tokens, tokens, max_intervals=4)


def mixed(tokens: int, seed: int) -> AttentionMask:
    """Irregular tiles with random activity on both sides."""
    generator = torch.Generator().manual_seed(seed)
    sides: list[Tensor] = []
    for block in (QUERY_BLOCK, BLOCK):
        drawn = torch.rand(math.ceil(tokens / block), generator=generator) < 0.5
        sides.append(drawn.repeat_interleave(block)[:tokens])
    return blocks_of_keys(tokens, keep=3).with_activity(queries=sides[0], keys=sides[1])


def empty_rows(tokens: int) -> AttentionMask:
    """Causal documents intersected with blocks: many rows, and one whole query tile, see nothing."""
    late = masks.from_predicate(lambda i, j: (i >= 40) & (j >= 5), tokens, tokens)
    return masks.intersect(masks.causal(tokens), masks.intersect(late, blocks_of_keys(tokens, keep=2)))


def biased(mask: AttentionMask, rows: int = 1) -> AttentionMask:
    """Numbers of any sign on the keys, many of them on one, and some keys that nobody is to see."""
    bias = 2 * torch.randn(rows, mask.keys, generator=torch.Generator().manual_seed(3))
    bias[:, ::7], bias[:, -1] = -1e4, 5.5
    return mask.with_key_bias(bias)


MASKS: dict[str, Callable[[int], AttentionMask]] = {
    "one": lambda s: masks.full(1),
    "one_query": lambda s: masks.full(1, 33 * s),
    "one_key": lambda s: masks.full(33 * s, 1),
    "no_keys": lambda s: masks.full(3, 0),
    "full": lambda s: masks.full(64 * s),
    "cross": lambda s: masks.full(45 * s, 51 * s),
    "causal": lambda s: masks.causal(77 * s),
    "block_causal": lambda s: masks.block_causal([13 * s, 20 * s, 31 * s, 9 * s]),
    "window_sink": lambda s: masks.block_causal([11 * s] * 7, window=2, sink=1),
    "teacher_forcing": lambda s: masks.teacher_forcing([13 * s, 16 * s, 19 * s], clean_is_constant=True),
    "teacher_forcing_all": lambda s: masks.teacher_forcing([13 * s, 16 * s, 19 * s], window=2, sink=1),
    "documents": lambda s: masks.documents([5 * s, s, 40 * s, 20 * s]),
    "lengths": lambda s: masks.lengths(torch.tensor([0, 33 * s, 50 * s]), queries=40 * s, keys=50 * s),
    "empty_rows": lambda s: empty_rows(90),
    "mixed_1": lambda s: mixed(120, 2),
    "mixed_2": lambda s: mixed(120, 12),
    "mixed_3": lambda s: mixed(128, 26),
    "biased": lambda s: biased(masks.full(45 * s, 51 * s)),
    "biased_mixed": lambda s: biased(mixed(120, 2)),
    "biased_each": lambda s: biased(masks.full(64 * s), rows=2),
    "biased_lengths": lambda s: biased(masks.lengths(torch.tensor([50 * s, 33 * s]), queries=40 * s, keys=50 * s), 2),
}

F16, BF16 = torch.float16, torch.bfloat16
TILES = [
    TileConfig(16, 16, 4, 1),
    TileConfig(16, 32, 4, 1),
    TileConfig(64, 32, 4, 1),
    TileConfig(32, 16, 4, 1, early=True),
]
CASES = (
    *[Case(name) for name in MASKS if name not in ("lengths", "mixed_1", "biased_each", "biased_lengths")],
    *[Case(name, batch=2, heads=4, key_heads=2) for name in ("biased_each", "biased_lengths")],
    *[Case("biased_mixed", tangents=letters, dtype=BF16) for letters in ("qkv", "k", "")],
    *[Case("biased", config=tiles) for tiles in TILES],
    Case("lengths", batch=3, heads=2, key_heads=1),
    *[Case("mixed_1", tangents=letters) for letters in ("qkv", "q", "k", "v", "qk", "qv", "kv", "")],
    *[Case("mixed_2", config=tiles) for tiles in TILES],
    *[Case("cross", config=tiles) for tiles in TILES],
    *[Case("cross", tangents=letters) for letters in ("q", "kv")],
    Case("causal", heads=4, key_heads=2, width=24, value_width=40),
    Case("teacher_forcing", heads=4, key_heads=1, width=40, value_width=16),
    Case("block_causal", width=64, value_width=24),
    *[
        Case("block_causal", layout=layout, batch=2, heads=2, key_heads=2)
        for layout in ("tokens_first", "width_first", "expanded")
    ],
    *[Case(name, dtype=dtype, heads=2) for name in ("cross", "teacher_forcing", "mixed_3") for dtype in (F16, BF16)],
    Case("window_sink", dtype=BF16, width=40, value_width=64, heads=2, key_heads=1),
    # Scores up to about 1e4 either way.
    Case("causal", magnitude=45.0),
)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN until something is written to them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def laid_out(shape: tuple[int, int, int, int], layout: str, generator: torch.Generator) -> Tensor:
    """Normal numbers [B, H, N, D] with the strides that `layout` names."""
    batch, heads, tokens, width = shape
    if layout == "tokens_first":
        return torch.randn(batch, tokens, heads, width, generator=generator).transpose(1, 2)
    if layout == "width_first":
        return torch.randn(batch, heads, width, tokens, generator=generator).transpose(2, 3)
    if layout == "expanded":
        return torch.randn(1, heads, tokens, 3 * width, generator=generator)[..., width : 2 * width].expand(shape)
    return torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class Call:
    """Inputs of a case on its device."""

    primals: tuple[Tensor, Tensor, Tensor]
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None]
    cotangents: tuple[Tensor, Tensor]
    mask: AttentionMask


def build(case: Case, device: str) -> Call:
    """Draw the inputs. Tangents have another layout than primals, and are zero where the mask promises it."""
    generator = torch.Generator().manual_seed(7)
    mask = MASKS[case.mask](case.size).to(device)
    rows = (case.batch, case.heads, mask.queries)
    keys = (case.batch, case.key_heads, mask.keys)
    shapes = ((*rows, case.width), (*keys, case.width), (*keys, case.value_width))
    primals = [laid_out(shape, case.layout, generator) for shape in shapes]
    if case.magnitude != 1:
        primals = [x * case.magnitude if place < 2 else x for place, x in enumerate(primals)]
    other = "contiguous" if case.layout != "contiguous" else "tokens_first"
    tangents: list[Tensor | None] = []
    for letter, shape, active in zip("qkv", shapes, (mask.query_active, mask.key_active, mask.key_active), strict=True):
        tangent = laid_out(shape, other, generator)
        if active is not None:
            tangent = tangent * active.cpu()[:, None]
        tangents.append(tangent.to(device, case.dtype) if letter in case.tangents else None)
    q, k, v = (x.to(device, case.dtype) for x in primals)
    grad_output = laid_out((*rows, case.value_width), other, generator).to(device, case.dtype)
    grad_lse = torch.randn(rows, generator=generator).to(device)
    return Call((q, k, v), (tangents[0], tangents[1], tangents[2]), (grad_output, grad_lse), mask)


def by_kernels(call: Call, config: TileConfig | None, *, primal: bool = True) -> dict[str, Tensor]:
    """Results by the Triton kernels; with `primal`, also those of the kernel without tangents, and gradients."""
    with poisoned_memory():
        assert bool(torch.empty(3).isnan().all())
        output, lse, tangent, mean = attention_forward_jvp(*call.primals, *call.tangents, mask=call.mask, config=config)
        results = {"output": output, "lse": lse, "tangent": tangent, "mean": mean}
        if not primal:
            return results
        plain, plain_lse = attention_forward(*call.primals, mask=call.mask, config=config)
        gradients = attention_backward(*call.primals, output, lse, *call.cotangents, mask=call.mask, config=config)
    results |= {"plain": plain, "plain_lse": plain_lse}
    return results | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def by_reference(call: Call) -> dict[str, Tensor]:
    """The same in float64 by the dense specification."""
    primals = [x.detach().double().requires_grad_() for x in call.primals]
    tangents = [None if t is None else t.double() for t in call.tangents]
    with torch.no_grad():
        result = attention_jvp_reference(*primals, *tangents, mask=call.mask)
    assert result.tangent is not None
    assert result.mean is not None
    again = attention_reference(*primals, mask=call.mask)
    seen = again.lse != -math.inf
    grad_output, grad_lse = (x.double() for x in call.cotangents)
    loss = (again.output * grad_output).sum() + (again.lse[seen] * grad_lse[seen]).sum()
    gradients = torch.autograd.grad(loss, primals, allow_unused=True)
    found = {"output": result.output, "lse": result.lse, "tangent": result.tangent, "mean": result.mean}
    found |= {"plain": result.output, "plain_lse": result.lse}
    for name, gradient, primal in zip(("dq", "dk", "dv"), gradients, primals, strict=True):
        found[name] = torch.zeros_like(primal) if gradient is None else gradient
    return found


def by_formulas(call: Call) -> dict[str, Tensor]:
    """The same in the dtype of the inputs, each line of the formulas a line of PyTorch."""
    q, k, v = call.primals
    repeat = q.shape[1] // k.shape[1]
    tq, tk, tv = (torch.zeros_like(x) if t is None else t for x, t in zip(call.primals, call.tangents, strict=True))
    k, v, tk, tv = (x.repeat_interleave(repeat, 1) for x in (k, v, tk, tv))
    seen = dense(call.mask)[:, None]
    scale = q.shape[-1] ** -0.5
    scores = (q @ k.mT * scale).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    p = (scores - lse.masked_fill(lse == -math.inf, math.inf).unsqueeze(-1)).exp()
    ts = (tq @ k.mT + q @ tk.mT) * scale
    mean = (p * ts).sum(-1)
    output = p @ v
    grad_output, grad_lse = call.cotangents[0], call.cotangents[1].to(q.dtype)
    ds = p * (grad_output @ v.mT - ((grad_output * output).sum(-1) - grad_lse).unsqueeze(-1))
    dk, dv = (x.unflatten(1, (-1, repeat)).sum(2) for x in (ds.mT @ q * scale, p.mT @ grad_output))
    return {
        "output": output,
        "lse": lse,
        "tangent": p @ tv + (p * ts) @ v - mean.unsqueeze(-1) * output,
        "mean": mean,
        "plain": output,
        "plain_lse": lse,
        "dq": ds @ k * scale,
        "dk": dk,
        "dv": dv,
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the L2 norm; inf where one is finite and the other not, or |expected| is 0."""
    found, expected = found.double(), expected.double()
    finite = expected.isfinite()
    if found.shape != expected.shape or not torch.equal(found[~finite], expected[~finite]):
        return math.inf
    difference = float((found[finite] - expected[finite]).norm())
    size = float(expected[finite].norm())
    if difference == 0:
        return 0.0
    return difference / size if size > 0 and math.isfinite(difference) else math.inf


def check(case: Case, device: str) -> dict[str, tuple[float, float]]:
    """(error, allowed error) of each quantity of a case."""
    call = build(case, device)
    # Gradients do not depend on which tangents there are.
    found = by_kernels(call, case.config, primal=case.tangents == "qkv")
    expected, plain = by_reference(call), by_formulas(call)
    errors: dict[str, tuple[float, float]] = {}
    for name, value in found.items():
        baseline = relative_error(plain[name], expected[name])
        floor = FLOORS[case.dtype] + (score_rounding(call) if name in ("dq", "dk", "dv") else 0.0)
        errors[name] = (
            relative_error(value, expected[name]),
            2 * (baseline if math.isfinite(baseline) else 0.0) + floor,
        )
    return errors


def score_rounding(call: Call) -> float:
    """What a score's rounding does to its probability: one unit of fp32 in the largest, once forward, once backward.

    The backward kernels compute scores anew, in tiles of another order than those of the logsumexp; the formulas of
    `by_formulas` reuse theirs. Which sums round alike depends on the processor.
    """
    q, k, _ = (x.double() for x in call.primals)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ k.mT).abs() * q.shape[-1] ** -0.5
    return torch.finfo(torch.float32).eps * float(scores.max()) if scores.numel() > 0 else 0.0


def common_mode(device: str, tokens: int) -> float:
    """Error of a bf16 tangent when all keys share a tangent a hundred times larger than their own."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, tq, tk, tv = (torch.randn(1, 2, tokens, 64, generator=generator) for _ in range(6))
    tk = tk + 100 * torch.randn(1, 2, 1, 64, generator=generator)
    inputs = [x.to(device, BF16) for x in (q, k, v, tq, tk, tv)]
    _, _, tangent, _ = attention_forward_jvp(*inputs)
    expected = attention_jvp_reference(*(x.double() for x in inputs)).tangent
    assert expected is not None
    return relative_error(tangent, expected)


def repeated_difference(device: str) -> int:
    """Results of a case that differ in any bit between two calls."""
    call = build(Case("teacher_forcing_all", dtype=F16, heads=4, key_heads=2), device)
    first, second = by_kernels(call, None), by_kernels(call, None)
    return sum(not torch.equal(value, second[name]) for name, value in first.items())


def zero_tangent_difference(device: str) -> float:
    """Largest number in the tangents of a call whose tangents are tensors of zeros."""
    call = build(Case("mixed_2"), device)
    zeros = [torch.zeros_like(x) for x in call.primals]
    _, _, tangent, mean = attention_forward_jvp(*call.primals, *zeros, mask=call.mask)
    return max(float(tangent.abs().max()), float(mean.abs().max()))


def promised_rows(device: str) -> float:
    """Largest number in the tangent of the clean half of a teacher-forcing sequence."""
    call = build(Case("teacher_forcing"), device)
    found = by_kernels(call, None)["tangent"]
    return float(found[:, :, : call.mask.queries // 2].abs().max())


def all_cases_at(size: int) -> list[Case]:
    """The cases with sequences `size` times as long."""
    return [replace(case, size=size) for case in CASES]


def main() -> None:
    """Print the errors of all cases in the interpreter."""
    torch.set_num_threads(1)
    report = {case.name: check(case, "cpu") for case in CASES}
    numbers = {
        "common_mode": common_mode("cpu", 128),
        "repeated_difference": repeated_difference("cpu"),
        "zero_tangent_difference": zero_tangent_difference("cpu"),
        "promised_rows": promised_rows("cpu"),
    }
    print(json.dumps({"cases": report, "numbers": numbers}))


if __name__ == "__main__":
    main()
