"""The one table of reward methods: from the section of a configuration to the object that does what it asks."""

from __future__ import annotations

from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.methods.crd import Crd
from fewstep.dmd.reward.methods.euphonium import Euphonium
from fewstep.dmd.reward.methods.flash import Flash
from fewstep.dmd.reward.methods.flow_grpo import FlowGrpo
from fewstep.dmd.reward.methods.gndm import Gndm
from fewstep.dmd.reward.methods.nft import Nft
from fewstep.dmd.reward.methods.redmd import Redmd
from fewstep.dmd.reward.methods.rtdmd import Rtdmd
from fewstep.dmd.reward.sections import (
    CrdConfig,
    EuphoniumConfig,
    FlashConfig,
    FlowGrpoConfig,
    GndmConfig,
    MethodConfig,
    NftConfig,
    RedmdConfig,
    RtdmdConfig,
)
from fewstep.dmd.reward.setup import Needs, RewardSetup
from fewstep.dmd.reward.student_step import RewardMethod

METHODS: dict[type[MethodConfig], type[RewardMethod]] = {
    RtdmdConfig: Rtdmd,
    GndmConfig: Gndm,
    RedmdConfig: Redmd,
    NftConfig: Nft,
    CrdConfig: Crd,
    FlashConfig: Flash,
    EuphoniumConfig: Euphonium,
    FlowGrpoConfig: FlowGrpo,
}


def needs_of(config: RewardRunConfig) -> Needs:
    """What the run's method asks of the setup."""
    return METHODS[type(config.section)].needs(config)


def build_method(config: RewardRunConfig, setup: RewardSetup) -> RewardMethod:
    """The run's method, on parts that `needs_of` asked for. Raises ValueError when they do not fit."""
    return METHODS[type(config.section)](config, setup)
