"""The small AutoencoderKLWan of the embedded video teacher.

Shapes: pixels [N, 3, 4 k + 1, 32, 32] in [0, 1], latents [N, 8, k + 1, 8, 8].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from fewstep.embedded.digits.progress import StepLog
from fewstep.embedded.moving_digits.clips import moving_digits

LATENT_CHANNELS = 8
TEMPORAL_FACTOR, SPATIAL_FACTOR = 4, 4
KL_WEIGHT = 1e-4
# Log variance at the start. With the variance of 1 that a fresh network has, the noise drowns what the latents say and
# the decoder learns to ignore them.
FIRST_LOG_VARIANCE = -6.0


def build_video_autoencoder() -> AutoencoderKLWan:
    """An untrained causal autoencoder that divides time and sides by four."""
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=TEMPORAL_FACTOR,
        scale_factor_spatial=SPATIAL_FACTOR,
    )
    bias = vae.quant_conv.bias
    assert bias is not None
    with torch.no_grad():
        bias[LATENT_CHANNELS:] = FIRST_LOG_VARIANCE
    return vae


@dataclass(frozen=True)
class AutoencoderStage:
    """One part of the training: that many steps on clips of that many pixel frames."""

    steps: int
    frames: int
    batch_size: int
    learning_rate: float


def train_video_autoencoder(vae: AutoencoderKLWan, stage: AutoencoderStage, *, seed: int, log: StepLog) -> None:
    """Fit reconstruction (L1 + MSE) with a small KL term on moving training digits.

    Step i sees the clips batch_size i ... batch_size (i + 1) - 1 of `moving_digits("train")` with that seed.
    """
    generator = torch.Generator().manual_seed(seed)
    rate, batch = stage.learning_rate, stage.batch_size
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=stage.steps, pct_start=0.1)
    vae.requires_grad_(True)
    vae.train()
    # `decode` clips to [-1, 1], and a clipped pixel has no gradient: black ones would stay black for ever. The decoder
    # is called once per latent frame, and what it gives is not clipped yet.
    chunks: list[Tensor] = []
    handle = vae.decoder.register_forward_hook(lambda *call: chunks.append(call[2]))
    for step in range(stage.steps):
        rows = range(step * batch, (step + 1) * batch)
        target = moving_digits("train", seed=seed, indices=rows, frames=stage.frames).pixels * 2.0 - 1.0
        posterior = vae.encode(target, return_dict=False)[0]
        # Reparameterised with our own generator: the run depends on its seed alone.
        latent = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        chunks.clear()
        vae.decode(latent, return_dict=False)  # pyright: ignore[reportArgumentType]
        decoded = torch.cat(chunks, dim=2)
        # diffusers' own kl() sums over the axes of a picture.
        kl = 0.5 * (posterior.mean.pow(2) + posterior.var - 1.0 - posterior.logvar).mean()
        mse = F.mse_loss(decoded, target)
        loss = F.l1_loss(decoded, target) + mse + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log.add(step, loss=loss.item(), mse=mse.item(), kl=kl.item())
    handle.remove()
    vae.requires_grad_(False).eval()


def standardise_latents(vae: AutoencoderKLWan, *, clips: int, seed: int) -> None:
    """Set latents_mean and latents_std to those of that many moving training digits, per channel."""
    raw = raw_video_latents(vae, moving_digits("train", seed=seed, indices=range(clips)).pixels)
    vae.register_to_config(
        latents_mean=raw.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=raw.std(dim=(0, 2, 3, 4)).tolist()
    )


@torch.no_grad()
def raw_video_latents(vae: AutoencoderKLWan, pixels: Tensor, batch_size: int = 32) -> Tensor:
    """Posterior means [N, 8, k + 1, 8, 8] of pixels [N, 3, 4 k + 1, 32, 32], before mean and std are applied."""
    parts = [vae.encode(part * 2.0 - 1.0, return_dict=False)[0].mean for part in pixels.split(batch_size)]
    return torch.cat(parts)


def scaled_video_latents(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Standardised latents [N, 8, k + 1, 8, 8], as the transformer sees them."""
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (raw_video_latents(vae, pixels) - mean) / std
