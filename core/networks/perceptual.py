"""How far apart samples are: squared distance of latents, or LPIPS of what they decode to (arXiv:1801.03924).

Legend: B batch; x0, target [B, C, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# (x0, target) -> [B].
Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# Features of the layers of convolutions in torchvision's VGG, as its files name them.
TRUNK = "features."
SMALLEST = 16


def squared_distance(x0: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of each sample [B], in the space of the latents."""
    return (x0 - target).square().flatten(1).mean(dim=1)


class PixelDistance:
    """LPIPS (arXiv:1801.03924) of decoded samples, with the graph through the decoder to the latents."""

    def __init__(self, lpips: nn.Module, decode: Callable[[Tensor], Tensor]) -> None:
        self.lpips, self.decode = lpips, decode

    def __call__(self, x0: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            pictures = self.decode(target).float()
        if pictures.ndim != 4 or min(pictures.shape[-2:]) < SMALLEST:
            raise ValueError(
                f"pairs.metric 'lpips' needs pictures of {SMALLEST} pixels or more, got {tuple(pictures.shape[1:])}: "
                "use 'latent'"
            )
        return self.lpips(self.decode(x0).float(), pictures, normalize=True).flatten()


def load_lpips(path: str | Path, *, mean_pooling: bool) -> nn.Module:
    """The LPIPS network on VGG-16: torchmetrics' layers on top, and the trunk from a safetensors file with the names of
    torchvision (`features.0.weight` ...), such as the hub's timm/vgg16.tv_in1k.

    `mean_pooling` takes means where VGG takes maxima, as DMD2 does (piq's `replace_pooling`).

    Raises:
        ValueError: there is no such file, or it holds another network.
    """
    # A private class of the library: the public one downloads and unpickles its trunk.
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"pairs.lpips {path} cannot be read ({error}); give VGG-16's weights as safetensors"
        ) from error
    with torch.random.fork_rng(devices=[]):
        network: Any = _NoTrainLpips(net="vgg", pnet_rand=True)
    trunk = network.net
    own = {name: f"{TRUNK}{name.partition('.')[2]}" for name in trunk.state_dict()}
    missing = sorted(set(own.values()) - stored.keys())
    if missing:
        raise ValueError(
            f"pairs.lpips {path} lacks {len(missing)} weights of VGG-16 {missing[:2]}: is it that network?"
        )
    try:
        trunk.load_state_dict({name: stored[source] for name, source in own.items()})
    except RuntimeError as error:
        raise ValueError(f"pairs.lpips {path} is no VGG-16: {error}") from error
    if mean_pooling:
        for part in trunk.children():
            for name, layer in part.named_children():
                if isinstance(layer, nn.MaxPool2d):
                    part.add_module(name, nn.AvgPool2d(layer.kernel_size, layer.stride))
    return network
