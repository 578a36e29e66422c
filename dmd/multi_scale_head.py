"""A discriminator's head on videos that reads them at several scales (FastGen).

Legend: B batch, C channels, F frames, h x w tokens of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from fewstep.core.discriminator import norm_groups, uniform_conv, uniform_linear, unset_linear


class MultiScaleHead(nn.Module):
    """One feature map of a video to one logit, read at several scales (FastGen, its large multi-scale head).

    For each scale s a 1 x 1 x 1 convolution, a mean over s x s x s, a 3 x 3 x 3 convolution, and the mean over what is
    left, each convolution with a group norm and leaky ReLU (0.2); then two layers on all of them.

    The p x p latent pixels of a token have their own channels in its features, as in the network's last layer: C
    channels on (F, h, w) tokens are read as C / p^2 channels on (F, p h, p w). The last layer starts at zero, which the
    source does not do. (NVlabs/FastGen at 34f30e8, "multiscale_down_mlp_large".)

    Args:
        channels: C.
        size: (F, h, w) of the tokens.
        patch: p.
        scales: of the branches, each at most min(F, p h, p w).
        width: of the layer before the logit.
        dropout: share of its numbers that `forward` leaves out where it is given noise.
        generator: a CPU generator.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int, int],
        *,
        patch: int,
        scales: Sequence[int],
        width: int,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.size, self.patch, self.width, self.dropout = size, patch, width, dropout
        inner = channels // patch**2
        groups = norm_groups(inner)
        self.branches = nn.ModuleList()
        for scale in scales:
            layers = [uniform_conv(inner, (1, 1, 1), 1, 0, generator), nn.GroupNorm(groups, inner), nn.LeakyReLU(0.2)]
            if scale > 1:
                layers.append(nn.AvgPool3d(scale))
            layers += [uniform_conv(inner, (3, 3, 3), 1, 1, generator), nn.GroupNorm(groups, inner), nn.LeakyReLU(0.2)]
            self.branches.append(nn.Sequential(*layers))
        self.hidden = uniform_linear(len(scales) * inner, width, generator)
        self.logit = unset_linear(width, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Tensor:
        """Features [B, C, F h w] to logits [B] in the dtype of the head's weights; noise [B, width] decides dropout."""
        (frames, h, w), p = self.size, self.patch
        grid = "b (p q c) (f h w) -> b c f (h p) (w q)"
        maps = rearrange(features, grid, f=frames, h=h, w=w, p=p, q=p).to(self.logit.weight.dtype)
        means = [branch(maps).mean(dim=(2, 3, 4)) for branch in self.branches]
        hidden = functional.leaky_relu(self.hidden(torch.cat(means, dim=1)), 0.2)
        if noise is not None and self.dropout > 0:
            kept = torch.special.ndtr(noise.to(hidden.device)) >= self.dropout
            hidden = hidden * kept / (1 - self.dropout)
        return self.logit(hidden).squeeze(1)
