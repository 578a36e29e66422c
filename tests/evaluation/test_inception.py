"""Inception features come from a local file whose digest is known, or not at all."""

import hashlib

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as torch_fidelity_inception

from fewstep.evaluation.fid import extract_features
from fewstep.evaluation.inception import load_inception_features


class UntrainedInception(torch_fidelity_inception.FeatureExtractorInceptionV3):
    """torch-fidelity's network as it is before weights are loaded."""

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict(state_dict, strict=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(path, digest) of a weights file in torch-fidelity's format with random numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_fidelity_inception, "load_state_dict_from_url", lambda url, progress: {})
        network = UntrainedInception("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_features_of_a_local_file(weights) -> None:
    extractor = load_inception_features(weights[0], sha256=weights[1])
    pixels = (torch.rand(1, 3, 32, 32) * 255.0).round() / 255.0
    # Images are stored with 8 bits, so less than half a level changes nothing.
    nudged = (pixels + 0.001).clamp(0.0, 1.0)
    features = extract_features(extractor, torch.cat([pixels, nudged, pixels.flip(3)]))
    assert features.shape == (3, 2048)
    assert features.dtype == torch.float64
    assert (features[0] - features[1]).abs().max() < 1e-5 * features.abs().max()
    assert (features[0] - features[2]).abs().max() > 1e-5 * features.abs().max()


def test_other_files_are_not_opened(weights, tmp_path) -> None:
    with pytest.raises(ValueError, match="no Inception weights at"):
        load_inception_features(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match=r"expected 6726825d.*was not opened"):
        load_inception_features(weights[0])
