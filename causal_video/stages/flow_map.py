"""Flow maps on clean context: networks u(x_t, t, r) that jump from any time to any later one, chunk by chunk.

The losses are those of pictures, MeanFlow's and AnyFlow's (`consistency.methods`); what is here is how they call a
causal student: every chunk in one packed call on the clean chunks before it, all chunks of a sample from one t to one r
(TF-MeanFlow of Causal-rCM, arXiv:2606.25473; AnyFlow-FAR, arXiv:2605.13724). The context is told its own time for both.

    tf_meanflow   u = v - (t - r) du/dt, weighed by (error + c)^-p
    tf_anyflow    the same target; samples with r < t are brought to the size of those with r = t

v is the guided velocity of the causal teacher that the stage starts from, or that of the data. AnyFlow-FAR shows old
chunks in patches of a quarter of the tokens, and makes a part of its batches bidirectional: both are left out here.

Legend: B batch, C channels, F latent frames; videos [B, C, F, h, w]; t, r [B], r <= t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.causal_video.stages.batch import ForcingNetworks, ForcingStep, VideoBatch
from fewstep.causal_video.stages.config import CausalConfig, FlowMapStage
from fewstep.causal_video.stages.consistency import teacher_velocity
from fewstep.causal_video.stages.sections import TfAnyflowConfig, TfMeanflowConfig
from fewstep.consistency.batch import DataBatch, Networks
from fewstep.consistency.methods.anyflow import anyflow_step
from fewstep.consistency.methods.flow_map import draw_pair
from fewstep.consistency.methods.meanflow import meanflow_step
from fewstep.consistency.sections import require_unset
from fewstep.core.condition import Condition
from fewstep.core.randomness import Draw
from fewstep.core.teacher import Teacher

# Of three samples in a row one has r = t (`consistency.times.anyflow_times`).
LEAST_SLICE = 3


@dataclass(frozen=True, kw_only=True)
class ContextNetworks(Networks):
    """A causal student and its causal teacher on one batch's clean context, as the losses of flow maps call them."""

    batch: VideoBatch
    forcing: ForcingNetworks

    def student_on(self, rows: Tensor) -> nn.Module:
        """The bare student on the context of these samples alone."""
        return self.forcing.on_context(self.batch.index(rows), bare=True)

    @torch.no_grad()
    def teacher_velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The causal teacher's guided velocity under the captions of the batch, which are those of `condition`."""
        return teacher_velocity(self.forcing, x_t, t, self.batch)


def check_flow_map(config: CausalConfig) -> None:
    """Raise ValueError for guidance that the velocity of the data has not, and for slices without a sample of r = t."""
    stage, guidance, run = config.stage, config.teacher.guidance, config.run
    if not isinstance(stage, FlowMapStage):
        return
    if stage.velocity == "data" and guidance <= 0:
        raise ValueError(f"teacher.guidance is {guidance} with {config.method}.velocity 'data': it must be above 0")
    if stage.velocity == "data" and guidance == 1:
        require_unset(stage, stage.DATA_GUIDANCE, "velocity 'data' with a teacher.guidance other than 1")
    slices = run.batch_size // run.gradient_accumulation
    if isinstance(stage, TfAnyflowConfig) and slices < LEAST_SLICE:
        raise ValueError(
            f"tf_anyflow with slices of {slices} samples (run.batch_size / gradient_accumulation): at least "
            f"{LEAST_SLICE} have one with r = t, whose error sets the scale of the others"
        )


def tf_flow_map_step(
    batch: VideoBatch,
    networks: ForcingNetworks,
    *,
    draw: Draw,
    stage: FlowMapStage,
    teacher: Teacher,
    guidance: float,
    mean_over_processes: Callable[[Tensor], Tensor] = Tensor.detach,
) -> ForcingStep:
    """The loss of tf_meanflow or tf_anyflow on one slice.

    A given first frame stands still: its noise is the frame itself, and its velocity is zero everywhere.

    Args:
        batch: videos and their context.
        networks: student and causal teacher.
        draw: of times, and of captions that are dropped where the velocity of the data is guided.
        stage: settings.
        teacher: says the unconditional side.
        guidance: w, where the velocity of the data is guided by the student's own outputs.
        mean_over_processes: averages a tensor over the run's processes.

    Raises:
        ValueError: no sample of the run's batch has r = t, in tf_anyflow.
    """
    eps = torch.where(batch.frame_counts[:, None, :, None, None], batch.eps, batch.x0)
    data = DataBatch(batch.x0, eps, batch.condition, draw, batch.step)
    context = ContextNetworks(
        student=networks.on_context(batch, bare=True),
        wrapped=networks.on_context(batch),
        teacher=teacher,
        guidance=guidance,
        batch=batch,
        forcing=networks,
    )
    pair = draw_pair(data, stage)
    if isinstance(stage, TfMeanflowConfig):
        found = meanflow_step(data, pair, context, stage)
    else:
        found = anyflow_step(data, pair, context, stage, mean_over_processes=mean_over_processes)
    return ForcingStep(found.loss, found.record)
