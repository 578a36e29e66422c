"""Better samples by a reward: accelerate launch scripts/train_reward.py --config configs/digits/rtdmd.yaml"""

from __future__ import annotations

import sys

from fewstep.core.config import parse_config
from fewstep.dmd.reward.config import RewardRunConfig


def main() -> None:
    config, _ = parse_config(RewardRunConfig, sys.argv[1:], prog="train_reward.py", description=__doc__ or "")

    from fewstep.core.training.trainer import NonFiniteError
    from fewstep.dmd.reward.train import train_reward
    from fewstep.evaluation.scorers.failure import RewardError

    try:
        code = train_reward(config)
    except (ValueError, NonFiniteError, RewardError) as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
