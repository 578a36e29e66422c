"""What launches of the Triton attention kernels share: what is supported, how a mask is read, keys of tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor

from fewstep.kernels.attention_checks import check_mask
from fewstep.kernels.mask import AttentionMask, unmasked
from fewstep.kernels.mask_schedule import TileSchedule
from fewstep.kernels.tuning.choice_triton import TuneKey, interpreting, size_class
from fewstep.kernels.tuning.table import Kind, TileConfig

LOG2_E = 1.0 / math.log(2.0)
WIDEST_HEAD = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Tiles at which a mask is looked at for its key; nearly every list of candidates holds this size.
SEEN_AT = TileConfig(64, 64, 4, 1)
# Lengths change from call to call; these must not make Triton compile again.
LENGTHS = ["heads", "group", "queries", "keys", "query_tiles", "key_tiles", "mask_step", "listed", "bias_step"]


# Roles of query tiles under a mask that promises zero tangents: all tiles where it promises none; those whose output
# has no tangent; those whose queries have one; and those where the tangents of keys and values alone count.
PLAIN, CONSTANT, ACTIVE, KEYS = 0, 1, 2, 3


@dataclass(frozen=True, eq=False)
class MaskSwitches:
    """What a kernel is compiled and launched for.

    Attributes:
        masked: some tile needs bounds.
        activity: the mask promises zero tangents.
        lists: int32, query tiles of each role by decreasing work; b nq + tile for a mask per sample. All of them are
            PLAIN's, and each is one of the others'.
    """

    masked: bool
    activity: bool
    lists: dict[int, Tensor]


_switches: WeakKeyDictionary[AttentionMask, dict[tuple[int, int], MaskSwitches]] = WeakKeyDictionary()


def switches_of(mask: AttentionMask, config: TileConfig) -> MaskSwitches:
    """The switches for a mask, read once per tile size: counts of tiles live on the GPU."""
    mask = mask.ranges
    known = _switches.setdefault(mask, {})
    tiles = (config.query_tile, config.key_tile)
    if tiles not in known:
        schedule = mask.schedule(*tiles)
        cut = mask.queries % config.query_tile != 0 or mask.keys % config.key_tile != 0
        promises = mask.query_active is not None or mask.key_active is not None
        known[tiles] = MaskSwitches(cut or schedule.partial > 0, promises, lists_of(schedule, promises))
    return known[tiles]


def lists_of(schedule: TileSchedule, promises: bool) -> dict[int, Tensor]:
    """The tiles of each role; waits for the device where there are several."""
    masks, tiles = schedule.row_order.shape
    order = schedule.row_order + tiles * torch.arange(masks, device=schedule.row_order.device)[:, None].int()
    lists = {PLAIN: order.flatten()}
    if promises:
        entry = lists[PLAIN].long()
        row = schedule.row_active.flatten()[entry]
        query = schedule.query_active[entry % tiles]
        roles = {CONSTANT: ~row, ACTIVE: query, KEYS: row & ~query}
        lists |= {role: lists[PLAIN][chosen] for role, chosen in roles.items()}
    return lists


def prepare_mask(mask: AttentionMask | None, q: Tensor, k: Tensor) -> AttentionMask:
    """The mask of a call, checked.

    Raises:
        ValueError: the mask is for other lengths, another batch, or lies on another device.
    """
    if mask is None:
        return unmasked(q.shape[2], k.shape[2], q.device)
    check_mask(mask, q, k)
    if mask.intervals.device != q.device:
        raise ValueError(f"The mask is on {mask.intervals.device} and q on {q.device}; pass mask.to(q.device).")
    return mask


def check_supported(q: Tensor, v: Tensor) -> None:
    """Raise ValueError for a device, dtype or head that has no Triton kernel."""
    if q.dtype not in DTYPES:
        raise ValueError(f"The Triton kernels take fp32, fp16 and bf16, and q is {q.dtype}; use backend='tiled'.")
    if max(q.shape[-1], v.shape[-1]) > WIDEST_HEAD:
        raise ValueError(
            f"Heads are {q.shape[-1]} (q, k) and {v.shape[-1]} (v) wide and the Triton kernels take at most "
            f"{WIDEST_HEAD}; use more, narrower heads, or backend='tiled'."
        )
    if q.device.type != "cuda" and not interpreting():
        raise ValueError(f"The Triton kernels run on CUDA and q is on {q.device}; use backend='tiled'.")


def with_unit_stride(x: Tensor) -> Tensor:
    """The tensor, copied unless its rows are contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def padded(width: int) -> int:
    """The power of two that holds a row; matrix units take 16 at least."""
    return max(16, triton.next_power_of_2(width))


def capability_of(q: Tensor) -> tuple[int, int]:
    """CUDA compute capability; (0, 0) in the interpreter."""
    return (0, 0) if interpreting() else torch.cuda.get_device_capability(q.device)


def upcast(dtype: torch.dtype) -> bool:
    """Whether operands of matrix products are converted to fp32, see `dot`."""
    return interpreting() and dtype == torch.bfloat16


def scale_of(q: Tensor, scale: float | None) -> float:
    """1 / sqrt(D) unless given."""
    if scale is not None:
        return float(scale)
    return q.shape[-1] ** -0.5 if q.shape[-1] else 1.0


def bias_of(mask: AttentionMask, stand_in: Tensor) -> tuple[Tensor, int, bool]:
    """(numbers in units of log 2, what leads from sample to sample, whether there are any) of a mask's key bias.

    Without one a stand-in is handed, which is not read.
    """
    if mask.key_bias is None:
        return stand_in, 0, False
    bias = mask.key_bias.float() * LOG2_E
    return bias, mask.keys if bias.shape[0] > 1 else 0, True


def strides_of(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, heads and tokens; zeros for a tensor that is not there."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def tune_key(kind: Kind, q: Tensor, v: Tensor, mask: AttentionMask, flags: tuple[bool, ...]) -> TuneKey:
    """The key of a call: `flags`, what the mask asks for, and how long it is."""
    switches = switches_of(mask, SEEN_AT)
    size = size_class(mask.queries), size_class(mask.keys)
    # Calls without a bias keep the keys that they had.
    asked = (*flags, switches.masked, switches.activity, *([] if mask.key_bias is None else [True]))
    return TuneKey(kind, capability_of(q), q.shape[-1], v.shape[-1], q.dtype, asked, size)
