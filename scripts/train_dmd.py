"""Distil a teacher by DMD: accelerate launch scripts/train_dmd.py --config configs/digits/dmd_1step.yaml"""

from __future__ import annotations

import sys

from fewstep.core.config import parse_config
from fewstep.dmd.config import DmdConfig


def main() -> None:
    config, _ = parse_config(DmdConfig, sys.argv[1:], prog="train_dmd.py", description=__doc__ or "")

    from fewstep.core.training.trainer import NonFiniteError
    from fewstep.dmd.train import train_dmd
    from fewstep.evaluation.scorers.failure import RewardError

    try:
        code = train_dmd(config)
    except (ValueError, NonFiniteError, RewardError) as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
