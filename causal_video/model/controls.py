"""Controls, numbers per latent frame that a video follows beside its text: actions, features of sound, or others.

A steered network takes them as conditioning channels, or adds them to the tokens of every layer (`FrameFeatures`).
Between modules they travel in `Condition.control`, which is a
batch of pictures [B, C, h, w]: K channels of F frames lie there as K F pictures, all frames of a channel together. So
both sides of guidance get the same, and joining or choosing samples takes the channels along.

Legend: N videos, B batch, K control channels, F latent frames, h x w latent pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.causal_video.model.calls import joined
from fewstep.causal_video.stream.world import ActionSpace, spread
from fewstep.core.condition import Condition
from fewstep.core.families.wan import WanFamily

CONTROLS_FILE = "controls.safetensors"
NAMES_KEY = "names"
# Name of the module in a network, and so the beginning of the names of its weights.
FEATURES = "frame_features"


@dataclass(frozen=True, eq=False)
class FrameControls:
    """Controls of a set of videos, in the order of their latents.

    Attributes:
        values: [N, K, F], the same all over a frame, or [N, K, F, h, w]; kept in fp32.
        names: of the K channels, as `ActionSpace` takes them.

    Raises:
        ValueError: another shape, names that do not fit, or numbers that are not finite.
    """

    values: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if self.values.ndim not in (3, 5) or 0 in self.values.shape:
            raise ValueError(f"controls must be [N, K, F] or [N, K, F, h, w], got {list(self.values.shape)}")
        ActionSpace(self.names)
        if len(self.names) != self.values.shape[1]:
            raise ValueError(
                f"{self.values.shape[1]} control channels and {len(self.names)} names {list(self.names)}: name each one"
            )
        if not bool(self.values.isfinite().all()):
            raise ValueError("controls hold numbers that are not finite: mend what they were computed from")
        object.__setattr__(self, "values", self.values.float())

    @property
    def channels(self) -> int:
        """K."""
        return self.values.shape[1]

    def rows(self, rows: Sequence[int], size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
        """Channels [B, K, F, h, w] of these videos for latents of size (h, w)."""
        chosen = self.values[list(rows)].to(device)
        return chosen if chosen.ndim == 5 else spread(chosen, *size)

    def check(self, latents: Tensor) -> None:
        """Raise ValueError unless there is one control for each frame of the videos [N, C, F, h, w]."""
        count, _, frames, height, width = latents.shape
        expected = (count, self.channels, frames, height, width)
        if tuple(self.values.shape) != expected[: self.values.ndim]:
            raise ValueError(
                f"data.controls holds {list(self.values.shape)}, and data.latents {list(latents.shape)}: controls must "
                f"be {list(expected[:3])} or {list(expected)}, a row for each video in the same order"
            )

    def save(self, folder: str | Path) -> Path:
        """Write `controls.safetensors` into a folder, beside the latents; gives its path."""
        path = Path(folder) / CONTROLS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"controls": self.values.contiguous()}, path, metadata={NAMES_KEY: json.dumps(self.names)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> FrameControls:
        """Read a file of `save`: a tensor "controls", and under "names" in the metadata a JSON list.

        Raises:
            ValueError: the file is missing or broken, or holds no controls.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"data.controls {path} is no file: give the {CONTROLS_FILE} beside the latents")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if "controls" not in file.keys() or NAMES_KEY not in metadata:  # noqa: SIM118, no mapping
                    raise ValueError(
                        f"data.controls {path} lacks a tensor 'controls' or {NAMES_KEY!r} in its metadata: write it "
                        "with FrameControls.save"
                    )
                return cls(file.get_tensor("controls"), tuple(json.loads(metadata[NAMES_KEY])))
        except SafetensorError as error:
            raise ValueError(f"data.controls {path} cannot be read ({error}): write it again") from error


def with_controls(condition: Condition, values: Tensor) -> Condition:
    """The condition with controls [B, K, F, h, w]."""
    return condition.with_control(rearrange(values, "b k f h w -> b (k f) h w"))


def controls_of(condition: Condition, frames: int) -> Tensor | None:
    """Controls [B, K, F, h, w] of a condition for videos of that many frames, or None.

    Raises:
        ValueError: they are of another number of frames.
    """
    if condition.control is None:
        return None
    if condition.control.shape[1] % frames:
        raise ValueError(f"{condition.control.shape[1]} control pictures do not divide into {frames} latent frames")
    return rearrange(condition.control, "b (k f) h w -> b k f h w", f=frames)


class FrameFeatures(nn.Module):
    """What a network is told of each frame, added to the tokens of the frame before every block, as OmniAvatar and
    LiveTalk (arXiv:2512.23576) add features of sound.

    A linear layer for each block, without bias and zero at first: zeros tell nothing, and the network starts as it was.

    Args:
        channels: K.
        width: D of the network.
        layers: blocks.
    """

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.layers = nn.ModuleList(nn.Linear(channels, width, bias=False) for _ in range(layers))
        for layer in self.layers:
            nn.init.zeros_(layer.get_parameter("weight"))

    @property
    def channels(self) -> int:
        """K."""
        return self.layers[0].get_parameter("weight").shape[1]

    def added(self, layer: int, told: Tensor, tokens: int) -> Tensor:
        """[B, F tokens, D] for one block, of controls [B, F, K]."""
        module = self.layers[layer]
        wide = module.get_parameter("weight").dtype
        return module(told.to(wide)).repeat_interleave(tokens, dim=1)


def features_of(network: nn.Module) -> FrameFeatures | None:
    """The features of frames that a network is told in its layers; None where it is told none there."""
    found = getattr(network, FEATURES, None)
    return found if isinstance(found, FrameFeatures) else None


def add_features(network: WanTransformer3DModel, channels: int) -> FrameFeatures:
    """Let a network be told K numbers of each frame in its layers, in place."""
    config = network.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    features = FrameFeatures(channels, width, config["num_layers"])
    weight = network.patch_embedding.weight
    nn.Module.to(features, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    network.register_module(FEATURES, features)
    return features


def load_features(network: WanTransformer3DModel, folder: Path, dtype: torch.dtype) -> None:
    """Add the features of frames that the files of a network have, which diffusers leaves out; nothing where none are.

    Raises:
        ValueError: a file cannot be read.
    """
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                names = [name for name in list(opened.keys()) if name.startswith(f"{FEATURES}.")]
                found |= {name.removeprefix(f"{FEATURES}."): opened.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}); export the student again") from error
    if found:
        features = add_features(network, next(iter(found.values())).shape[1])
        features.load_state_dict(found)
        nn.Module.to(features, dtype=dtype)


class SteeredWanFamily(WanFamily):
    """A bidirectional Wan network that takes the controls of the condition as channels beside the latents."""

    def velocity(self, network: WanTransformer3DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `WanFamily.velocity`. Raises ValueError for a condition without controls."""
        extra = controls_of(condition, x_t.shape[2])
        if extra is None:
            raise ValueError("a steered teacher was called without controls: give them with `with_controls`")
        return super().velocity(network, joined(x_t, extra), t, condition)
