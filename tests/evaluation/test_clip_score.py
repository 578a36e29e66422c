"""CLIP scores from local weights of a tiny random model."""

import copy
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fewstep.evaluation.clip_score import load_clip_scorer

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in open_clip's layout."""
    place = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        # Chosen so that cosines of both signs occur.
        torch.manual_seed(7)
        model = open_clip.CLIP(**copy.deepcopy(MODEL))
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}))
    save_file(model.state_dict(), place / "open_clip_model.safetensors")
    return place


def test_score_is_the_scaled_cosine(folder) -> None:
    scorer = load_clip_scorer(folder)
    pixels, prompts = torch.rand(3, 3, 32, 32), ["a cat", "two dogs", "the digit one"]
    scores = scorer(pixels, prompts)
    mean, std = (torch.tensor(PREPROCESS[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    images = scorer.model.encode_image((pixels - mean) / std)
    texts = scorer.model.encode_text(open_clip.tokenize(prompts))
    expected = 100.0 * F.cosine_similarity(images, texts).clamp(min=0.0)
    assert scores.shape == (3,)
    assert (scores - expected).abs().max() < 1e-3
    assert expected.max() > 1.0
    assert expected.min() == 0.0


def test_other_sizes_are_resized_and_gradients_reach_the_pixels(folder) -> None:
    scorer = load_clip_scorer(folder)
    pixels = torch.rand(2, 3, 48, 40, requires_grad=True)
    scores = scorer(pixels, ["a", "b"])
    (gradient,) = torch.autograd.grad(scorer.model.encode_image(pixels[:, :, :32, :32]).sum() + scores.sum(), pixels)
    assert scores.shape == (2,)
    assert gradient.abs().sum() > 0.0
    assert all(not parameter.requires_grad for parameter in scorer.model.parameters())


def test_missing_or_unsafe_weights_are_errors(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="no CLIP weights at"):
        load_clip_scorer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold open_clip_config\.json"):
        load_clip_scorer(tmp_path)
    pickled = tmp_path / "weights.pt"
    pickled.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights\.pt is not a \.safetensors file"):
        load_clip_scorer(pickled, model="ViT-B-32")
    with pytest.raises(ValueError, match="model is 'nothing'"):
        load_clip_scorer(folder / "open_clip_model.safetensors", model="nothing")
    with pytest.raises(ValueError, match="2 prompts for 1 images"):
        load_clip_scorer(folder)(torch.rand(1, 3, 32, 32), ["a", "b"])
