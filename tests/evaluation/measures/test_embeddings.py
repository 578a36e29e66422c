"""DINOv2 and CLIP from folders of tiny random models, against transformers' own calls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from fewstep.evaluation.measures.embeddings import load_clip_vision, load_dinov2
from fewstep.evaluation.measures.features import extract_features

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(Dinov2Config(**SMALL, image_size=28, patch_size=14)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(**SMALL, intermediate_size=32, projection_dim=12, image_size=28, patch_size=14)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def test_dinov2_gives_its_class_token(dinov2: Path) -> None:
    extractor = load_dinov2(dinov2)
    pixels = torch.rand(2, 3, 40, 60)
    features = extract_features(extractor, pixels)
    assert features.shape == (2, 16)
    model = Dinov2Model.from_pretrained(dinov2).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    resized = torch.nn.functional.interpolate(pixels, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = model((resized - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)).pooler_output
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    half = extract_features(load_dinov2(dinov2, dtype=torch.bfloat16), pixels)
    assert half.dtype == torch.float32
    assert (half - features).norm() < 0.03 * features.norm()


def test_clip_gives_unit_embeddings_at_its_own_size(clip: Path) -> None:
    extractor = load_clip_vision(clip)
    features = extract_features(extractor, torch.rand(3, 3, 28, 28))
    assert features.shape == (3, 12)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert extractor.name == "CLIP at 28 pixels, 12 features"
    assert len(extractor.digest) == 64


def test_incomplete_weights_are_refused(dinov2: Path, tmp_path: Path) -> None:
    """transformers would fill what is missing with random numbers."""
    with pytest.raises(ValueError, match=r"has no config\.json and .safetensors of a Dinov2Model"):
        load_dinov2(tmp_path)
    (tmp_path / "config.json").write_bytes((dinov2 / "config.json").read_bytes())
    tensors = load_file(dinov2 / "model.safetensors")
    gone = sorted(tensors)[-1]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"lacks {gone}"):
        load_dinov2(tmp_path)
