"""Make a causal video student better by a reward: accelerate launch scripts/train_causal_reward.py --config
configs/digits_video/astrolabe.yaml"""

from __future__ import annotations

import sys

from fewstep.causal_video.reward.config import CausalRewardConfig
from fewstep.core.config import parse_config


def main() -> None:
    config, _ = parse_config(CausalRewardConfig, sys.argv[1:], prog="train_causal_reward.py", description=__doc__ or "")

    from fewstep.causal_video.reward.train import train_causal_reward
    from fewstep.core.training.trainer import NonFiniteError
    from fewstep.evaluation.scorers.failure import RewardError

    try:
        code = train_causal_reward(config)
    except (ValueError, NonFiniteError, RewardError) as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
