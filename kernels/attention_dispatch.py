"""Which code computes an attention call.

| call | where | computed by |
|---|---|---|
| with tangents, or log-sum-exp, or a mask that is neither full nor causal | CUDA, fp32 / fp16 / bf16 | Triton kernels |
| the same | CPU and other devices; fp64 anywhere | tiled torch |
| without tangents, full or causal | everywhere | torch's scaled_dot_product_attention |
| without tangents, full or causal, `backend="flash"` or "xformers" | CUDA | flash-attn, xformers |

Heads wider than 256 have no Triton kernel; on CUDA such a call is refused and `backend="tiled"` computes it.
"""

from __future__ import annotations

from importlib.util import find_spec
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewstep.kernels.mask import AttentionMask

LIBRARIES = ("sdpa", "flash", "xformers")
PATHS = ("triton", "tiled")
WIDEST_HEAD = 256
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_kinds: WeakKeyDictionary[AttentionMask, str] = WeakKeyDictionary()


def choose_path(q: Tensor, v: Tensor, backend: str) -> str:
    """ "triton" or "tiled" for a call that our own kernels compute.

    Raises:
        ValueError: the backend is unknown, of another library, or cannot take this device, dtype or head.
    """
    if backend in LIBRARIES:
        raise ValueError(
            f"backend={backend!r} has no tangent, no log-sum-exp and no masks but full and causal ones; use 'auto', "
            f"{' or '.join(map(repr, PATHS))}."
        )
    if backend not in ("auto", *PATHS):
        raise ValueError(f"backend={backend!r} is unknown; choose 'auto', {', '.join(map(repr, LIBRARIES + PATHS))}.")
    on_cuda = q.device.type == "cuda"
    if backend == "triton" and not (on_cuda and q.dtype in TRITON_DTYPES):
        raise ValueError(
            f"The Triton kernels take fp32, fp16 and bf16 on CUDA, and q is {q.dtype} on {q.device}; use "
            "backend='tiled'."
        )
    if backend == "tiled" or not on_cuda or q.dtype not in TRITON_DTYPES:
        return "tiled"
    width = max(q.shape[-1], v.shape[-1])
    if width > WIDEST_HEAD:
        raise ValueError(
            f"Heads are {width} wide and the kernels for {q.device} take at most {WIDEST_HEAD}; use more, narrower "
            "heads, or backend='tiled', which is slower and takes any width."
        )
    return "triton"


def mask_kind(mask: AttentionMask | None) -> str:
    """ "full", "causal" (same length, query i sees keys 0 to i), or "other"; looked at once per mask."""
    if mask is None:
        return "full"
    if torch.compiler.is_compiling():
        return "other"  # A traced graph cannot look into a mask; our own kernels take any.
    ranges = mask.ranges
    kind = _kinds.get(ranges)
    if kind is None:
        kind = _kinds[ranges] = inspect_mask(ranges)
    return kind


def inspect_mask(mask: AttentionMask) -> str:
    """The kind of a mask from its key ranges."""
    starts, stops = mask.intervals[..., 0, 0], mask.intervals[..., 0, 1]
    lengths = (mask.intervals[..., 1] - mask.intervals[..., 0]).sum(-1)
    if bool((lengths == mask.keys).all()):
        return "full"
    row = torch.arange(1, mask.queries + 1, device=stops.device)
    is_causal = mask.queries == mask.keys and bool(((stops == row) & (starts == 0) & (lengths == row)).all())
    return "causal" if is_causal else "other"


def library_attention(
    primals: tuple[Tensor, Tensor, Tensor], mask: AttentionMask | None, scale: float, backend: str
) -> Tensor | None:
    """The output by torch, flash-attn or xformers; None where our own kernels are to compute it.

    A key bias becomes columns of q and k there.

    Raises:
        ValueError: a library is asked for by name and cannot take the mask, or is not installed.
    """
    if backend in PATHS or backend not in ("auto", *LIBRARIES):
        return None
    q, k, v = primals
    kind = mask_kind(mask)
    # A bias is divided by the scale to be a column.
    no_column = mask is not None and mask.key_bias is not None and scale == 0
    if kind == "other" or no_column or 0 in (q.shape[2], k.shape[2], q.shape[3]):
        if backend == "auto":
            return None
        raise ValueError(f"backend={backend!r} takes full and causal masks alone; use backend='auto' for this one.")
    if mask is not None and mask.key_bias is not None:
        q, k = with_bias_columns(q, k, mask.key_bias, scale)
    if backend == "flash":
        return flash_attention(q, k, v, scale, causal=kind == "causal")
    if backend == "xformers":
        return xformers_attention(q, k, v, scale, causal=kind == "causal")
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=kind == "causal", scale=scale, enable_gqa=grouped)


def with_bias_columns(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys [..., D + 1 or 2] whose scores hold a key bias [1 or B, Nk], for kernels that know of none.

    The bias becomes columns of the keys that meet ones in the queries. A dtype narrower than fp32 gets a second column
    with what rounding the first one lost. Columns are clamped to the range of the dtype: a key of bias -10000 keeps a
    weight of exactly 0.
    """
    limits = torch.finfo(k.dtype)
    wanted = (bias.detach().to(torch.promote_types(k.dtype, torch.float32)) / scale).clamp(limits.min, limits.max)
    columns = [wanted.to(k.dtype)]
    if limits.bits < 32:
        columns.append((wanted - columns[0]).to(k.dtype))
    column = torch.stack(columns, dim=-1)[:, None]
    wide_k = torch.cat([k, column.expand(*k.shape[:3], -1)], dim=-1)
    ones = q.new_ones(1).expand(*q.shape[:3], len(columns))
    return torch.cat([q, ones], dim=-1), wide_k


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Tensor:
    """The output by the flash-attn package."""
    require("flash_attn", "flash-attn", q)
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"flash-attn takes fp16 and bf16, and q is {q.dtype}; cast it, or use backend='auto'.")
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    rows = (x.transpose(1, 2) for x in (q, k, v))
    return flash_attn_func(*rows, softmax_scale=scale, causal=causal).transpose(1, 2)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Tensor:
    """The output by xformers' memory-efficient attention."""
    require("xformers", "xformers", q)
    from xformers.ops import LowerTriangularMask, memory_efficient_attention  # pyright: ignore[reportMissingImports]

    repeat = q.shape[1] // k.shape[1]
    # Expanded heads are views; xformers reads grouped heads only in a fifth dimension.
    rows = [q, *(x.unsqueeze(2).expand(-1, -1, repeat, -1, -1).flatten(1, 2) for x in (k, v))]
    bias = LowerTriangularMask() if causal else None
    output = memory_efficient_attention(*(x.transpose(1, 2) for x in rows), attn_bias=bias, scale=scale)
    return output.transpose(1, 2)


def require(module: str, package: str, q: Tensor) -> None:
    """Raise ValueError unless the package is installed and q lies on a GPU."""
    if find_spec(module) is None:
        raise ValueError(f"{package} is not installed; pip install {package}, or use backend='auto'.")
    if q.device.type != "cuda":
        raise ValueError(f"{package} runs on CUDA and q is on {q.device}; use backend='auto'.")
