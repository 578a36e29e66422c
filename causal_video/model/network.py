"""A causal video student around an unmodified diffusers Wan transformer.

The wrapper holds no weights of its own: `transformer.save_pretrained` writes an ordinary Wan transformer, adapters are
added to `transformer` as to any other, and the stock forward stays the bidirectional network.

Legend: B batch, C channels, F latent frames, P tokens per frame, D width, L layers, H heads, d head width.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.causal_video.model.block import BlockOutput, Prompt, Sight, block_forward, layer_norm, text_keys_values
from fewstep.causal_video.model.calls import Call, CallOutput, chunk_call, packed_call, whole_call
from fewstep.causal_video.model.controls import features_of
from fewstep.causal_video.model.prefix import KeysValues, Prefix
from fewstep.causal_video.model.rope import FrameGrid, rotary_angles
from fewstep.core.paths import at_least_fp32
from fewstep.core.two_time import network_times, second_time_of
from fewstep.kernels.mask import AttentionMask

# Wan takes 1000 t.
TIME_SCALE = 1000.0


def checkpointed(
    block: WanTransformerBlock,
    layer: int,
    hidden: Tensor,
    text: Tensor | tuple[Tensor, Tensor],
    modulation: Tensor,
    sight: Sight,
) -> BlockOutput:
    """`block_forward` that keeps its inputs alone; they are immutable, so the second run equals the first."""
    output = checkpoint(block_forward, block, layer, hidden, text, modulation, sight, use_reentrant=False)
    assert isinstance(output, BlockOutput)
    return output


class CausalWan(nn.Module):
    """Velocities eps - x0 of a Wan transformer under chunk-causal attention.

    `forward` takes a `Call`, so that wrappers (DDP, FSDP) see every mode; the named methods build the call and make it.
    Velocities have the dtype of the states, fp32 at least. Gradient checkpointing follows the transformer's own switch
    (`transformer.enable_gradient_checkpointing()`): each block is then recomputed from immutable inputs.

    Args:
        transformer: Wan 2.1 or 2.2, text-to-video, or with conditioning channels (in_channels > out_channels).

    Raises:
        ValueError: another network, patches over time, or keys of image tokens in cross-attention.
    """

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        if not isinstance(transformer, WanTransformer3DModel):
            raise ValueError(f"CausalWan wraps a WanTransformer3DModel, got {type(transformer).__name__}")
        if transformer.config["patch_size"][0] != 1:
            raise ValueError(f"patches must not reach over frames, got patch_size={transformer.config['patch_size']}")
        if transformer.config["image_dim"] is not None or transformer.config["added_kv_proj_dim"] is not None:
            raise ValueError(
                "networks that attend to image tokens are not supported: use one that takes the image as a latent "
                "frame or as conditioning channels (added_kv_proj_dim=None, image_dim=None)"
            )
        self.transformer = transformer

    @property
    def dtype(self) -> torch.dtype:
        """The dtype blocks compute in; norms and time embeddings may be wider."""
        return self.transformer.patch_embedding.weight.dtype

    @property
    def blocks(self) -> list[WanTransformerBlock]:
        """The transformer's blocks."""
        return cast(list[WanTransformerBlock], list(self.transformer.blocks))

    @property
    def layers(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def extra_channels(self) -> int:
        """Conditioning channels the network takes beside the latents, or numbers of each frame in its layers."""
        features = features_of(self.transformer)
        if features is not None:
            return features.channels
        return self.transformer.config["in_channels"] - self.transformer.config["out_channels"]

    @property
    def second_time(self) -> Literal["none", "gate", "sum"]:
        """How it is told where a step ends, see `core.two_time`."""
        layers = second_time_of(self.transformer)
        return "none" if layers is None else "sum" if layers.kind == "sum" else "gate"

    @property
    def has_two_times(self) -> bool:
        """Whether it is told where a step ends, too, and gives average velocities (`core.two_time`)."""
        return second_time_of(self.transformer) is not None

    def frame_grid(self, x: Tensor) -> FrameGrid:
        """Patches of one frame of x [B, C, F, h, w].

        Raises:
            ValueError: h or w is no multiple of the patch.
        """
        _, high, wide = self.transformer.config["patch_size"]
        if x.shape[3] % high or x.shape[4] % wide:
            raise ValueError(f"frames of {x.shape[3]} x {x.shape[4]} do not divide into patches of {high} x {wide}")
        return FrameGrid(x.shape[3] // high, x.shape[4] // wide)

    def tokens_per_frame(self, x: Tensor) -> int:
        """P for x [B, C, F, h, w]."""
        return self.frame_grid(x).tokens

    def bidirectional(self, x: Tensor, t: Tensor, text: Tensor | Prompt, *, extra: Tensor | None = None) -> Tensor:
        """Velocity [B, C, F, h, w] when every frame sees every frame; see `whole_call`."""
        return self(whole_call(x, t, text, extra=extra)).velocity

    def causal(
        self, x: Tensor, t: Tensor, text: Tensor | Prompt, *, mask: AttentionMask, extra: Tensor | None = None
    ) -> Tensor:
        """Velocity [B, C, F, h, w] under `masks.block_causal`; with a time per chunk this is diffusion forcing."""
        return self(whole_call(x, t, text, mask=mask, extra=extra)).velocity

    def packed(
        self,
        clean: Tensor,
        noisy: Tensor,
        t: Tensor,
        text: Tensor | Prompt,
        *,
        mask: AttentionMask,
        clean_time: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B, C, F, h, w] of the noisy half under teacher forcing; see `packed_call`."""
        return self(packed_call(clean, noisy, t, text, mask=mask, clean_time=clean_time, extra=extra)).velocity

    def readonly(
        self, x: Tensor, t: Tensor, text: Tensor | Prompt, prefix: Prefix, *, extra: Tensor | None = None
    ) -> Tensor:
        """Velocity [B, C, n, h, w] of a chunk that sees itself and the prefix; nothing is stored."""
        return self(chunk_call(x, t, text, prefix, extra=extra)).velocity

    def append(
        self, x: Tensor, t: Tensor, text: Tensor | Prompt, prefix: Prefix, *, extra: Tensor | None = None
    ) -> CallOutput:
        """`readonly`, with the chunk's keys and values for `RollingCache.commit`."""
        return self(chunk_call(x, t, text, prefix, extra=extra, collect=True))

    @torch.no_grad()
    def prompt(self, tokens: Tensor) -> Prompt:
        """Text embeddings [B, N, width] with their keys and values for the weights as they are now."""
        embedded = self._embed_text(tokens)
        pairs = [text_keys_values(block.attn2, embedded) for block in self.blocks]
        return Prompt(tokens, tuple(key for key, _ in pairs), tuple(value for _, value in pairs))

    def forward(self, call: Call) -> CallOutput:
        """Make one call.

        Raises:
            ValueError: the channels are not the network's, frames do not divide into patches, or the mask is of another
                number of tokens.
        """
        self._check_channels(call.x)
        grid = self.frame_grid(call.x)
        dtype = self.dtype
        features = features_of(self.transformer)
        latent = call.x.shape[1] if features is None else self.transformer.config["in_channels"]
        # Frame-major tokens: a chunk is a range of them.
        hidden = self.transformer.patch_embedding(call.x[:, :latent].to(dtype)).flatten(2).transpose(1, 2)
        told = call.x[:, latent:, :, 0, 0].transpose(1, 2)
        time, modulation = self._embed_time(call.t, call.r)
        sight = self._sight(call, grid)
        texts = self._texts(call.text)
        recompute = self.transformer.gradient_checkpointing and torch.is_grad_enabled()
        stored: list[tuple[Tensor, Tensor]] = []
        for layer, block in enumerate(self.blocks):
            if features is not None:
                hidden = hidden + features.added(layer, told, grid.tokens).to(dtype)
            arguments = (block, layer, hidden, texts[layer], modulation, sight)
            output = checkpointed(*arguments) if recompute else block_forward(*arguments)
            hidden = output.hidden
            if call.collect:
                stored.append((output.keys.detach(), output.values.detach()))
        velocity = self._velocity(hidden, time, grid, call.skip)
        keys_values = None
        if call.collect:
            keys, values = zip(*stored, strict=True)
            keys_values = KeysValues(torch.stack(keys), torch.stack(values))
        return CallOutput(velocity.to(torch.promote_types(call.x.dtype, torch.float32)), keys_values)

    def _check_channels(self, x: Tensor) -> None:
        latent = self.transformer.config["out_channels"]
        if x.shape[1] != latent + self.extra_channels:
            raise ValueError(
                f"the network takes {latent + self.extra_channels} channels, {latent} of latents and "
                f"{self.extra_channels} of conditioning (`extra`), got {x.shape[1]} in all"
            )

    def _sight(self, call: Call, grid: FrameGrid) -> Sight:
        rope = self.transformer.rope
        before = () if call.prefix is None else call.prefix.positions
        cosines, sines = rotary_angles(
            (*before, *call.positions),
            grid,
            (rope.t_dim, rope.h_dim, rope.w_dim),
            device=call.x.device,
            dtype=torch.promote_types(self.dtype, torch.float32),
        )
        return Sight(cosines, sines, None if call.mask is None else call.mask.to(call.x.device), call.prefix)

    def _texts(self, text: Tensor | Prompt) -> list[Tensor | tuple[Tensor, Tensor]]:
        """What each layer attends to: stored keys and values, or embedded tokens where gradients may flow."""
        if isinstance(text, Prompt) and not torch.is_grad_enabled():
            return list(zip(text.keys, text.values, strict=True))
        embedded = self._embed_text(text.tokens if isinstance(text, Prompt) else text)
        return [embedded] * self.layers

    def _embed_text(self, tokens: Tensor) -> Tensor:
        return self.transformer.condition_embedder.text_embedder(tokens.to(self.dtype))

    def _embed_time(self, t: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embedding [B, F, D] and modulation [B, F, 6, D] of times [B, F]; both times of a network that has two."""
        embedder, two = self.transformer.condition_embedder, second_time_of(self.transformer)
        times = network_times(self.transformer, t, r)
        angles = embedder.timesteps_proj((TIME_SCALE * times).flatten()).unflatten(0, tuple(times.shape))
        layers = embedder.time_embedder if two is None else two.first
        wide = layers.get_submodule("linear_1").weight.dtype
        time = embedder.time_embedder(angles.to(wide)).to(self.dtype)
        return time, embedder.time_proj(embedder.act_fn(time)).unflatten(-1, (6, -1))

    def _velocity(self, hidden: Tensor, time: Tensor, grid: FrameGrid, skip: int) -> Tensor:
        """Output head on tokens [B, F P, D]: [B, C, F - skip, h, w]."""
        transformer = self.transformer
        hidden = hidden.unflatten(1, (time.shape[1], grid.tokens))[:, skip:]
        table = at_least_fp32(transformer.scale_shift_table)[None] + at_least_fp32(time[:, skip:])[:, :, None]
        shift, scale = table.chunk(2, dim=2)
        hidden = (layer_norm(transformer.norm_out, hidden) * (1 + scale) + shift).to(hidden.dtype)
        _, high, wide = transformer.config["patch_size"]
        pattern = "b f (rows columns) (high wide c) -> b c f (rows high) (columns wide)"
        return rearrange(transformer.proj_out(hidden), pattern, rows=grid.height, high=high, wide=wide)
