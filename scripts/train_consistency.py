"""Distil a teacher by consistency: accelerate launch scripts/train_consistency.py --config
configs/digits/scm.yaml"""

from __future__ import annotations

import sys

from fewstep.consistency.config import ConsistencyConfig
from fewstep.core.config import parse_config


def main() -> None:
    config, _ = parse_config(ConsistencyConfig, sys.argv[1:], prog="train_consistency.py", description=__doc__ or "")

    from fewstep.consistency.train import train_consistency
    from fewstep.core.training.trainer import NonFiniteError

    try:
        code = train_consistency(config)
    except (ValueError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
