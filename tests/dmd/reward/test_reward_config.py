"""Settings of reward runs: the files in configs/digits, and combinations that cannot work."""

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from fewstep.core.config import ConfigError, load_config, save_resolved
from fewstep.core.run_settings import RunSettings
from fewstep.dmd.reward import sections
from fewstep.dmd.reward.config import AmbientConfig, RewardMatchingConfig, RewardRunConfig, RewardSettings, ScorerConfig
from fewstep.dmd.reward.methods.table import METHODS as TABLE
from fewstep.dmd.reward.sections import RedmdConfig, TransitionConfig
from tests.dmd.reward.reward_run import MATCHED, METHODS, reward_config, with_pixel_gan
from tests.dmd.tiny_run import TinyInputs

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs" / "digits"
SECTIONS = {name: type(METHODS[name][name]) for name in METHODS}
FILES = {**{method: method for method in METHODS}, "flash_gan": "flash"}


def load(name: str, *overrides: str) -> RewardRunConfig:
    path = str(CONFIGS / f"{name}.yaml")
    return load_config(RewardRunConfig, ["--config", path, *overrides], prog="train_reward.py", description="")[0]


def test_every_method_has_a_section_a_configuration_and_a_tiny_run() -> None:
    assert len(METHODS) == 8
    assert set(METHODS) == set(RewardRunConfig.METHODS)
    assert {type(load(name).section) for name in METHODS} == set(TABLE)
    assert len(TABLE) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_configurations_read_back_equal(name: str, tmp_path: Path) -> None:
    config = load(name)
    assert config.method == FILES[name]
    assert config.reward.scorers[0] == ScorerConfig(
        name="digit_log_probability", weights="assets/digits_image/classifier"
    )
    assert [entry.name for entry in config.reward.held_out] == ["held_out_log_probability", "stroke_weight"]
    # Training never follows a held-out scorer.
    assert {entry.name for entry in config.reward.scorers}.isdisjoint(entry.name for entry in config.reward.held_out)
    assert config.student.steps == 2
    save_resolved(tmp_path / "resolved.yaml", config)
    again, _ = load_config(
        RewardRunConfig, ["--config", str(tmp_path / "resolved.yaml")], prog="train_reward.py", description=""
    )
    assert again == config
    written = yaml.safe_load((tmp_path / "resolved.yaml").read_text(encoding="utf-8"))
    assert written["reward"]["scorers"][0]["std"] == 1.0
    assert set(written) & set(METHODS) == {FILES[name]}


@pytest.mark.parametrize(
    ("name", "key", "given", "expected"),
    [
        ("nft", "nft.old.slope", "0.2", 0.2),
        ("flash", "flash.latent_reward", "folder", "folder"),
        ("flash_gan", "flash.pixel_gan.weight", "0.5", 0.5),
        ("flash", "matching.ambient.consistency_weight", "0.01", 0.01),
        ("flash", "matching.ambient", "{}", AmbientConfig()),
        ("rtdmd", "rtdmd.direct", "null", None),
        ("gndm", "gndm.direct.weight", "0.5", 0.5),
    ],
)
def test_sections_are_set_from_the_command_line(name: str, key: str, given: str, expected: object) -> None:
    """Also those inside of others, and those that the file does not have."""
    found: Any = load(name, f"--{key}", given)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == expected


def test_an_anchor_is_added_by_its_two_sections() -> None:
    config = load("nft", "--matching.weight", "0.5", "--fake_score.optimizer.learning_rate", "0.001")
    assert config.matching == RewardMatchingConfig(weight=0.5)
    assert config.fake_score is not None
    assert config.fake_score.optimizer.learning_rate == 0.001


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_settings_of_another_method_are_refused(name: str) -> None:
    """Every field of every other section, alone on the command line."""
    for other in RewardRunConfig.METHODS:
        if other == FILES[name]:
            continue
        for field in dataclasses.fields(SECTIONS[other]):
            with pytest.raises(ConfigError, match=f"{other}|{field.name}"):
                load(name, f"--{other}.{field.name}", "1")


SHARED = {
    sections.TransitionConfig: "chain.py",
    sections.ChainConfig: "chain.py",
    sections.DirectConfig: "methods/rtdmd.py",
    sections.DecayConfig: "train.py",
    sections.PixelGanConfig: "pixel_discriminator.py setup.py methods/flash.py",
}


def test_every_setting_of_a_section_is_read_by_its_method() -> None:
    """As an attribute of something in its file; what sections share, in the file that they share it for."""
    places = {**SHARED, **{section: f"methods/{name}.py" for name, section in SECTIONS.items()}}
    for section, files in places.items():
        trees = [ast.parse((ROOT / "dmd" / "reward" / file).read_text(encoding="utf-8")) for file in files.split()]
        read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        # The weight of the policy loss is a setting of the chain, and read in the files of the methods: see below.
        own = set(section.__annotations__) - {"policy_weight"}
        assert own <= read, (section, own - read)
    for name, section in SECTIONS.items():
        text = (ROOT / "dmd" / "reward" / "methods" / f"{name}.py").read_text(encoding="utf-8")
        weighed = "policy_weight" in {field.name for field in dataclasses.fields(section)}
        assert ("settings.policy_weight" in text) == weighed


def test_a_run_says_what_its_student_is() -> None:
    assert load("rtdmd").student_settings == RunSettings(
        method="rtdmd", teacher_path="assets/digits_image", guidance=1.0, steps=2, shift=1.0, sampler="sde"
    )


def test_methods_without_a_chain_draw_by_the_students_sampler() -> None:
    assert load("nft").transition == TransitionConfig()
    config = load("flow_grpo", "--flow_grpo.transition", "cps")
    assert config.transition is config.section
    assert config.transition.transition == "cps"


def test_a_sampler_that_is_not_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"student\.sampler: given flow_map, allowed is one of 'sde', 'ode'"):
        load("nft", "--student.sampler", "flow_map")


MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "no start": ("nft", {"student.init": None}, "init is empty; give the run directory"),
    "scale of adapters": ("nft", {"student.lora_alpha": 2.0}, r"lora_alpha is 2\.0 with lora_rank 0"),
    "advantages": ("gndm", {"reward.combination": "gdpo"}, "gndm follows the sum of the rewards"),
    "scale": ("flash", {"reward.scale": "group"}, "reward.scale 'group': flash follows the sum of the rewards"),
    "negative": ("nft", {"nft.policy_weight": -1.0}, "policy_weight is -1.0; it must be above 0"),
    "group": ("nft", {"reward.group_size": 3}, "group_size 3 does not divide run.batch_size 8 cut into 1 slices"),
    "slices": ("nft", {"run.gradient_accumulation": 4}, "group_size 4 does not divide run.batch_size 8 cut into 4"),
    "two methods": ("nft", {"redmd": RedmdConfig()}, "the sections redmd and nft are given"),
    "no method": ("nft", {"nft": None}, "no method is given: add one of the sections rtdmd, gndm"),
    "ambient": ("gndm", {"matching.ambient": AmbientConfig()}, "gndm has its own form of matching on x0"),
    "weightless": ("redmd", {"matching.weight": 0.0}, "weight is 0.0; it must be above 0"),
    "unmatched": ("flash", {"matching": None, "fake_score": None}, "flash is distribution matching with a reward"),
    "no fake score": ("redmd", {"fake_score": None}, "the section matching needs fake_score"),
    "fake score alone": ("nft", {"fake_score": MATCHED["fake_score"]}, "the section fake_score needs matching"),
    "fake updates": ("redmd", {"fake_score.ratio": 0}, "ratio is 0"),
    "one step": ("flow_grpo", {"student.steps": 1}, "set student.steps to 2 or more"),
    "ode": ("flow_grpo", {"student.sampler": "ode"}, "the steps of student.sampler 'ode' are not random"),
    "sde": ("euphonium", {"euphonium.transition": "flow_sde"}, "explores around the ODE"),
    "eta": ("flow_grpo", {"flow_grpo.eta": 0.5}, "eta is 0.5 and transition 'sampler': only 'cps' reads it"),
    "noise scale": (
        "flash",
        {"flash.noise_scale": 0.3},
        "noise_scale is 0.3 and transition 'sampler': only 'flow_sde'",
    ),
    "followed": (
        "rtdmd",
        {"rtdmd.direct": sections.DirectConfig(weight=0.1, scorers=("slant", "geneval"))},
        r"rtdmd\.direct\.scorers names 'slant'; reward\.scorers has stroke_weight",
    ),
    "steps": ("rtdmd", {"rtdmd.trained_steps": 2}, "2 steps have 1 random ones"),
    "no GAN": ("flash", {"matching.steps": "early"}, "leaves late steps to the pixel GAN"),
    "other GAN": ("redmd", {"matching.steps": "early"}, "leaves late steps to the pixel GAN"),
    "noise": ("euphonium", {"euphonium.latent_reward": "x"}, "at t = 1 there is none: set highest_time below 1"),
    "distillation": ("euphonium", {"euphonium.distill_weight": -1.0}, "distill_weight is -1.0"),
    "highest time": ("euphonium", {"euphonium.highest_time": 0.0}, "highest_time is 0.0"),
    "lowest": ("crd", {"crd.lowest_kl_weight": 0.2}, "0 <= lowest_kl_weight <= kl_weight"),
    "heavy": ("redmd", {"redmd.max_weight": 0.5}, "max_weight is 0.5"),
    "injection": ("flash", {"flash.inject_decay": 1.5}, "inject_decay is 1.5"),
    "updates": ("nft", {"student.updates_per_rollout": 0}, "updates_per_rollout is 0; it must be above 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_settings_that_cannot_work_are_refused(inputs: TinyInputs, tmp_path: Path, name: str) -> None:
    method, changes, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        reward_config(inputs, tmp_path, tmp_path, method, changes)


def test_early_matching_goes_with_the_discriminator(inputs: TinyInputs, tmp_path: Path) -> None:
    config = reward_config(inputs, tmp_path, tmp_path, "flash", with_pixel_gan(inputs, tmp_path))
    assert config.matching is not None
    assert config.matching.steps == "early"


def test_scorers_are_checked() -> None:
    with pytest.raises(ValueError, match="std is 0; it must be above 0"):
        ScorerConfig(name="slant", std=0)
    with pytest.raises(ValueError, match=r"scorers is empty"):
        RewardSettings(scorers=())
    with pytest.raises(ValueError, match="group_size is 0; a prompt needs a sample"):
        RewardSettings(scorers=(ScorerConfig(name="slant"),), group_size=0)
    scored = ScorerConfig(name="slant")
    with pytest.raises(ValueError, match=r"held_out slant has weight 2\.0, mean 0\.0, std 1\.0: .* leave these out"):
        RewardSettings(scorers=(scored,), held_out=(ScorerConfig(name="slant", weight=2.0),))
    from_mapping = RewardSettings(scorers=({"name": "slant", "weight": 2.0},))  # pyright: ignore[reportArgumentType]
    assert from_mapping.scorers == (ScorerConfig(name="slant", weight=2.0),)
    assert dataclasses.is_dataclass(from_mapping.scorers[0])
