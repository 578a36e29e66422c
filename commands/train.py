"""The trainings by name: `fewstep train dmd --config sdxl/dmd2_4step_lora`, and what scripts/train_*.py start."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.core.config import parse_config


@dataclass(frozen=True)
class Training:
    """A training: its settings, which are read without torch, and the loop, which is imported when it starts."""

    about: str
    config: Callable[[], type]
    loop: Callable[[], Callable[[Any], int]]


def _dmd() -> type:
    from fewstep.dmd.config import DmdConfig

    return DmdConfig


def _dmd_loop() -> Callable[[Any], int]:
    from fewstep.dmd.train import train_dmd

    return train_dmd


def _consistency() -> type:
    from fewstep.consistency.config import ConsistencyConfig

    return ConsistencyConfig


def _consistency_loop() -> Callable[[Any], int]:
    from fewstep.consistency.train import train_consistency

    return train_consistency


def _causal_video() -> type:
    from fewstep.causal_video.stages.config import CausalConfig

    return CausalConfig


def _causal_video_loop() -> Callable[[Any], int]:
    from fewstep.causal_video.stages.train import train_causal_video

    return train_causal_video


def _reward() -> type:
    from fewstep.dmd.reward.config import RewardRunConfig

    return RewardRunConfig


def _reward_loop() -> Callable[[Any], int]:
    from fewstep.dmd.reward.train import train_reward

    return train_reward


def _causal_reward() -> type:
    from fewstep.causal_video.reward.config import CausalRewardConfig

    return CausalRewardConfig


def _causal_reward_loop() -> Callable[[Any], int]:
    from fewstep.causal_video.reward.train import train_causal_reward

    return train_causal_reward


def _latent_reward() -> type:
    from fewstep.dmd.reward.latent.config import LatentRewardConfig

    return LatentRewardConfig


def _latent_reward_loop() -> Callable[[Any], int]:
    from fewstep.dmd.reward.latent.train import train_latent_reward

    return train_latent_reward


TRAININGS = {
    "dmd": Training("distribution matching: DMD2, SiD, f-distill, with GAN or regression", _dmd, _dmd_loop),
    "consistency": Training("sCM, rCM, dCM, ECT, flow maps, SANA-Sprint, MCM", _consistency, _consistency_loop),
    "causal_video": Training("a stage of a causal video student", _causal_video, _causal_video_loop),
    "reward": Training("a few-step student made better by a reward", _reward, _reward_loop),
    "causal_reward": Training("a causal student by a reward of its streams", _causal_reward, _causal_reward_loop),
    "latent_reward": Training("a model that scores noisy latents", _latent_reward, _latent_reward_loop),
}


def run_training(name: str, *, prog: str, description: str, arguments: Sequence[str] | None = None) -> None:
    """Read the settings, train, and end the process: 0, the code of a run that stopped early, or a message."""
    training = TRAININGS[name]
    given = with_named_config(sys.argv[1:] if arguments is None else arguments)
    config, _ = parse_config(training.config(), given, prog=prog, description=description)
    loop = training.loop()

    from fewstep.core.training.trainer import NonFiniteError
    from fewstep.evaluation.scorers.failure import RewardError

    try:
        code = loop(config)
    except (ValueError, NonFiniteError, RewardError) as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


def with_named_config(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--config NAME` in place of a file read from the configurations that are installed.

    A file of that path comes first. Ends the process for a name that is neither, with the nearest ones.
    """
    found, follows = [], False
    for argument in arguments:
        option, separator, value = argument.partition("=")
        if follows:
            found.append(_config_file(argument))
        elif option == "--config" and separator:
            found.append(f"--config={_config_file(value)}")
        else:
            found.append(argument)
        follows = argument == "--config"
    return found


def _config_file(name: str) -> str:
    if Path(name).exists() or name.endswith((".yaml", ".yml")):
        return name
    known = config_names()
    if name in known:
        return str(known[name])
    near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3)) or "fewstep configs lists them"
    sys.exit(f"error: --config {name} is no file, and no configuration of that name is installed; near: {near}")


def config_names() -> dict[str, Path]:
    """The configurations that are installed, such as digits/dmd_1step, and their files."""
    # Beside this package, in the repository as in a wheel.
    root = Path(__file__).resolve().parent.parent / "configs"
    found = sorted(path for path in root.rglob("*.yaml") if path.parent.name != "accelerate")
    return {str(path.relative_to(root).with_suffix("")): path for path in found}
