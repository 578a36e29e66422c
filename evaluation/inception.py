"""The Inception-v3 features of FID and KID, from a weights file on this machine. Nothing is downloaded.

Shapes: pixels [B, 3, H, W] in [0, 1], features [B, 2048].
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class InceptionFeatures(nn.Module):
    """Pool features [B, 2048] of pixels [B, 3, H, W] in [0, 1], rounded to the 8 bits in which images are stored."""

    num_features = 2048
    name = "Inception v3 (FID weights), 2048 features"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self.network((pixels * 255.0).round().to(torch.uint8)).double()


def load_inception_features(path: str | Path, *, sha256: str = WEIGHTS_SHA256) -> InceptionFeatures:
    """Features from torch-fidelity's weights file at `path`.

    torch-fidelity unpickles this file, which runs whatever code it holds. So its digest must be that of the published
    file; give `sha256` only for a file that you made yourself.

    Raises:
        ValueError: there is no such file, or its digest is another one.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"no Inception weights at {file}; download {WEIGHTS_NAME} from the releases of torch-fidelity (v0.2.0) "
            "and give its path"
        )
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(f"the SHA-256 of {file} is {digest}, expected {sha256} ({WEIGHTS_NAME}); it was not opened")
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))
    return InceptionFeatures(network)
