"""The small AutoencoderKL of the embedded teacher: pixels [N, 3, 32, 32] to latents [N, 4, 8, 8]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from fewstep.embedded.digits.progress import StepLog


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder with three resolutions (32, 16, 8) and about 0.3 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        # diffusers annotates tuples of one entry and takes any number.
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        block_out_channels=(16, 32, 32),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_autoencoder(vae: AutoencoderKL, pixels: Tensor, *, steps: int, seed: int, log: StepLog) -> None:
    """Fit reconstruction (L1 + MSE) with a small KL term on pixels [N, 3, 32, 32] in [0, 1]; sets scaling and shift.

    Latents are then standardised: `(z - shift) * scaling` has mean 0 and standard deviation 1 over the training data.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    vae.train()
    for step in range(steps):
        rows = torch.randint(len(pixels), (32,), generator=generator)
        target = pixels[rows] * 2.0 - 1.0
        posterior = vae.encode(target, return_dict=False)[0]
        # Reparameterised with our own generator: the run depends on its seed alone.
        latent = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(latent, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
        kl = posterior.kl().mean() / latent[0].numel()
        loss = F.l1_loss(decoded, target) + F.mse_loss(decoded, target) + 1e-3 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        log.add(step, loss=loss.item(), kl=kl.item())
    vae.requires_grad_(False).eval()
    latents = raw_latents(vae, pixels)
    vae.register_to_config(scaling_factor=1.0 / latents.std().item(), shift_factor=latents.mean().item())


@torch.no_grad()
def raw_latents(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 256) -> Tensor:
    """Posterior means [N, 4, 8, 8] of pixels in [0, 1], before scaling and shift."""
    parts = [vae.encode(part * 2.0 - 1.0, return_dict=False)[0].mean for part in pixels.split(batch_size)]
    return torch.cat(parts)


@torch.no_grad()
def scaled_latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Standardised latents [N, 4, 8, 8], as the transformer sees them."""
    return (raw_latents(vae, pixels) - vae.config["shift_factor"]) * vae.config["scaling_factor"]
