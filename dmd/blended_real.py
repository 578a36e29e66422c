"""The real score with a share of the fake score's adapters in it, which falls to none (DMDR, arXiv:2511.13649).

Far from the teacher, the two scores disagree about most of a sample; a real score that has moved some of the way
towards the fake one gives a shorter, more reliable direction. The paper calls it dynamic distribution guidance.
"""

from __future__ import annotations

import math
from typing import Any

from fewstep.core.denoiser import Denoiser
from fewstep.core.fake_score import FakeScore
from fewstep.core.networks.lora import ADAPTER, lora_layers
from fewstep.core.networks.shared import frozen_twin
from fewstep.core.teacher import Teacher
from fewstep.dmd.config import BlendedRealConfig


def share_at(settings: BlendedRealConfig, updates: int) -> float:
    """share (1 + cos(pi updates / steps)) / 2, 0 from `steps` updates of the student on."""
    if updates >= settings.steps:
        return 0.0
    return settings.share * 0.5 * (1.0 + math.cos(math.pi * updates / settings.steps))


class BlendedReal:
    """The teacher with the fake score's live adapters on the same base, at a share of their scale.

    The adapters are the fake score's own tensors and take no gradient here; the modules are others, so that their scale
    is no state of the fake score's.

    Raises:
        ValueError: the fake score has no adapters.
    """

    def __init__(self, teacher: Teacher, fake_score: FakeScore, settings: BlendedRealConfig) -> None:
        network = frozen_twin(fake_score.denoiser.network)
        self.layers: list[Any] = [network.get_submodule(name) for name in lora_layers(network)]
        if not self.layers:
            raise ValueError("blended_real needs adapters of the fake score: set fake_score.lora_rank")
        self.plain, self.settings = teacher, settings
        self.blended = teacher.with_denoiser(Denoiser(network, teacher.family))
        self.scales = [layer.scaling[ADAPTER] for layer in self.layers]

    def teacher(self, updates: int) -> Teacher:
        """The real score after so many updates of the student."""
        share = share_at(self.settings, updates)
        if share == 0:
            return self.plain
        for layer, scale in zip(self.layers, self.scales, strict=True):
            layer.scaling[ADAPTER] = share * scale
        return self.blended
