"""CLIP-based scorers on tiny random models of the real classes equal a plain use of the libraries."""

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from fewstep.evaluation.clip_score import load_clip_scorer
from fewstep.evaluation.scorers.clip import AestheticScore, load_aesthetic, load_clip_score, load_hpsv2, load_pickscore
from fewstep.evaluation.scorers.scorer import score
from fewstep.evaluation.scorers.weights import ScoreHead

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic"}
PROMPTS = ["a bold three", "the digit seven", "a thin zero"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = open_clip.CLIP(**copy.deepcopy(MODEL))
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}))
    save_file(model.state_dict(), place / "open_clip_model.safetensors")
    return place


@pytest.fixture(scope="module")
def pick_folder(tmp_path_factory, repository) -> Path:
    place = tmp_path_factory.mktemp("pickscore")
    tokenizer = CLIPTokenizer.from_pretrained(repository / "assets" / "digits_image" / "tokenizer")
    tokenizer.save_pretrained(place)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        CLIPModel(config).save_pretrained(place)
    return place


def pictures(height: int, width: int) -> torch.Tensor:
    """Smooth 8-bit pictures [3, 3, H, W], on which tensor and PIL resizing agree."""
    coarse = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return (F.interpolate(coarse, size=(height, width), mode="bilinear") * 255.0).round() / 255.0


def as_pil(pixels: torch.Tensor) -> list[Image.Image]:
    arrays = (pixels * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def test_clip_score_is_the_scorer_of_the_metric(clip_folder) -> None:
    scorer = load_clip_score(clip_folder)
    pixels = pictures(40, 32)
    assert (scorer.card.name, scorer.card.high, scorer.card.weights) == ("clip_score", 100.0, str(clip_folder))
    assert torch.equal(score(scorer, pixels, PROMPTS), load_clip_scorer(clip_folder)(pixels, PROMPTS))


@pytest.mark.parametrize("size", [(32, 32), (48, 30), (40, 64)])
def test_hpsv2_is_the_cosine_of_pictures_fitted_by_their_longer_side(clip_folder, size) -> None:
    scorer = load_hpsv2(clip_folder, model=None)
    pixels = pictures(*size)
    transform: Any = image_transform(
        32, is_train=False, mean=tuple(PREPROCESS["mean"]), std=tuple(PREPROCESS["std"]), resize_mode="longest"
    )
    model = scorer.clip.model
    outputs = model(torch.stack([transform(image) for image in as_pil(pixels)]), open_clip.tokenize(PROMPTS))
    expected = (outputs[0] * outputs[1]).sum(dim=1)
    found = score(scorer, pixels, PROMPTS)
    assert (found - expected).abs().max() < 2e-3
    assert expected.abs().max() > 0.05
    assert (score(scorer, pixels, PROMPTS, chunk=1) - found).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(32, 32), (48, 30), (45, 128)])
def test_pickscore_is_the_logit_of_clip(pick_folder, size) -> None:
    scorer = load_pickscore(pick_folder)
    pixels = pictures(*size)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokens = CLIPTokenizer.from_pretrained(pick_folder)(PROMPTS, padding=True, return_tensors="pt")
    images = processor(images=as_pil(pixels), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(pick_folder)(**tokens, pixel_values=images).logits_per_image.diagonal()
    found = score(scorer, pixels, PROMPTS)
    assert (found - expected).abs().max() < 2e-2
    assert expected.std() > 0.1
    assert scorer.card.high == pytest.approx(14.2857, abs=1e-3)
    assert (score(scorer, pixels, PROMPTS, chunk=2) - found).abs().max() < 1e-4


def test_aesthetic_head_is_affine_on_the_normalised_embedding(clip_folder, tmp_path) -> None:
    head = ScoreHead(16)
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    scorer = load_aesthetic(tmp_path / "head.safetensors", clip=clip_folder, clip_model=None)
    assert isinstance(scorer, AestheticScore)
    pixels = pictures(32, 32)
    embedding = scorer.clip.model.encode_image(scorer.preprocess(pixels))
    embedding = embedding / embedding.norm(dim=1, keepdim=True)
    matrix, offset = torch.eye(16), torch.zeros(16)
    for place in (0, 2, 4, 6, 7):
        layer = head.layers[place]
        assert isinstance(layer, torch.nn.Linear)
        weight, bias = layer.weight, layer.bias
        matrix, offset = weight @ matrix, weight @ offset + bias
    expected = embedding @ matrix[0] + offset[0]
    assert (score(scorer, pixels, PROMPTS) - expected).abs().max() < 1e-6
    assert torch.equal(score(scorer, pixels, PROMPTS), score(scorer, pixels, PROMPTS[::-1]))


def test_gradient_of_every_scorer_is_its_slope(clip_folder, pick_folder, tmp_path) -> None:
    """Directional derivative against a central difference in float64 pixels of an odd size."""
    save_file(ScoreHead(16).state_dict(), tmp_path / "head.safetensors")
    scorers = [
        load_clip_score(clip_folder),
        load_hpsv2(clip_folder, model=None),
        load_aesthetic(tmp_path / "head.safetensors", clip=clip_folder, clip_model=None),
        load_pickscore(pick_folder),
    ]
    pixels = 0.25 + 0.5 * pictures(40, 36)
    for scorer in scorers:
        leaf = pixels.clone().requires_grad_()
        values = score(scorer, leaf, PROMPTS, gradient=True)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        step = 0.02 * gradient / gradient.abs().max()
        ahead, behind = (score(scorer, pixels + sign * step, PROMPTS).sum() for sign in (1.0, -1.0))
        slope = (gradient * step).sum()
        assert slope > 0.0
        assert ((ahead - behind) / 2.0 / slope).item() == pytest.approx(1.0, abs=0.05), scorer.card.name
        assert all(not parameter.requires_grad for parameter in scorer.parameters())


def test_missing_and_pickled_weights_say_what_to_do(clip_folder, pick_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no weights of HPSv2 at .*nowhere"):
        load_hpsv2(tmp_path / "nowhere")
    pickled = tmp_path / "HPS_v2.1_compressed.pt"
    pickled.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights_only=True.* HPS_v2\.1_compressed\.pt HPS_v2\.1_compressed\.safete"):
        load_hpsv2(pickled)
    with pytest.raises(ValueError, match="pickled checkpoint"):
        load_aesthetic(pickled, clip=clip_folder)
    save_file({"other": torch.ones(2)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"the aesthetic head has layers\.0\.weight"):
        load_aesthetic(tmp_path / "head.safetensors", clip=clip_folder)
    with pytest.raises(ValueError, match="no weights of PickScore"):
        load_pickscore(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"lacks config\.json, tokenizer_config\.json"):
        load_pickscore(tmp_path)


@pytest.mark.slow
def test_the_conversion_command_makes_the_file_that_is_loaded(tmp_path, clip_folder) -> None:
    import subprocess
    import sys

    from fewstep.evaluation.scorers.weights import CONVERT, read_weights

    state = {"layers.0.weight": torch.arange(6.0).view(2, 3).t()}
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    subprocess.run([sys.executable, "-c", CONVERT, tmp_path / "a.pt", tmp_path / "a.safetensors"], check=True)
    assert torch.equal(
        read_weights(tmp_path / "a.safetensors", scorer="a")["layers.0.weight"], state["layers.0.weight"]
    )
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"holds layers\.0\.weight in two files"):
        read_weights(tmp_path, scorer="a")
    (tmp_path / "b.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(tmp_path / "b.safetensors", scorer="a")
