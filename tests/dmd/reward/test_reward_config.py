"""Settings of reward runs: the files in configs/digits, and combinations that cannot work."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from fewstep.core.config import load_config, save_resolved
from fewstep.dmd.reward.config import PixelGanConfig, RewardMethod, RewardRunConfig, RewardSettings, ScorerConfig
from tests.dmd.reward.reward_run import METHODS, OPTIMIZER, reward_config
from tests.dmd.tiny_run import TinyInputs

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "dmd"


def test_every_method_has_a_configuration_and_a_tiny_run() -> None:
    assert set(METHODS) == set(get_args(RewardMethod))
    assert len(METHODS) == 8
    assert {path.stem for path in CONFIGS.glob("digits_*.yaml")} >= {f"digits_{method}" for method in METHODS}


@pytest.mark.parametrize("name", [*METHODS, "flash_gan"])
def test_configurations_read_back_equal(name: str, tmp_path: Path) -> None:
    path, method = CONFIGS / f"digits_{name}.yaml", "flash" if name == "flash_gan" else name
    config, plain = load_config(RewardRunConfig, ["--config", str(path)], prog="train_reward.py", description="")
    assert config.method == method
    assert config.reward.scorers[0] == ScorerConfig(
        name="digit_log_probability", weights="assets/digits_image/classifier"
    )
    assert [entry.name for entry in config.reward.held_out] == ["held_out_log_probability", "stroke_weight"]
    # Training never follows a held-out scorer.
    assert {entry.name for entry in config.reward.scorers}.isdisjoint(entry.name for entry in config.reward.held_out)
    assert config.student.steps == 2
    assert plain["method"] == method
    save_resolved(tmp_path / "resolved.yaml", config)
    again, _ = load_config(
        RewardRunConfig, ["--config", str(tmp_path / "resolved.yaml")], prog="train_reward.py", description=""
    )
    assert again == config
    assert (
        yaml.safe_load((tmp_path / "resolved.yaml").read_text(encoding="utf-8"))["reward"]["scorers"][0]["std"] == 1.0
    )


GAN = PixelGanConfig(weight=0.1, backbone="folder", optimizer=OPTIMIZER)
MISTAKES: dict[str, tuple[RewardMethod, dict[str, Any], str]] = {
    "no start": ("nft", {"student.init": None}, "student.init is empty"),
    "flow map": ("nft", {"student.sampler": "flow_map"}, "flow_map' is not trained by a reward here"),
    "adapters": ("nft", {"student.lora_rank": 2}, "lora_rank must be 0: adapters are saved alone"),
    "GAN": ("redmd", {"loss.gan_weight": 0.1}, "gan_weight and regression_weight 0"),
    "times": ("redmd", {"loss.t_min": 0.99}, "must satisfy 0 < t_min < t_max < 1"),
    "negative": ("nft", {"objective.policy_weight": -1.0}, "objective.policy_weight is -1.0"),
    "group": ("nft", {"reward.group_size": 3}, "group_size 3 does not divide run.batch_size 8 cut into 1 slices"),
    "slices": ("nft", {"run.gradient_accumulation": 4}, "group_size 4 does not divide run.batch_size 8 cut into 4"),
    "direct": ("nft", {"objective.direct_weight": 1.0}, "direct_weight belongs to rtdmd and gndm, not to nft"),
    "ambient": ("gndm", {"objective.matching": "ambient"}, "gndm has its own form of matching on x0"),
    "cold": ("nft", {"objective.cold_start_steps": 3}, "needs objective.matching_weight > 0"),
    "unmatched": ("flash", {"objective.matching_weight": 0.0}, "flash is distribution matching with a reward"),
    "one step": ("flow_grpo", {"student.steps": 1}, "student.steps must be at least 2"),
    "ode": ("flow_grpo", {"student.sampler": "ode"}, "the steps of student.sampler 'ode' are not random"),
    "sde": ("euphonium", {"chain.transition": "flow_sde"}, "explores around the ODE"),
    "steps": ("rtdmd", {"chain.trained_steps": 2}, "2 steps have 1 random ones"),
    "no GAN": ("flash", {"objective.matching_steps": "early"}, "leaves late steps to the pixel GAN"),
    "other GAN": ("redmd", {"pixel_gan": GAN}, "pixel_gan belongs to flash, not to redmd"),
    "no pictures": ("flash", {"pixel_gan": GAN}, "needs real pictures; set data.latents"),
    "no model": ("flash", {"preference.judge": "latent"}, "preference.judge is 'latent' and .* None"),
    "no judge": ("euphonium", {"process.latent_reward": "x"}, "process.judge is 'decoded' and .* 'x'"),
    "noise": (
        "euphonium",
        {"process.judge": "latent", "process.latent_reward": "x"},
        "at t = 1 there is none: set process.highest_time below 1",
    ),
    "distillation": ("euphonium", {"process.distill_weight": -1.0}, "process.distill_weight is -1.0"),
    "updates": ("nft", {"objective.updates_per_rollout": 0}, "must be at least 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_settings_that_cannot_work_are_refused(inputs: TinyInputs, tmp_path: Path, name: str) -> None:
    method, changes, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        reward_config(inputs, tmp_path, tmp_path, method, changes)


def test_scorers_are_checked() -> None:
    with pytest.raises(ValueError, match="std is 0; it must be above 0"):
        ScorerConfig(name="slant", std=0)
    with pytest.raises(ValueError, match=r"reward\.scorers is empty"):
        RewardSettings(scorers=())
    with pytest.raises(ValueError, match="group_size is 1; a comparison needs at least 2"):
        RewardSettings(scorers=(ScorerConfig(name="slant"),), group_size=1)
    from_mapping = RewardSettings(scorers=({"name": "slant", "weight": 2.0},))  # pyright: ignore[reportArgumentType]
    assert from_mapping.scorers == (ScorerConfig(name="slant", weight=2.0),)
    assert dataclasses.is_dataclass(from_mapping.scorers[0])
