"""Rewards on a tiny random Qwen2-VL: inputs equal the library's own processor, outputs a plain use of the network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLModel,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from fewstep.dmd.reward.config import RewardSettings
from fewstep.dmd.reward.methods.redmd import latent_saliency, space_time_weight
from fewstep.dmd.reward.scorers import load_scorers
from fewstep.dmd.reward.scores import RewardModel
from fewstep.evaluation.scorers.qwen import (
    HPSV3_TOKENS,
    VIDEO_TOKENS,
    HpsV3,
    Instruction,
    VideoAlign,
    build_head,
    load_hpsv3,
    load_qwen_reward,
    load_videoalign,
    modern_names,
)
from fewstep.evaluation.scorers.scorer import score
from fewstep.evaluation.scorers.settings import ScorerConfig

AREA = (28 * 28, 2 * 28 * 28)
WORDS = ["rate", "this", ":", "prompt", "red", "fox", "runs", "over", "the", "hill", "a", "and", "then", "user"]
MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% else %}<|vision_start|><|{{ c['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>user {% endif %}"
)
IMAGE_TEMPLATE = "rate this : {text_prompt} and then <|Reward|> a"
VIDEO_TEMPLATE = "rate <|VQ_reward|> this : <|MQ_reward|> prompt {text_prompt} <|TA_reward|> a"
PROMPTS = ["red fox", "a fox runs over the hill and then a red fox runs"]
MEANS, STDS = (3.0, 1.0, 2.0), (2.0, 1.5, 2.5)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words and marks by number: padding 0, unknown 1, then words, then marks; no reward tokens yet."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = CHAT
    return tokenizer


def build_config(tokenizer: Any) -> Any:
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        # The base model has more rows than the resized embedding, as with the published weights.
        "vocab_size": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }
    vision = {"embed_dim": 16, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    image, video, start, end = (
        tokenizer.convert_tokens_to_ids(mark)
        for mark in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    )
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )


def write_folder(place: Path, *, tokens: tuple[str, ...], template: str, head: nn.Module) -> None:
    """A checkpoint with the names of older transformers, as the published ones have."""
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    rows = len(tokenizer) + len(tokens)
    network_config = build_config(tokenizer)
    network_config.text_config.vocab_size = rows
    with torch.random.fork_rng():
        torch.manual_seed(4)
        network = Qwen2VLModel(network_config)
        for parameter in network.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.25)
    config.save_pretrained(place)
    tokenizer.save_pretrained(place)
    tensors = {}
    for name, tensor in network.state_dict().items():
        old = name.removeprefix("language_model.")
        tensors[name if name.startswith("visual.") else f"model.{old}"] = tensor.clone()
    tensors |= {f"rm_head.{name}": tensor.clone() for name, tensor in head.state_dict().items()}
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, place / "model-1.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, place / "model-2.safetensors")
    (place / "prompt_template.txt").write_text(template)
    statistics = {f"{axis}_mean": MEANS[row] for row, axis in enumerate(("VQ", "MQ", "TA"))}
    statistics |= {f"{axis}_std": STDS[row] for row, axis in enumerate(("VQ", "MQ", "TA"))}
    (place / "model_config.json").write_text(json.dumps({"inference_config": statistics}))


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("hpsv3")
    head = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Dropout(0.05), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))
    write_folder(place, tokens=HPSV3_TOKENS, template=IMAGE_TEMPLATE, head=head)
    return place


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("videoalign")
    write_folder(place, tokens=VIDEO_TOKENS, template=VIDEO_TEMPLATE, head=nn.Linear(32, 1, bias=False))
    return place


def load(folder: Path, tokens: tuple[str, ...]):
    return load_qwen_reward(folder, tokens=tokens, area=AREA, dtype=torch.float32)


def smooth(*shape: int) -> torch.Tensor:
    """8-bit frames [..., 3, H, W] of low frequencies."""
    coarse = torch.rand(*shape[:-2], 4, 4, generator=torch.Generator().manual_seed(3)).flatten(0, -4)
    frames = F.interpolate(coarse, size=shape[-2:], mode="bilinear")
    return ((0.1 + 0.8 * frames) * 255.0).round().view(shape) / 255.0


def library_inputs(reward, prompts: list[str], *, images=None, videos=None):
    """What transformers' processor makes of the same frames (uint8) and prompts."""
    size = {"shortest_edge": AREA[0], "longest_edge": AREA[1]}
    processor: Any = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=size),
        reward.tokenizer,
        Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        chat_template=CHAT,
    )
    kind = "image" if images is not None else "video"
    texts = []
    for prompt in prompts:
        content = [{"type": kind}, {"type": "text", "text": reward.instruction.text(prompt)}]
        texts.append(
            processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        )
    return processor(text=texts, images=images, videos=videos, padding=True, return_tensors="pt")


def as_bytes(frames: torch.Tensor) -> list[torch.Tensor]:
    return list((frames * 255.0).round().to(torch.uint8))


@pytest.mark.parametrize("size", [(28, 56), (30, 41), (80, 64)])
def test_hpsv3_equals_the_processor_and_the_network(image_folder, size) -> None:
    reward = load(image_folder, HPSV3_TOKENS)
    pixels = smooth(2, 3, *size)
    inputs = library_inputs(reward, PROMPTS, images=as_bytes(pixels))
    patches, grid = reward.patchify(pixels[:, None])
    assert [list(grid)] * 2 == inputs["image_grid_thw"].tolist()
    assert (patches - inputs["pixel_values"]).abs().max() < 1.5 / 255.0 / 0.26
    with torch.no_grad():
        states = reward.network(**inputs).last_hidden_state
        places = inputs["input_ids"] == reward.tokenizer.convert_tokens_to_ids("<|Reward|>")
        expected = reward.head(states[places])[:, 0]
    found = score(HpsV3(reward), pixels, PROMPTS)
    tolerance = 1e-5 if size == (28, 56) else 2e-2
    assert (found - expected).abs().max() < tolerance
    assert (expected[0] - expected[1]).abs() > 1e-3
    assert (score(HpsV3(reward), pixels, PROMPTS, chunk=1) - found).abs().max() < 1e-5


@pytest.mark.parametrize("frames", [4, 5])
def test_videoalign_equals_the_processor_and_the_network(video_folder, frames) -> None:
    reward = load(video_folder, VIDEO_TOKENS)
    clips = smooth(2, frames, 3, 28, 56)
    inputs = library_inputs(reward, PROMPTS, videos=as_bytes(clips))
    assert inputs["video_grid_thw"].tolist() == [[(frames + 1) // 2, 2, 4]] * 2
    with torch.no_grad():
        states = reward.network(**inputs).last_hidden_state
    raw = []
    for token in VIDEO_TOKENS:
        places = inputs["input_ids"] == reward.tokenizer.convert_tokens_to_ids(token)
        raw.append((states[places] @ reward.head.weight.T)[:, 0])
    pixels = clips.transpose(1, 2)
    options: dict[str, Any] = {"means": MEANS, "stds": STDS}
    axes = [VideoAlign(reward, axis, **options) for axis in ("VQ", "MQ", "TA", "overall")]
    found = [score(scorer, pixels, PROMPTS) for scorer in axes]
    for row in range(3):
        assert (found[row] - (raw[row] - MEANS[row]) / STDS[row]).abs().max() < 1e-5
    assert (found[3] - found[0] - found[1] - found[2]).abs().max() < 1e-5
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_frames_are_thinned_evenly_and_gray_has_no_colour(video_folder) -> None:
    reward = load(video_folder, VIDEO_TOKENS)
    clips = smooth(2, 9, 3, 28, 56).transpose(1, 2)
    options: dict[str, Any] = {"means": MEANS, "stds": STDS}
    thin = score(VideoAlign(reward, "MQ", **options, frames=4), clips, PROMPTS)
    assert torch.equal(thin, score(VideoAlign(reward, "MQ", **options), clips[:, :, [0, 3, 5, 8]], PROMPTS))
    gray = VideoAlign(reward, "MQ", **options, gray=True)
    luma = (clips * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1, 1)).sum(1, keepdim=True)
    again = score(gray, luma.expand(-1, 3, -1, -1, -1), PROMPTS)
    assert (score(gray, clips, PROMPTS) - again).abs().max() < 1e-5
    plain = score(VideoAlign(reward, "MQ", **options), clips, PROMPTS)
    assert (score(gray, clips, PROMPTS) - plain).abs().max() > 1e-4


def test_gradient_is_the_slope(image_folder) -> None:
    scorer = HpsV3(load(image_folder, HPSV3_TOKENS))
    pixels = smooth(2, 3, 40, 33).requires_grad_()
    (gradient,) = torch.autograd.grad(score(scorer, pixels, PROMPTS, gradient=True).sum(), pixels)
    step = 1e-4 * gradient / gradient.abs().max()
    ahead, behind = (score(scorer, pixels.detach() + sign * step, PROMPTS).sum() for sign in (1.0, -1.0))
    assert ((ahead - behind) / 2.0 / (gradient * step).sum()).item() == pytest.approx(1.0, abs=0.02)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in scorer.parameters())


def test_new_names_and_half_precision_load_too(image_folder, video_folder, tmp_path) -> None:
    for file in image_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = {}
    for file in image_folder.glob("*.safetensors"):
        tensors |= modern_names(load_file(file))
    assert sum(name.startswith("model.language_model.") for name in tensors) > 10
    assert modern_names(tensors).keys() == tensors.keys()
    save_file(tensors, tmp_path / "model.safetensors")
    pixels = smooth(2, 3, 28, 56)
    old = score(HpsV3(load(image_folder, HPSV3_TOKENS)), pixels, PROMPTS)
    assert torch.equal(score(HpsV3(load(tmp_path, HPSV3_TOKENS)), pixels, PROMPTS), old)
    half = load_hpsv3(image_folder)
    assert half.reward.network.dtype == torch.bfloat16
    assert next(half.reward.head.parameters()).dtype == torch.float32
    clip = load_videoalign(video_folder, "TA", dtype=torch.float32)
    assert (clip.means, clip.stds, clip.card.needs_video) == (MEANS, STDS, True)


def test_axes_of_one_model_are_loaded_once_and_say_where_they_look_in_half_precision(video_folder) -> None:
    """Stream-R1's three rewards: one network, and a finite map of the pixels for each of them."""
    entries = [ScorerConfig(name=f"videoalign_{axis}", weights=str(video_folder)) for axis in ("vq", "mq", "ta")]
    scorers: Any = load_scorers(entries, device=torch.device("cpu"), videos=True)
    assert [scorer.axis for scorer in scorers] == ["VQ", "MQ", "TA"]
    assert len({id(scorer.reward) for scorer in scorers}) == 1
    assert scorers[0].reward.network.dtype == torch.bfloat16
    settings = RewardSettings(scorers=tuple(entries), group_size=2, chunk=1, overlap=False)
    model = RewardModel(scorers, settings, gradient=True, videos=True)
    values, maps = model.sensitivity(smooth(2, 3, 9, 28, 56), PROMPTS)
    assert (values.shape, maps.shape) == ((3, 2), (3, 2, 9, 28, 56))
    assert bool((maps.flatten(2).amax(dim=2) > 0).all())
    assert all(parameter.grad is None for parameter in scorers[0].parameters())
    weight = space_time_weight(latent_saliency(maps, 3, (7, 14)).transpose(0, 1), values.T)
    assert weight.shape == (2, 1, 3, 7, 14)
    torch.testing.assert_close(weight.mean(dim=(1, 2, 3, 4)), torch.ones(2))


def test_prompts_cannot_smuggle_tokens_in(image_folder) -> None:
    scorer = HpsV3(load(image_folder, HPSV3_TOKENS))
    with pytest.raises(ValueError, match=r"a prompt contains one of <\|Reward\|>"):
        scorer(smooth(1, 3, 28, 56), ["fox <|Reward|>"])
    with pytest.raises(ValueError, match=r"holds <\|image_pad\|> 2 times"):
        scorer(smooth(1, 3, 28, 56), ["fox <|image_pad|>"])


def test_mistakes(image_folder, video_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"holds \{text_prompt\} 0 times"):
        Instruction("rate <|Reward|>", HPSV3_TOKENS, *AREA)
    with pytest.raises(ValueError, match="in another order"):
        Instruction("b a {text_prompt}", ("a", "b"), *AREA)
    with pytest.raises(ValueError, match="belongs to a LoRA adapter"):
        modern_names({"base_model.model.lora_A.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="the reward head has"):
        build_head({"0.weight": torch.ones(1, 1)})
    with pytest.raises(ValueError, match="no weights of this Qwen2-VL reward model"):
        load_hpsv3(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds <\|VQ_reward\|> 0 times"):
        load(image_folder, VIDEO_TOKENS)
    (tmp_path / "model.safetensors").write_bytes((image_folder / "model-1.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"lacks config\.json, tokenizer_config\.json, prompt_template\.txt"):
        load_hpsv3(tmp_path)
    with pytest.raises(ValueError, match=r"lacks model_config\.json"):
        load_videoalign(tmp_path, "VQ")
    reward = load(video_folder, VIDEO_TOKENS)
    with pytest.raises(ValueError, match="axis is 'XX'"):
        VideoAlign(reward, "XX", means=MEANS, stds=STDS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="frames is 1"):
        VideoAlign(reward, "VQ", means=MEANS, stds=STDS, frames=1)
    with pytest.raises(ValueError, match="stds above 0"):
        VideoAlign(reward, "VQ", means=MEANS, stds=(0.0, 1.0, 1.0))


def test_missing_parts_of_the_network_are_errors(image_folder, tmp_path) -> None:
    for file in image_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model-1.safetensors")
    removed = next(name for name in sorted(tensors) if "layers.0" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != removed}, tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match="not those of its config"):
        load(tmp_path, HPSV3_TOKENS)
