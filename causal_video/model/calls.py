"""The ways a causal video network is called, each as one value; `CausalWan.forward` takes any of them.

Legend: B batch, C channels, F latent frames, h x w latent pixels, N text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.causal_video.model.block import Prompt
from fewstep.causal_video.model.prefix import KeysValues, Prefix
from fewstep.kernels.mask import AttentionMask


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the network.

    Attributes:
        x: [B, C, F, h, w] states, conditioning channels appended.
        t: [B, F] rectified-flow times in [0, 1].
        text: embeddings [B, N, width], or a `Prompt`.
        positions: temporal position of each of the F frames.
        mask: among the tokens of these frames; None sees all.
        prefix: what is seen beside them.
        skip: frames at the start whose velocity is not wanted.
        collect: whether to return keys and values.
        r: [B, F] times down to which a network of two times averages its velocity; None is t.

    Raises:
        ValueError: shapes do not fit together, or t is narrower than fp32, which cannot tell 1000 times apart.
    """

    x: Tensor
    t: Tensor
    text: Tensor | Prompt
    positions: tuple[int, ...]
    mask: AttentionMask | None = None
    prefix: Prefix | None = None
    skip: int = 0
    collect: bool = False
    r: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 5:
            raise ValueError(f"video latents must be [B, C, F, h, w], got {list(self.x.shape)}")
        batch, _, frames = self.x.shape[:3]
        if tuple(self.t.shape) != (batch, frames):
            raise ValueError(
                f"t must be one time per frame, [{batch}, {frames}], got {list(self.t.shape)}: use per_frame(t, frames)"
            )
        if self.t.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"t is {self.t.dtype}, which rounds times to a few hundred values: give fp32 or fp64")
        if len(self.positions) != frames:
            raise ValueError(f"{frames} frames need as many positions, got {len(self.positions)}")


@dataclass(frozen=True, eq=False)
class CallOutput:
    """Velocity [B, C, F - skip, h, w], and keys and values of the call (without graph) if they were collected."""

    velocity: Tensor
    keys_values: KeysValues | None


def per_frame(t: Tensor, frames: int) -> Tensor:
    """A time per sample [B] as a time per frame [B, F]; what is per frame already is returned as it is.

    Raises:
        ValueError: neither shape.
    """
    if t.ndim == 1:
        return t[:, None].expand(-1, frames)
    if t.ndim != 2 or t.shape[1] != frames:
        raise ValueError(f"t must be [B] or [B, {frames}], got {list(t.shape)}")
    return t


def joined(x: Tensor, extra: Tensor | None) -> Tensor:
    """States and conditioning channels [B, Ce, F, h, w], in this order, as one input.

    Raises:
        ValueError: the conditioning has other frames or another size.
    """
    if extra is None:
        return x
    if extra.ndim != 5 or extra.shape[2:] != x.shape[2:] or extra.shape[0] != x.shape[0]:
        raise ValueError(f"conditioning {list(extra.shape)} does not lie beside latents {list(x.shape)}")
    return torch.cat([x, extra.to(x)], dim=1)


def whole_call(
    x: Tensor,
    t: Tensor,
    text: Tensor | Prompt,
    *,
    mask: AttentionMask | None = None,
    extra: Tensor | None = None,
    r: Tensor | None = None,
) -> Call:
    """All frames at once: bidirectional without a mask, block-causal or diffusion forcing with one.

    Args:
        x: [B, C, F, h, w].
        t: [B], or [B, F] with a time per frame (the same inside a chunk).
        text: embeddings or a `Prompt`.
        mask: `masks.block_causal`, or None.
        extra: conditioning channels [B, Ce, F, h, w].
        r: [B] or [B, F], of a network of two times; see `Call`.
    """
    frames = x.shape[2]
    end = None if r is None else per_frame(r, frames)
    return Call(joined(x, extra), per_frame(t, frames), text, tuple(range(frames)), mask, r=end)


def packed_call(
    clean: Tensor,
    noisy: Tensor,
    t: Tensor,
    text: Tensor | Prompt,
    *,
    mask: AttentionMask,
    clean_time: Tensor | None = None,
    extra: Tensor | None = None,
    r: Tensor | None = None,
) -> Call:
    """Teacher forcing: clean and noisy video as one sequence; the velocity is that of the noisy half.

    Args:
        clean: [B, C, F, h, w] context.
        noisy: [B, C, F, h, w] at t.
        t: [B] or [B, F].
        text: embeddings or a `Prompt`.
        mask: `masks.teacher_forcing` of the same layout.
        clean_time: [B] or [B, F] of the context, where it is noised; None is 0.
        extra: conditioning channels [B, Ce, F, h, w], the same for both halves.
        r: [B] or [B, F] of the noisy half of a network of two times; the context has its own time for both.

    Raises:
        ValueError: the halves differ in shape.
    """
    if clean.shape != noisy.shape:
        raise ValueError(f"clean {list(clean.shape)} and noisy {list(noisy.shape)} must be of one shape")
    frames = noisy.shape[2]
    t = per_frame(t, frames)
    context_time = torch.zeros_like(t) if clean_time is None else per_frame(clean_time, frames).to(t)
    x = torch.cat([joined(clean, extra), joined(noisy, extra)], dim=2)
    both = tuple(range(frames)) * 2
    end = None if r is None else torch.cat([context_time, per_frame(r, frames)], dim=1)
    return Call(x, torch.cat([context_time, t], dim=1), text, both, mask, skip=frames, r=end)


def chunk_call(
    x: Tensor,
    t: Tensor,
    text: Tensor | Prompt,
    prefix: Prefix,
    *,
    extra: Tensor | None = None,
    collect: bool = False,
    r: Tensor | None = None,
) -> Call:
    """One chunk that sees itself and a prefix; no mask is needed.

    Args:
        x: [B, C, n, h, w].
        t: [B] or [B, n].
        text: embeddings or a `Prompt`.
        prefix: of `RollingCache.read`.
        extra: conditioning channels [B, Ce, n, h, w].
        collect: whether to return keys and values.
        r: [B] or [B, n], of a network of two times; see `Call`.
    """
    frames = x.shape[2]
    end = None if r is None else per_frame(r, frames)
    places = prefix.query_positions
    return Call(joined(x, extra), per_frame(t, frames), text, places, prefix=prefix, collect=collect, r=end)


def condition_first_frame(x: Tensor, t: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor]:
    """A first frame that is given: its state is the image latent and its time is 0.

    Since x0 = x - t v, its prediction is then the image, and its velocity has no influence.

    Args:
        x: [B, C, F, h, w], with the first frame of the video.
        t: [B] or [B, F].
        image: [B, C, 1, h, w], or None for no change.

    Raises:
        ValueError: the image is no single latent frame of that size.
    """
    t = per_frame(t, x.shape[2])
    if image is None:
        return x, t
    if image.shape != x[:, :, :1].shape:
        raise ValueError(f"an image latent must be {list(x[:, :, :1].shape)}, got {list(image.shape)}")
    return (
        torch.cat([image.to(x), x[:, :, 1:]], dim=2),
        torch.cat([torch.zeros_like(t[:, :1]), t[:, 1:]], dim=1),
    )
