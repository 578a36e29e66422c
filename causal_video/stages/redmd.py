"""Re-DMD in self-forcing: a rollout's matching weighs exp(tilt_scale reward) (Reward Forcing, arXiv:2512.04678), and
with `saliency` each place of it by how strongly it moves the rewards (Stream-R1, arXiv:2605.03849).

The weight multiplies a direction that vanishes where the fake score equals the teacher: it says which rollouts are
learnt from first, and what a student of small capacity gives up, and does not tilt what a student of full capacity
comes to rest at. With Adam a constant reward changes nothing.

Deviations from its released code, which follow the paper: every video of a slice is scored, not the first alone; a
scorer sees pixels in [0, 1], where the code gives it those in [-1, 1]; an optimizer steps once for a gradient. Of
Stream-R1 its penalty for rewards that drift apart is left out: it is one number for all rollouts of a step.

Legend: B rollouts, T latent frames; latents [B, C, T, h, w].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.causal_video.stages.sections import RedmdConfig
from fewstep.causal_video.stages.setup import JudgedRollouts
from fewstep.core.teacher import Teacher
from fewstep.core.training.processes import Processes
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.matching import SampleWeights
from fewstep.dmd.reward.config import RewardSettings
from fewstep.dmd.reward.inputs import finite_values
from fewstep.dmd.reward.methods.redmd import latent_saliency, space_time_weight
from fewstep.dmd.reward.scorers import load_scorers
from fewstep.dmd.reward.scores import RewardModel
from fewstep.evaluation.scorers.failure import agree
from fewstep.evaluation.scorers.scorer import Scorer, require_prompts


def reward_weight(rewards: Tensor, *, tilt_scale: float, max_weight: float | None = None) -> Tensor:
    """exp(tilt_scale r), at most max_weight: [B] without graph (the paper's exp(r / beta) with beta 1 / tilt_scale).

    The mean is not divided out, as in the paper: weights change the size of a run's gradients, which Adam takes out
    again and a clip does not.

    Raises:
        ValueError: a reward is not finite, or weighs more than a million: it is no z-score.
    """
    weight = (tilt_scale * finite_values(rewards.detach(), "rewards")).exp()
    if max_weight is not None:
        return weight.clamp(max=max_weight)
    if bool((weight > LARGEST_WEIGHT).any()):
        raise ValueError(
            f"a reward of {float(rewards.max()):.4g} weighs exp({tilt_scale} x {float(rewards.max()):.4g}): give the "
            "scorer mean and std, so that rewards are about 0 and 1 apart, or redmd.max_weight"
        )
    return weight


LARGEST_WEIGHT = 1e6


def window_saliency_weight(maps: Tensor, rewards: Tensor, counts: Tensor, size: Sequence[int]) -> Tensor:
    """Stream-R1's weights [B, 1, F, h, w] of a window: mean one over its frames that learn, and ones on the others.

    Args:
        maps: [R, B, T, H, W] of pixels, see `RewardModel.sensitivity`.
        rewards: [R, B], the axes; a weak one counts more.
        counts: bool [F], the frames that learn.
        size: (h, w).
    """
    saliency = latent_saliency(maps, len(counts), size).transpose(0, 1)
    weight = torch.ones_like(saliency[:, :1])
    weight[:, :, counts] = space_time_weight(saliency[:, :, counts], rewards.T).to(weight)
    return weight


class RolloutReward:
    """The scorers of a run, on the pixels of what the teacher judges.

    Args:
        settings: which scorers, and how they weigh.
        trainer: of the run.
        prompts: all that a rollout may be asked for.
        scorers: take the place of those that the settings name.

    Raises:
        ValueError: a scorer is unknown, its weights are missing, or it does not know a prompt.
    """

    def __init__(
        self,
        settings: RedmdConfig,
        trainer: Trainer,
        prompts: Sequence[str],
        scorers: Sequence[Scorer] | None = None,
    ) -> None:
        loaded = load_scorers(settings.scorers, device=trainer.device, videos=True) if scorers is None else scorers
        require_prompts(loaded, prompts)
        rewards = RewardSettings(scorers=settings.scorers, group_size=1, chunk=settings.chunk, overlap=False)
        self.model = RewardModel(loaded, rewards, gradient=settings.saliency, videos=True)
        self.settings, self.trainer = settings, trainer
        self.processes = Processes(trainer.rank, trainer.world_size)

    @torch.no_grad()
    def weigh(self, teacher: Teacher, latents: Tensor, counts: Tensor, prompts: list[str]) -> JudgedRollouts:
        """Weights of rollouts by what the teacher sees of them, with the reward and what they are to log.

        `latents` [B, C, F, h, w] are its window without a graph, `counts` bool [F] the frames that learn. Raises
        RewardError, on every process, when a scorer fails on any.
        """
        failure, elements = None, None
        total, weight = latents.new_zeros(len(latents)), latents.new_ones(len(latents))
        try:
            pixels = teacher.decode(latents)
            if self.settings.saliency:
                values, maps = self.model.sensitivity(pixels, prompts)
                elements = window_saliency_weight(maps, values, counts, latents.shape[-2:]).to(latents.device)
            else:
                values = self.model.normalised(self.model.submit(pixels, prompts)())
            total = self.model.total(values).to(latents.device)
            weight = reward_weight(total, tilt_scale=self.settings.tilt_scale, max_weight=self.settings.max_weight)
        except Exception as error:  # Scorers are the user's code: anything can come.
            failure = error
        agree(failure, self.processes, step=self.trainer.step)
        record = {"reward": total.mean(), "reward_weight": weight.mean(), "reward_weight_largest": weight.max()}
        if elements is not None:
            # What Stream-R1's floors leave between the frames: 1 is no difference.
            record["reward_frame_weight_largest"] = elements.mean(dim=(3, 4)).amax()
        return JudgedRollouts(SampleWeights(weight, elements), record)
