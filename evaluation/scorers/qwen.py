"""Rewards read from special tokens of Qwen2-VL: HPSv3 (pictures) and VideoAlign (clips), from local weights.

Both are one construction: picture or clip and a long instruction go into Qwen2-VL (arXiv:2409.12191), the instruction
ends in reward tokens, and a small head maps the last hidden state at each of them to a number. The instruction is part
of the model; it is read from `prompt_template.txt` beside the weights, where `{text_prompt}` stands for the prompt.

Our reading, which no published weights have confirmed here: the picture stands before the text, the text is wrapped by
the chat template of the tokenizer with the assistant's turn opened, and column 0 of the head is the score (HPSv3: the
mean of its Gaussian).

Shapes: B samples, T reward tokens, frames [B, F, 3, H, W] in [0, 1], rewards [B, T].
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.evaluation.scorers.preprocess import CLIP_MEAN, CLIP_STD, fit_to_patches, normalise, resize
from fewstep.evaluation.scorers.scorer import ScorerCard
from fewstep.evaluation.scorers.weights import load_strictly, part_of, read_weights, require_files

PLACEHOLDER = "{text_prompt}"
TEMPLATE_FILE, VIDEO_CONFIG_FILE = "prompt_template.txt", "model_config.json"
HPSV3_TOKENS = ("<|Reward|>",)
VIDEO_AXES = ("VQ", "MQ", "TA")
VIDEO_TOKENS = tuple(f"<|{axis}_reward|>" for axis in VIDEO_AXES)
# HPSv3 reads every picture at one area; VideoAlign caps a frame.
HPSV3_AREA = 256 * 28 * 28
VIDEO_AREA = (128 * 28 * 28, 200704)
# As checkpoints of older transformers name the two towers.
LEGACY_NAMES = ((r"^visual\.", "model.visual."), (r"^model\.(?!language_model\.|visual\.)", "model.language_model."))
GRAY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Instruction:
    """What a reward model is asked: a template with one `{text_prompt}` and its reward tokens, each once, in order.

    `min_area` and `max_area` bound the pixels of a frame. Raises ValueError when the template lacks one of them.
    """

    template: str
    tokens: tuple[str, ...]
    min_area: int
    max_area: int

    def __post_init__(self) -> None:
        for part in (PLACEHOLDER, *self.tokens):
            if self.template.count(part) != 1:
                raise ValueError(
                    f"the template holds {part} {self.template.count(part)} times; it must hold it once "
                    "(take the template that the weights were trained with)"
                )
        places = [self.template.index(token) for token in self.tokens]
        if places != sorted(places):
            raise ValueError(f"the template holds its reward tokens in another order than {', '.join(self.tokens)}")

    def text(self, prompt: str) -> str:
        return self.template.replace(PLACEHOLDER, prompt)


class QwenReward(nn.Module):
    """Frames and prompts to one number per reward token.

    `network` is a transformers Qwen2VLModel, `head` maps hidden states [..., D] to [..., 1 or more] in fp32.
    Differentiable in the frames.
    """

    def __init__(self, network: nn.Module, head: nn.Module, tokenizer: Any, *, instruction: Instruction) -> None:
        super().__init__()
        self.network: Any = network.requires_grad_(False).eval()
        self.head = head.requires_grad_(False).eval().float()
        self.tokenizer = tokenizer
        self.instruction = instruction
        self.token_ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in instruction.tokens]
        rows = self.network.get_input_embeddings().weight.shape[0]
        if max(self.token_ids) >= rows:
            raise ValueError(
                f"reward tokens have the numbers {self.token_ids}, the embedding has {rows} rows; "
                "tokenizer and weights are not of one checkpoint"
            )

    def forward(self, frames: Tensor, prompts: list[str], *, video: bool) -> Tensor:
        """Rewards [B, T] in fp32 of frames [B, F, 3, H, W]; with `video` they are read as a clip, else F is 1.

        Raises ValueError when a prompt contains a reward token or a placeholder of the vision tower.
        """
        patches, grid = self.patchify(frames)
        pad = self.network.config.video_token_id if video else self.network.config.image_token_id
        tokens = self._tokens(prompts, kind="video" if video else "image", pad=pad, count=self._vision_tokens(grid))
        ids, mask = (tokens[name].to(frames.device) for name in ("input_ids", "attention_mask"))
        grids = torch.tensor([grid] * len(prompts), device=frames.device)
        vision = {"pixel_values_videos": patches, "video_grid_thw": grids}
        if not video:
            vision = {"pixel_values": patches, "image_grid_thw": grids}
        # In these ids 1 is a picture and 2 a clip; Qwen2-VL's positions depend on them.
        kinds = (ids == pad).int() * (2 if video else 1)
        states = self.network(input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, **vision).last_hidden_state
        wanted = torch.isin(ids, torch.tensor(self.token_ids, device=ids.device))
        if not bool((wanted.sum(dim=1) == len(self.token_ids)).all()):
            raise ValueError(f"a prompt contains one of {', '.join(self.instruction.tokens)}; remove it")
        picked = states[wanted].view(len(prompts), len(self.token_ids), -1)
        return self.head(picked.float())[..., 0]

    def patchify(self, frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Patches [B * n, 3 * 2 * P * P] of frames [B, F, 3, H, W] and the grid (time, rows, columns) of a sample.

        An odd number of frames is filled by repeating the last, so a picture is a clip of two equal frames.
        """
        vision = self.network.config.vision_config
        patch, merge, pair = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        batch, count, _, height, width = frames.shape
        area = {"min_pixels": self.instruction.min_area, "max_pixels": self.instruction.max_area}
        rows, columns = fit_to_patches(height, width, factor=patch * merge, **area)
        flat = resize(frames.flatten(0, 1).float(), (rows, columns))
        frames = normalise(flat, mean=CLIP_MEAN, std=CLIP_STD).unflatten(0, (batch, count))
        frames = torch.cat([frames, frames[:, -1:].expand(-1, -count % pair, -1, -1, -1)], dim=1)
        grid = (frames.shape[1] // pair, rows // patch, columns // patch)
        split = frames.reshape(
            batch, grid[0], pair, 3, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
        )  # [B, T, pair, C, rows, merge, P, columns, merge, P]
        patches = split.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, 3 * pair * patch * patch)
        return patches, grid

    def _vision_tokens(self, grid: tuple[int, int, int]) -> int:
        return grid[0] * grid[1] * grid[2] // self.network.config.vision_config.spatial_merge_size**2

    def _tokens(self, prompts: list[str], *, kind: str, pad: int, count: int) -> Any:
        """Token ids padded on the right, with `count` placeholders for the patches of each sample."""
        name = self.tokenizer.convert_ids_to_tokens(pad)
        texts = []
        for prompt in prompts:
            content = [{"type": kind}, {"type": "text", "text": self.instruction.text(prompt)}]
            message = [{"role": "user", "content": content}]
            text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            if text.count(name) != 1:
                raise ValueError(f"a prompt or the chat template holds {name} {text.count(name)} times; once is needed")
            texts.append(text.replace(name, name * count))
        return self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")


class HpsV3(nn.Module):
    """HPSv3 (arXiv:2508.03789): human preference for a picture and its prompt, about 0 to 15, not bounded."""

    def __init__(self, reward: QwenReward, *, weights: str | None = None) -> None:
        super().__init__()
        self.reward = reward
        self.card = ScorerCard("hpsv3", differentiable=True, weights=weights)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return self.reward(pixels[:, None], prompts, video=False)[:, 0]


class VideoAlign(nn.Module):
    """One axis of VideoAlign (arXiv:2501.13918) as a z-score: visual quality, motion quality, text alignment, or sum.

    `means` and `stds` are those of the three outputs over its training clips. `frames` clips are thinned to that many
    frames, evenly from first to last; None takes all. With `gray` the clip is judged without colour (luma of ITU-R
    BT.601), as Astrolabe (arXiv:2603.17051) does for motion. Several axes may share one `reward`.
    """

    def __init__(
        self,
        reward: QwenReward,
        axis: Literal["VQ", "MQ", "TA", "overall"],
        *,
        means: tuple[float, ...],
        stds: tuple[float, ...],
        frames: int | None = None,
        gray: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if axis not in (*VIDEO_AXES, "overall"):
            raise ValueError(f"axis is {axis!r}; use one of {', '.join(VIDEO_AXES)} or 'overall'")
        if len(means) != 3 or len(stds) != 3 or min(stds) <= 0.0:
            raise ValueError(f"means {means} and stds {stds} must be three numbers each, stds above 0")
        if frames is not None and frames < 2:
            raise ValueError(f"frames is {frames}; a clip needs at least 2")
        self.reward, self.axis, self.frames, self.gray = reward, axis, frames, gray
        self.means, self.stds = means, stds
        self.card = ScorerCard(f"videoalign_{axis.lower()}", differentiable=True, needs_video=True, weights=weights)

    def of_axis(self, axis: Literal["VQ", "MQ", "TA", "overall"]) -> VideoAlign:
        """Another axis of the same model, which is not loaded again."""
        of_model = {"means": self.means, "stds": self.stds, "frames": self.frames, "gray": self.gray}
        return VideoAlign(self.reward, axis, **of_model, weights=self.card.weights)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        if self.frames is not None and pixels.shape[2] > self.frames:
            places = torch.linspace(0, pixels.shape[2] - 1, self.frames, dtype=torch.float64).round().long()
            pixels = pixels[:, :, places.to(pixels.device)]
        if self.gray:
            luma = pixels.new_tensor(GRAY).view(1, 3, 1, 1, 1)
            pixels = (pixels * luma).sum(dim=1, keepdim=True).expand(-1, 3, -1, -1, -1)
        rewards = self.reward(pixels.transpose(1, 2), prompts, video=True)
        scores = (rewards - rewards.new_tensor(self.means)) / rewards.new_tensor(self.stds)
        return scores.sum(dim=1) if self.axis == "overall" else scores[:, VIDEO_AXES.index(self.axis)]


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of older Qwen2-VL checkpoints to those of transformers 5; newer ones stay.

    Raises ValueError for an adapter, which must be merged into its base model first.
    """
    renamed = {}
    for name, tensor in tensors.items():
        if "lora_" in name or name.startswith("base_model."):
            raise ValueError(f"{name} belongs to a LoRA adapter; merge it (peft's merge_and_unload) and save the model")
        for pattern, target in LEGACY_NAMES:
            name, hits = re.subn(pattern, target, name)
            if hits:
                break
        renamed[name] = tensor
    return renamed


def build_head(tensors: Mapping[str, Tensor]) -> nn.Module:
    """The reward head of these tensors (names after `rm_head.`): linear, or linear-ReLU-linear-ReLU-linear (HPSv3).

    Raises ValueError when they are neither.
    """
    if set(tensors) == {"weight"}:
        out, width = tensors["weight"].shape
        head: nn.Module = nn.Linear(width, out, bias=False)
    elif "0.weight" in tensors and "3.weight" in tensors and "5.weight" in tensors:
        (first, width), second, out = tensors["0.weight"].shape, tensors["3.weight"].shape[0], tensors["5.weight"].shape
        parts = (nn.Linear(width, first), nn.ReLU(), nn.Dropout(0.05), nn.Linear(first, second), nn.ReLU())
        head = nn.Sequential(*parts, nn.Linear(second, out[0]))
    else:
        raise ValueError(f"the reward head has {sorted(tensors)}; 'weight', or '0.', '3.' and '5.' are known")
    load_strictly(head, {name: tensor.float() for name, tensor in tensors.items()}, scorer="the reward head")
    return head


def load_qwen_reward(
    folder: str | Path, *, tokens: tuple[str, ...], area: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> QwenReward:
    """A reward model from a folder: config.json, safetensors with `rm_head.*`, tokenizer and prompt_template.txt.

    Reward tokens that the tokenizer lacks are added at its end, which is how they were numbered in training.

    Raises:
        ValueError: a file is missing, or weights, tokenizer and template do not fit together.
    """
    folder = Path(folder)
    name = "this Qwen2-VL reward model"
    tensors = modern_names(read_weights(folder, scorer=name))
    require_files(folder, ("config.json", "tokenizer_config.json", TEMPLATE_FILE), scorer=name)
    instruction = Instruction((folder / TEMPLATE_FILE).read_text(encoding="utf-8"), tokens, *area)
    # Slow imports; mistakes above are answered without them.
    from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel
    from transformers.tokenization_utils_base import AddedToken

    # Any: transformers types the parts of a configuration as dictionaries too.
    config: Any = Qwen2VLConfig.from_pretrained(folder)
    body, head = part_of(tensors, "model."), part_of(tensors, "rm_head.")
    embedding = body.get("language_model.embed_tokens.weight")
    if embedding is None:
        raise ValueError(f"{folder} has no embedding of words; it holds {sorted(tensors)[:2]} ..., not a Qwen2-VL")
    # Training resized the embedding to the tokenizer, which the configuration of the base model does not know.
    config.text_config.vocab_size = embedding.shape[0]
    loaded: Any = Qwen2VLModel.from_pretrained(
        None, config=config, state_dict=body, dtype=dtype, output_loading_info=True
    )
    network, report = loaded
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise ValueError(f"the weights in {folder} are not those of its config.json: {report}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens if token not in known])
    return QwenReward(network, build_head(head), tokenizer, instruction=instruction)


def load_hpsv3(folder: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> HpsV3:
    """HPSv3 from its folder; files and errors as in `load_qwen_reward`."""
    reward = load_qwen_reward(folder, tokens=HPSV3_TOKENS, area=(HPSV3_AREA, HPSV3_AREA), dtype=dtype)
    return HpsV3(reward, weights=str(folder)).to(device)


def read_video_statistics(folder: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and standard deviations of VQ, MQ and TA from the `inference_config` of model_config.json.

    Raises ValueError when the file or one of the six numbers is missing.
    """
    file = Path(folder) / VIDEO_CONFIG_FILE
    require_files(Path(folder), (VIDEO_CONFIG_FILE,), scorer="VideoAlign")
    values = json.loads(file.read_text(encoding="utf-8")).get("inference_config") or {}
    missing = [f"{axis}_{part}" for axis in VIDEO_AXES for part in ("mean", "std") if f"{axis}_{part}" not in values]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)} in inference_config; take the file of the release")
    means, stds = (tuple(float(values[f"{axis}_{part}"]) for axis in VIDEO_AXES) for part in ("mean", "std"))
    return means, stds


def load_videoalign(
    folder: str | Path,
    axis: Literal["VQ", "MQ", "TA", "overall"],
    *,
    frames: int | None = None,
    gray: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> VideoAlign:
    """One axis of VideoAlign from its folder; files and errors as in `load_qwen_reward`, and model_config.json."""
    means, stds = read_video_statistics(folder)
    reward = load_qwen_reward(folder, tokens=VIDEO_TOKENS, area=VIDEO_AREA, dtype=dtype)
    scorer = VideoAlign(reward, axis, means=means, stds=stds, frames=frames, gray=gray, weights=str(folder))
    return scorer.to(device)
