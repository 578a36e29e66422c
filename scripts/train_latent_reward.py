"""A model that scores noisy latents: train_latent_reward.py --config configs/digits/latent_reward.yaml"""

from __future__ import annotations

import sys

from fewstep.core.config import parse_config
from fewstep.dmd.reward.latent.config import LatentRewardConfig


def main() -> None:
    config, _ = parse_config(LatentRewardConfig, sys.argv[1:], prog="train_latent_reward.py", description=__doc__ or "")

    from fewstep.core.training.trainer import NonFiniteError
    from fewstep.dmd.reward.latent.train import train_latent_reward

    try:
        code = train_latent_reward(config)
    except (ValueError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
