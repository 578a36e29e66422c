"""What the training stages of a causal student share: a batch of videos, the calls on it, times per chunk.

Legend: B batch, C channels, F latent frames, N text tokens; videos [B, C, F, h, w]; t [B] or [B, F].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model import masks
from fewstep.causal_video.model.calls import CallOutput, condition_first_frame, packed_call, per_frame, whole_call
from fewstep.causal_video.model.controls import controls_of
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stages.sections import CausalStudentConfig, FrameReduction
from fewstep.consistency.sample_loss import ConsistencyLoss
from fewstep.core.condition import Condition
from fewstep.core.data import rows_of_samples
from fewstep.core.denoiser import Denoiser, guided_velocity
from fewstep.core.paths import add_noise
from fewstep.core.randomness import Draw, sample_uniform, shared_integer
from fewstep.kernels.mask import AttentionMask

# Of the integers that decide whether a step gives the first frame.
IMAGE_PARTS = 10**6
# Of the prompts before a change.
EARLIER_SEED = 5


def causal_settings(student: CausalStudentConfig) -> CausalSettings:
    """Layout, policy and schedule of a configuration. Raises ValueError for times that are no grids."""
    if student.times is not None:
        try:
            schedule = StepSchedule(student.times)
        except ValueError as error:
            raise ValueError(f"student.times: {error}") from error
    else:
        schedule = StepSchedule.steps(student.steps, shift=student.shift)
    return CausalSettings(ChunkLayout(student.layout), student.policy, schedule, student.second_time)


@dataclass(frozen=True, eq=False)
class VideoBatch:
    """Videos of one slice, and what they are noised with.

    Attributes:
        x0: clean [B, C, F, h, w].
        eps: noise like x0.
        condition: their captions, with controls where the network takes some (`controls.with_controls`).
        context: what the clean half of a packed call shows, x0 or x0 noised.
        context_time: [B] or [B, F] time of it, or None for 0.
        image: [B, C, 1, h, w] where the first frame is given, or None.
        step: of the run.
        teacher_sees_clean: the context is the student's alone.
    """

    x0: Tensor
    eps: Tensor
    condition: Condition
    context: Tensor
    context_time: Tensor | None
    image: Tensor | None
    step: int
    teacher_sees_clean: bool = False

    @property
    def on_clean(self) -> VideoBatch:
        """The same on clean context, as the causal teacher sees it under official noisy context; see `context`."""
        return replace(self, context=self.x0, context_time=None) if self.teacher_sees_clean else self

    def index(self, rows: Tensor) -> VideoBatch:
        """These samples of it, by their numbers."""
        time, image = self.context_time, self.image
        return replace(
            self,
            x0=self.x0[rows],
            eps=self.eps[rows],
            condition=self.condition.index(rows),
            context=self.context[rows],
            context_time=None if time is None else time[rows],
            image=None if image is None else image[rows],
        )

    @property
    def frame_counts(self) -> Tensor:
        """bool [B, F]: the frames a loss is about, all but a given one."""
        counts = torch.ones(self.x0.shape[0], self.x0.shape[2], dtype=torch.bool, device=self.x0.device)
        if self.image is not None:
            counts[:, 0] = False
        return counts


class PackedNetwork(nn.Module):
    """A causal network on one batch's clean context, called like a `Denoiser`: (x, t, condition) of the noisy half.

    So `guided_velocity` and `total_derivative` take it. A given first frame is put in its place, a constant whose
    tangent is zero, and so is the average velocity of it. A doubled batch sees the context twice. Controls of the
    condition are shown beside both halves.

    Args:
        network: a `CausalWan` or its wrapper.
        batch: gives context and image.
        mask: `masks.teacher_forcing` of its layout.
    """

    def __init__(self, network: nn.Module, batch: VideoBatch, mask: AttentionMask) -> None:
        super().__init__()
        self.network, self.batch, self.mask = network, batch, mask

    def forward(self, x: Tensor, t: Tensor, condition: Condition, r: Tensor | None = None) -> Tensor:
        """Velocity [B, C, F, h, w] at t [B] or [B, F]; of a network of two times the average from t down to r [B]."""
        copies = len(x) // len(self.batch.x0)
        context, image, time = (
            None if a is None else torch.cat([a] * copies)
            for a in (self.batch.context, self.batch.image, self.batch.context_time)
        )
        assert context is not None
        if r is not None and image is not None:
            r = torch.cat([torch.zeros_like(r[:, None]), per_frame(r, x.shape[2])[:, 1:]], dim=1)
        x, t = condition_first_frame(x, t, image)
        extra = controls_of(condition, x.shape[2])
        call = packed_call(context, x, t, condition.text, mask=self.mask, clean_time=time, extra=extra, r=r)
        output = self.network(call)
        assert isinstance(output, CallOutput)
        if image is None:
            return output.velocity
        return torch.cat([torch.zeros_like(output.velocity[:, :, :1]), output.velocity[:, :, 1:]], dim=2)


@dataclass(frozen=True, eq=False)
class CausalTeacher:
    """A frozen causal network with guidance u + w (c - u), in the packed call of the student.

    Attributes:
        network: without gradients.
        null_condition: the unconditional side, batch 1.
        guidance: w; 1 is none.
        control_guidance: of the controls beside it, see `guided_velocity`.
    """

    network: CausalWan
    null_condition: Condition
    guidance: float
    control_guidance: float | None = None

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, batch: VideoBatch, mask: AttentionMask) -> Tensor:
        """Guided velocity [B, C, F, h, w] of the noisy half at t [B]."""
        packed = PackedNetwork(self.network, batch, mask)
        scales = {"guidance": self.guidance, "control_guidance": self.control_guidance}
        return guided_velocity(packed, x, t, batch.condition, self.null_condition, **scales)


class CausalDenoiser(Denoiser):
    """A Wan's denoiser that sees a video as its student does (LongLive 2); its weights have the names of a plain one.

    Args:
        denoiser: whose network it calls; adapters of it count.
        layout: chunks of the videos.
        policy: window and sinks of the student's cache.

    Raises:
        ValueError: the network is no Wan that a causal student could be.
    """

    def __init__(self, denoiser: Denoiser, layout: ChunkLayout, policy: CachePolicy) -> None:
        nn.Module.__init__(self)
        self.network, self.family = denoiser.network, denoiser.family
        # In a tuple, so that the network is registered once.
        self.causal = (CausalWan(self.network),)  # pyright: ignore[reportArgumentType]
        self.layout, self.policy = layout, policy
        self.masks: dict[tuple[int, str], AttentionMask] = {}

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, r: Tensor | None = None) -> Tensor:
        """velocity = eps - x0, [B, C, F, h, w], of all frames at one time.

        Raises:
            ValueError: the video has other frames than the layout, or a second time is given.
        """
        if x_t.shape[2] != self.layout.frames or r is not None:
            raise ValueError(f"causal scores judge {self.layout.frames} frames at one time, got {x_t.shape[2]}, r {r}")
        (causal,) = self.causal
        key = causal.tokens_per_frame(x_t), str(x_t.device)
        if key not in self.masks:
            self.masks[key] = masks.block_causal(self.layout, key[0], self.policy, device=x_t.device)
        output = causal(whole_call(x_t, t, condition.text, mask=self.masks[key]))
        assert isinstance(output, CallOutput)
        return output.velocity


@dataclass(frozen=True, eq=False)
class ForcingNetworks:
    """The student bare and wrapped, the masks of its calls, and the frozen causal teacher of the stages that have one.

    Forward mode does not pass through the hooks of a distributed wrapper: `student` is called for what has no gradient,
    `wrapped` for what has one. `average` is the student with its averaged weights, where a stage needs it.
    """

    student: nn.Module
    wrapped: nn.Module
    layout: ChunkLayout
    packed: AttentionMask
    causal: AttentionMask
    teacher: CausalTeacher | None = None
    average: nn.Module | None = None

    def on_context(self, batch: VideoBatch, *, bare: bool = False) -> PackedNetwork:
        """The student on a batch's clean context, wrapped for gradients unless `bare`."""
        return PackedNetwork(self.student if bare else self.wrapped, batch, self.packed)

    def causal_velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The wrapped student's velocity under the block-causal mask, with graph."""
        extra = controls_of(condition, x.shape[2])
        output = self.wrapped(whole_call(x, t, condition.text, mask=self.causal, extra=extra))
        assert isinstance(output, CallOutput)
        return output.velocity


@dataclass(frozen=True, eq=False)
class ForcingStep:
    """The student's loss on given videos, and what to log of it; 0-dim tensors without graph."""

    loss: Tensor
    record: dict[str, Tensor]


def frame_factor(batch: VideoBatch, frames: FrameReduction) -> float:
    """What makes the configured reduction of a mean over frames."""
    return float(batch.x0.shape[2]) if frames == "sum" else 1.0


def isolated(found: ConsistencyLoss) -> dict[str, Tensor]:
    """How many samples were not finite."""
    return {"isolated_samples": found.isolated_count.float()}


def chunk_uniform(draw: Draw, layout: ChunkLayout, stream: str) -> Tensor:
    """A uniform number per sample and chunk, [B, chunks]."""
    return sample_uniform(draw.seed, draw.indices, (layout.chunks,), stream=stream, device=draw.device)


def over_frames(values: Tensor, layout: ChunkLayout) -> Tensor:
    """Values per chunk [B, chunks] as values per frame [B, F]."""
    return values.repeat_interleave(torch.tensor(layout.lengths, device=values.device), dim=1)


def gives_image(share: float, seed: int, step: int) -> bool:
    """Whether a step's samples have their first frame given: a share of the steps, the same in every process."""
    return shared_integer(seed, step, "image", IMAGE_PARTS) < share * IMAGE_PARTS


def earlier_rows(prompts: Sequence[str], samples: Sequence[int], seed: int) -> list[int]:
    """Rows of prompts that samples begin with before a change: random ones, of other texts than they go on with."""
    count, rows = len(prompts), []
    later = rows_of_samples(samples, count, seed)
    for row, judged in zip(rows_of_samples(samples, count, seed + EARLIER_SEED), later, strict=True):
        rows.append(next(n % count for n in range(row, row + count) if prompts[n % count] != prompts[judged]))
    return rows


def noisy_context(x0: Tensor, draw: Draw, settings: CausalSettings) -> tuple[Tensor, Tensor]:
    """The clean half of a packed call as the policy's noisy context is: chunks from `noisy_from` on noised to the last
    time of their schedule; and these times [B, F], 0 for chunks before (Causal-rCM, arXiv:2606.25473)."""
    times = [
        settings.schedule.of(chunk)[-1] if settings.policy.is_noisy(chunk) else 0.0
        for chunk in range(settings.layout.chunks)
    ]
    t = over_frames(torch.tensor([times], device=x0.device, dtype=torch.float32), settings.layout).expand(len(x0), -1)
    return add_noise(x0, draw.noise(tuple(x0.shape[1:]), "context_noise"), t), t


def context_of_batch(x0: Tensor, draw: Draw, largest: float) -> tuple[Tensor, Tensor | None]:
    """The clean half of a packed call, noised to a uniform time up to `largest`, and that time [B] (None for 0)."""
    if largest == 0:
        return x0, None
    t = largest * draw.uniform("context_time")
    return add_noise(x0, draw.noise(tuple(x0.shape[1:]), "context_noise"), t), t
