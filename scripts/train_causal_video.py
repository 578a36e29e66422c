"""Train a stage of a causal video student: accelerate launch scripts/train_causal_video.py --config
configs/digits_video/teacher_forcing.yaml"""

from __future__ import annotations

import sys

from fewstep.causal_video.stages.config import CausalConfig
from fewstep.core.config import parse_config


def main() -> None:
    config, _ = parse_config(CausalConfig, sys.argv[1:], prog="train_causal_video.py", description=__doc__ or "")

    from fewstep.causal_video.stages.train import train_causal_video
    from fewstep.core.training.trainer import NonFiniteError
    from fewstep.evaluation.scorers.failure import RewardError

    try:
        code = train_causal_video(config)
    except (ValueError, NonFiniteError, RewardError) as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
