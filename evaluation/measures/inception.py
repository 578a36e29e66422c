"""The Inception-v3 features of FID, KID, precision and recall, under named protocols, from a local weights file.

What a protocol fixes is how a picture becomes 299 x 299 numbers; figures of different protocols do not compare. The
weights are one file in all of them. Nothing is downloaded.

Shapes: pixels [B, 3, H, W] in [0, 1], features [B, 2048].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_fidelity.feature_extractor_inceptionv3 as inception_module
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299
# The layers of torch-fidelity's network up to its pooled features, in their order.
LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)


def _clean(bytes_: Tensor) -> Tensor:
    """clean-fid: bicubic with a filter that widens as the picture shrinks, no rounding (arXiv:2104.11222)."""
    resized = F.interpolate(bytes_, size=(SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
    return (resized.clamp(0.0, 255.0) - 128.0) / 128.0


def _tensorflow(bytes_: Tensor) -> Tensor:
    """TensorFlow 1's bilinear without half-pixel centres, as in the first FID: torch-fidelity and ADM's evaluations."""
    return (interpolate_bilinear_2d_like_tensorflow1x(bytes_, size=(SIDE, SIDE), align_corners=False) - 128.0) / 128.0


def _pytorch(bytes_: Tensor) -> Tensor:
    """pytorch-fid: torch's bilinear without a wider filter, values in [-1, 1]."""
    resized = F.interpolate(bytes_ / 255.0, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2.0 * resized - 1.0


PROTOCOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "clean": _clean,
    "torch-fidelity": _tensorflow,
    "legacy-tensorflow": _tensorflow,
    "legacy-pytorch": _pytorch,
}


class InceptionFeatures(nn.Module):
    """Pool features [B, 2048] of pixels in [0, 1], rounded to the 8 bits in which images are stored.

    Raises ValueError for an unknown protocol.
    """

    num_features = 2048
    any_size = True

    def __init__(self, network: nn.Module, *, protocol: str = "torch-fidelity", digest: str = "") -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {protocol!r}; use one of {', '.join(PROTOCOLS)}")
        super().__init__()
        self.network = network.eval()
        self.protocol, self.digest = protocol, digest
        # Two names of one arithmetic give one source, so that their files compare.
        same = "torch-fidelity" if protocol == "legacy-tensorflow" else protocol
        self.name = f"Inception v3 (FID weights), {same} protocol, 2048 features"

    @torch.no_grad()
    def resize(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] of any size as the network takes them, [B, 3, 299, 299] in [-1, 1]."""
        return PROTOCOLS[self.protocol]((pixels.float() * 255.0).round())

    @torch.no_grad()
    def forward(self, resized: Tensor) -> Tensor:
        found = resized
        for layer in LAYERS:
            found = self.network.get_submodule(layer)(found)
        return found.flatten(1)


def load_inception_features(
    path: str | Path, *, protocol: str = "torch-fidelity", sha256: str = WEIGHTS_SHA256, device: str = "cpu"
) -> InceptionFeatures:
    """Features from torch-fidelity's weights file at `path`, or from its tensors as a .safetensors file.

    The published file is a pickle, which can run code when it is opened. So its digest must be that of the published
    file; give `sha256` only for a file that you made yourself. A .safetensors file holds tensors alone and is not
    compared.

    Raises:
        ValueError: there is no such file, its digest is another one, or the protocol is unknown.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"no Inception weights at {file}; download {WEIGHTS_NAME} from the releases of torch-fidelity (v0.2.0) "
            "and give its path"
        )
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    safe = file.suffix == ".safetensors"
    if not safe and digest != sha256:
        raise ValueError(f"the SHA-256 of {file} is {digest}, expected {sha256} ({WEIGHTS_NAME}); it was not opened")
    if not safe:
        network: nn.Module = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
        return InceptionFeatures(network, protocol=protocol, digest=digest).to(device)
    network = _empty_network()
    try:
        network.load_state_dict(load_file(file), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{file} holds other tensors than those of {WEIGHTS_NAME}: {error}") from error
    return InceptionFeatures(network, protocol=protocol, digest=digest).to(device)


class _Network(FeatureExtractorInceptionV3):
    """torch-fidelity's network, which takes the empty weights of its construction for none."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=strict and bool(state_dict), assign=assign)


def _empty_network() -> nn.Module:
    # The constructor fetches weights from the network when it is given no pickle, by this name of its module.
    fetch = inception_module.load_state_dict_from_url
    inception_module.load_state_dict_from_url = lambda *_, **__: {}
    try:
        # Layers are initialised at random first; the caller's random numbers stay as they were.
        with torch.random.fork_rng(devices=[]):
            return _Network("inception-v3-compat", ["2048"])
    finally:
        inception_module.load_state_dict_from_url = fetch
