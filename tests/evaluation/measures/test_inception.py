"""Inception features come from a local file whose digest is known; each named protocol is that of its package."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_fid.inception as pytorch_inception
import torch
import torch_fidelity.feature_extractor_inceptionv3 as torch_fidelity_inception
from cleanfid.utils import ResizeDataset
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core.media.pictures import find_pictures
from fewstep.evaluation.measures.features import extract_features, picture_features
from fewstep.evaluation.measures.inception import LAYERS, load_inception_features

Weights = tuple[Path, str, dict[str, Tensor]]


class UntrainedInception(torch_fidelity_inception.FeatureExtractorInceptionV3):
    """torch-fidelity's network as it is before weights are loaded."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """(path, digest, tensors) of a weights file in torch-fidelity's format with random numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_fidelity_inception, "load_state_dict_from_url", lambda url, progress: {})
        network = UntrainedInception("inception-v3-compat", ["2048"])
    # As it is, each layer shrinks what comes in, and the last ones see noise.
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(0.3)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest(), dict(network.state_dict())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures larger and smaller than 299 pixels, not square, with edges that resizing treats in its own way."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate(((320, 411), (64, 48), (299, 299))):
        blocks = generator.integers(0, 256, size=(height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        large = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
        large.save(folder / f"{number}.png")
    return find_pictures(folder)


@pytest.fixture(scope="module")
def theirs(weights: Weights, pictures: list[Path]) -> Iterator[dict[str, Tensor]]:
    """What the packages make of these pictures with these weights."""
    tensors = weights[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_fidelity_inception, "load_state_dict_from_url", lambda url, progress: tensors)
        patch.setattr(pytorch_inception, "load_state_dict_from_url", lambda url, progress: tensors)
        fidelity = torch_fidelity_inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        classic = pytorch_inception.InceptionV3([3]).eval()
    bytes_ = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] for path in pictures]
    with torch.no_grad():
        clean = []
        for resized in ResizeDataset(pictures, mode="clean"):
            found = (resized[None] - 128.0) / 128.0
            for layer in LAYERS:
                found = fidelity.get_submodule(layer)(found)
            clean.append(found.flatten(1))
        yield {
            "clean": torch.cat(clean),
            "torch-fidelity": torch.cat([fidelity(one)[0] for one in bytes_]),
            "legacy-pytorch": torch.cat([classic(one.float() / 255.0)[0].flatten(1) for one in bytes_]),
        }


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["clean", "torch-fidelity", "legacy-tensorflow", "legacy-pytorch"])
def test_each_protocol_is_that_of_its_package(
    protocol: str, weights: Weights, pictures: list[Path], theirs: dict[str, Tensor]
) -> None:
    extractor = load_inception_features(weights[0], sha256=weights[1], protocol=protocol)
    own = picture_features(extractor, pictures)
    expected = theirs["torch-fidelity" if protocol == "legacy-tensorflow" else protocol]
    scale = expected.abs().mean()
    assert (own - expected).abs().max() < 1e-3 * scale
    # The protocols are not one another, so a test that confused them would fail.
    others = [features for name, features in theirs.items() if not torch.equal(features, expected)]
    assert min((own - other).abs().max() for other in others) > 5e-3 * scale


def test_features_of_a_local_file(weights: Weights, tmp_path: Path) -> None:
    extractor = load_inception_features(weights[0], sha256=weights[1])
    pixels = (torch.rand(1, 3, 32, 32) * 255.0).round() / 255.0
    # Images are stored with 8 bits, so less than half a level changes nothing.
    nudged = (pixels + 0.001).clamp(0.0, 1.0)
    features = extract_features(extractor, torch.cat([pixels, nudged, pixels.flip(3)]))
    assert features.shape == (3, 2048)
    assert (features[0] - features[1]).abs().max() < 1e-5 * features.abs().max()
    assert (features[0] - features[2]).abs().max() > 1e-5 * features.abs().max()
    save_file({name: tensor.clone() for name, tensor in weights[2].items()}, tmp_path / "weights.safetensors")
    state = torch.get_rng_state()
    safe = load_inception_features(tmp_path / "weights.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(extract_features(safe, pixels), features[:1])


def test_other_files_are_not_opened(weights: Weights, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Inception weights at"):
        load_inception_features(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="it was not opened"):
        load_inception_features(weights[0])
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds other tensors than those of"):
        load_inception_features(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="protocol is 'mine'; use one of clean, torch-fidelity"):
        load_inception_features(weights[0], sha256=weights[1], protocol="mine")
