"""A causal video student as a user opens it: an ordinary Wan pipeline directory beside which `causal_video.json` lies.

Stock diffusers opens the same directory as a `WanPipeline`, whose transformer is then the bidirectional network; a
student of two times is stored as an `AnyFlowFARPipeline`, whose transformer is causal and has both.

Legend: B batch, C channels, F latent frames, T pixel frames, h x w latent pixels; pixels in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AnyFlowFARPipeline,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from fewstep.causal_video.denoise import ChunkNoise
from fewstep.causal_video.model.controls import load_features
from fewstep.causal_video.model.far import far_transformer, wan_of_far
from fewstep.causal_video.model.network import TIME_SCALE, CausalWan
from fewstep.causal_video.settings import CausalSettings, StreamDefaults, load_defaults
from fewstep.causal_video.stream.session import StreamSession
from fewstep.causal_video.stream.state import ChunkOutput, frames_to_images
from fewstep.causal_video.stream.video import PromptEncoder, VideoSession, batched, caption_of, check_pixels
from fewstep.causal_video.stream.world import ActionSpace
from fewstep.causal_video.vae_stream import encode_stream
from fewstep.core.families.wan import STOCK_TEXT_TOKENS, WanFamily
from fewstep.core.grids import shift_of_grid
from fewstep.core.teacher_files import check_pipeline_folder


@dataclass(frozen=True, eq=False)
class VideoOutput:
    """A finished video: latents [B, C, F, h, w] and frames [B, 3, T, H, W] in [0, 1], None without a VAE."""

    latents: Tensor
    frames: Tensor | None

    def images(self, row: int = 0) -> np.ndarray:
        """Frames of one sample as uint8 [T, H, W, 3]. Raises ValueError without frames."""
        if self.frames is None:
            raise ValueError("these are latents alone: make the video with decode=True")
        return frames_to_images(self.frames[row])


class CausalVideoPipeline:
    """Streams of a causal video student.

        pipe = CausalVideoPipeline.from_pretrained("runs/student/export")
        for chunk in pipe.stream("a seven moving left slowly", chunks=20):
            show(chunk.images())

    Args:
        pipeline: a stock Wan pipeline whose transformer is the student; its modules are frozen and in eval mode.
        settings: layout, policy and schedule.
        defaults: size, rate and actions of streams.

    Raises:
        ValueError: the transformer is none that can be causal, or it has another number of conditioning channels than
            `defaults.actions` has names.
    """

    def __init__(self, pipeline: WanPipeline, settings: CausalSettings, defaults: StreamDefaults | None = None) -> None:
        if not isinstance(pipeline, WanPipeline):
            raise ValueError(f"causal video students are Wan pipelines, got {type(pipeline).__name__}")
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        assert pipeline.transformer is not None
        self.stock = pipeline
        self.network = CausalWan(pipeline.transformer)
        self.settings = settings
        self.defaults = StreamDefaults() if defaults is None else defaults
        if self.network.has_two_times != (settings.second_time != "none"):
            raise ValueError(
                f"the settings say second_time {settings.second_time!r}, and the network has "
                f"{2 if self.network.has_two_times else 1} time(s)"
            )
        names = self.defaults.actions
        if names and len(names) != self.network.extra_channels:
            raise ValueError(
                f"the network has {self.network.extra_channels} conditioning channels, and {len(names)} actions are "
                f"named: {list(names)}"
            )
        self._family = WanFamily(int(TIME_SCALE), min(STOCK_TEXT_TOKENS, pipeline.tokenizer.model_max_length))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> CausalVideoPipeline:
        """Load a directory of `save_pretrained` or of an export; safetensors alone.

        Raises:
            ValueError: the directory or a component is missing, or it holds no causal student.
        """
        folder = Path(directory)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no directory: give the folder of an exported causal student")
        settings, defaults = CausalSettings.load(folder), load_defaults(folder)
        absent = check_pipeline_folder(folder)
        pipeline: Any = DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, **dict.fromkeys(absent)
        )
        if not isinstance(pipeline, AnyFlowFARPipeline):
            load_features(pipeline.transformer, folder / "transformer", dtype)
        if isinstance(pipeline, AnyFlowFARPipeline):
            assert pipeline.transformer is not None
            pipeline = wan_pipeline(pipeline, wan_of_far(pipeline.transformer))
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline.to(device), settings, defaults)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the pipeline as safetensors and `causal_video.json` beside it."""
        stored = far_pipeline(self.stock, self.settings) if self.network.has_two_times else self.stock
        stored.save_pretrained(directory, safe_serialization=True)
        self.settings.save(directory, self.defaults)

    def to(self, device: torch.device | str) -> CausalVideoPipeline:
        """Move all modules; returns the pipeline. Sessions that are open do not move."""
        self.stock.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self.network.transformer.device

    @property
    def actions(self) -> ActionSpace | None:
        """The actions that steer it, by name; None for a student of text alone."""
        return ActionSpace(self.defaults.actions) if self.defaults.actions else None

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, N, width] of prompts."""
        return self._encoder.encode(prompts)

    def latent_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of a latent frame; None is the size the student was trained at.

        Raises:
            ValueError: a side that is no multiple of what a patch covers.
        """
        height = self.defaults.height if height is None else height
        width = self.defaults.width if width is None else width
        _, _, high, wide = self._family.video_shape(self.stock, frames=1, height=height, width=width)
        return self.network.transformer.config["out_channels"], high, wide

    def pixel_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(H, W) of a frame in pixels. Raises ValueError as `latent_size`."""
        factor = self.stock.vae.config["scale_factor_spatial"]
        _, high, wide = self.latent_size(height, width)
        return factor * high, factor * wide

    @torch.no_grad()
    def open(
        self,
        prompt: str | Sequence[str],
        *,
        image: Tensor | None = None,
        video: Tensor | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        decode: bool = True,
        settings: CausalSettings | None = None,
    ) -> VideoSession:
        """Open a stream; nothing is generated before it is asked for.

        Args:
            prompt: one, or one per sample of a batch.
            image: first pixel frame [3, H, W] or [B, 3, H, W] in [0, 1].
            video: beginning of the video, [3, T, H, W] or [B, 3, T, H, W]; its chunks are fed, and the stream goes on
                with the next one.
            seed: of the noise, which is a function of (seed, sample, chunk, step).
            height: pixels; None is the size the student was trained at.
            width: the same.
            decode: whether chunks come with pixels.
            settings: another layout, policy or schedule than the student was trained with.

        Raises:
            ValueError: no prompt, both image and video, or sizes and frames that do not fit.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if len(prompts) == 0:
            raise ValueError("there is no prompt: give one, which may be empty")
        if image is not None and video is not None:
            raise ValueError("give an image or a video to begin with, not both")
        size = self.latent_size(height, width)
        latent = None
        if image is not None:
            pixels = batched(image, len(prompts), ndim=3)
            check_pixels(pixels, size, self.stock.vae)
            latent, _ = encode_stream(self.stock.vae, pixels[:, :, None].to(self.device))
        session = StreamSession(
            self.network,
            self.encode(prompts),
            ChunkNoise(seed, tuple(range(len(prompts))), size, stream="stream"),
            self.settings if settings is None else settings,
            vae=self.stock.vae if decode else None,
            image=latent,
            caption=caption_of(prompts),
        )
        opened = VideoSession(session, self._encoder, self.stock.vae, self.actions)
        if video is not None:
            opened.feed(video)
        return opened

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        chunks: int,
        image: Tensor | None = None,
        video: Tensor | None = None,
        seed: int = 0,
        decode: bool = True,
        pipelined: bool = False,
    ) -> Iterator[ChunkOutput]:
        """Open a stream and give its first chunks as they are made; arguments as in `open` and `VideoSession.stream`.

        Raises:
            ValueError: see `open`; the network is steered, which needs `open` and an action per step.
        """
        if self.network.extra_channels > 0:
            raise ValueError("this student is steered by actions: use open(), and session.step(action)")
        session = self.open(prompt, image=image, video=video, seed=seed, decode=decode)
        return session.stream(chunks, pipelined=pipelined)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        chunks: int,
        image: Tensor | None = None,
        video: Tensor | None = None,
        seed: int = 0,
        decode: bool = True,
    ) -> VideoOutput:
        """A video at once: what `stream` gives, put together.

        Raises:
            ValueError: see `stream`, or no chunks.
        """
        if chunks < 1:
            raise ValueError(f"a video has at least 1 chunk, got {chunks}")
        outputs = list(self.stream(prompt, chunks=chunks, image=image, video=video, seed=seed, decode=decode))
        frames = [output.frames for output in outputs if output.frames is not None]
        latents = torch.cat([output.latents for output in outputs], dim=2)
        return VideoOutput(latents, torch.cat(frames, dim=2) if frames else None)

    @property
    def _encoder(self) -> PromptEncoder:
        return PromptEncoder(self.stock, self._family)


def far_pipeline(stock: WanPipeline, settings: CausalSettings, *, shift: float | None = None) -> AnyFlowFARPipeline:
    """The parts of a Wan pipeline around its transformer as diffusers' causal class, which share all but that.

    Its scheduler makes the grid of any number of steps with the shift of the student's, where these are such a grid.
    One step has every shift, and then it is `shift`, or that of a scheduler of this kind before.

    Raises:
        ValueError: the transformer has no counterpart there.
    """
    assert stock.transformer is not None
    longest = max(settings.schedule.times, key=len)
    before = stock.scheduler.config["shift"] if isinstance(stock.scheduler, FlowMapEulerDiscreteScheduler) else None
    single = before if shift is None else shift
    shift = single if len(longest) == 1 else shift_of_grid(longest)
    scale = int(TIME_SCALE)
    made = AnyFlowFARPipeline(
        tokenizer=stock.tokenizer,
        text_encoder=stock.text_encoder,
        transformer=far_transformer(stock.transformer, settings.layout),
        vae=stock.vae,
        scheduler=FlowMapEulerDiscreteScheduler(num_train_timesteps=scale, shift=1.0 if shift is None else shift),
    )
    made.set_progress_bar_config(disable=True)
    return made


def wan_pipeline(far: AnyFlowFARPipeline, transformer: WanTransformer3DModel) -> WanPipeline:
    """The parts of diffusers' causal pipeline as the Wan pipeline that a student is held in."""
    made = WanPipeline(
        tokenizer=far.tokenizer,
        text_encoder=far.text_encoder,
        transformer=transformer,
        vae=far.vae,
        scheduler=far.scheduler,  # pyright: ignore[reportArgumentType]
    )
    assert isinstance(made, WanPipeline)
    return made
