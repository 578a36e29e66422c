"""A setting exists only where it is read: every key of every other method is refused, in every configuration."""

import ast
import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.causal_video.reward.config import CausalRewardConfig
from fewstep.causal_video.stages.config import CausalConfig
from fewstep.consistency.config import ConsistencyConfig
from fewstep.core.config import ConfigError, OptimizerConfig, load_config
from fewstep.dmd.config import DmdConfig
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.latent.config import LatentRewardConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate")
WITH_METHODS: tuple[Any, ...] = (DmdConfig, ConsistencyConfig, CausalConfig, RewardRunConfig, CausalRewardConfig)
# Where the fields of a class's sections are read.
LAYER = {
    DmdConfig: "dmd",
    ConsistencyConfig: "consistency",
    CausalConfig: "causal_video",
    RewardRunConfig: "dmd/reward",
    CausalRewardConfig: "causal_video",
}
# Read by what rewards of pictures and of streams share.
# Flow maps of streams have the losses of those of pictures.
SHARED = {CausalRewardConfig: ("dmd/reward",), CausalConfig: ("consistency",)}


def class_of(path: Path) -> Any:
    """The configuration class that this file is of: the one that knows all of its keys and one of its sections."""
    there = set(yaml.safe_load(path.read_text(encoding="utf-8")))
    for config_class in WITH_METHODS:
        names = {field.name for field in dataclasses.fields(config_class)}
        if there <= names and len(there & set(config_class.METHODS)) == 1:
            return config_class
    return LatentRewardConfig


def section_of(config_class: Any, name: str) -> Any:
    """The dataclass of an optional section."""
    hint = typing.get_type_hints(config_class)[name]
    assert typing.get_origin(hint) in (types.UnionType, typing.Union)
    return next(option for option in typing.get_args(hint) if option is not type(None))


def leaves(section: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a section; an optimizer is read as a whole."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        options = (hints[field.name], *typing.get_args(hints[field.name]))
        inner = [option for option in options if dataclasses.is_dataclass(option) and option is not OptimizerConfig]
        if inner and typing.get_origin(hints[field.name]) is not tuple:
            yield from leaves(inner[0], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name + (".learning_rate" if OptimizerConfig in options else "")


def load(config_class: Any, *arguments: str) -> Any:
    return load_config(config_class, list(arguments), prog="train", description="")[0]


def test_every_configuration_is_found_and_used() -> None:
    found = {path: class_of(path) for path in CONFIGS}
    assert len(CONFIGS) >= 34
    for config_class in (*WITH_METHODS, LatentRewardConfig):
        assert list(found.values()).count(config_class) >= 1, config_class
    used = {name for path in CONFIGS for name in yaml.safe_load(path.read_text(encoding="utf-8"))}
    shown = {name for config_class in WITH_METHODS for name in config_class.METHODS}
    # Variants of DMD's objective have no file of their own: their section is one line.
    assert shown - used == {"sid"}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_configuration_loads(path: Path) -> None:
    config_class = class_of(path)
    config = load(config_class, "--config", str(path))
    if config_class is not LatentRewardConfig:
        sections = [name for name in config_class.METHODS if getattr(config, name) is not None]
        assert len(sections) == 1
        assert isinstance(config.method, str)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_key_of_another_method_is_refused(path: Path) -> None:
    config_class = class_of(path)
    if config_class is LatentRewardConfig:
        return
    there = set(yaml.safe_load(path.read_text(encoding="utf-8"))) & set(config_class.METHODS)
    tried = 0
    for section in config_class.METHODS:
        for key in leaves(section_of(config_class, section)):
            if section in there:
                continue
            with pytest.raises(
                ConfigError, match=rf"{section}\.{key} on the command line belongs to the section {section}"
            ):
                load(config_class, "--config", str(path), f"--{section}.{key}", "1")
            tried += 1
    assert tried >= 1 or len(config_class.METHODS) == 1


def attributes_read(path: Path) -> Iterator[str]:
    """Attributes that the code of a file takes; in settings the checks of values do not count."""
    tree: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    is_settings = path.name.endswith(("config.py", "sections.py"))
    for node in [tree] if not is_settings else ast.walk(tree):
        checks = isinstance(node, ast.FunctionDef) and re.match(r"__post_init__|check|require|refuse", node.name)
        if not is_settings or (isinstance(node, ast.FunctionDef) and not checks):
            yield from (inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute))


def test_every_setting_of_a_section_is_read() -> None:
    """By a module of the method's layer that is not its configuration."""
    unread = []
    for config_class in WITH_METHODS:
        folders = (LAYER[config_class], *SHARED.get(config_class, ()))
        found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
        read = {name for path in found for name in attributes_read(path)}
        for section in config_class.METHODS:
            for key in leaves(section_of(config_class, section)):
                name = key.removesuffix(".learning_rate").rpartition(".")[2]
                if name not in read:
                    unread.append(f"{section}.{key}")
    assert unread == [], unread


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_two_methods_are_one_too_many(data: st.DataObject) -> None:
    config_class = data.draw(st.sampled_from([each for each in WITH_METHODS if len(each.METHODS) > 1]))
    path = data.draw(st.sampled_from([path for path in CONFIGS if class_of(path) is config_class]))
    there = set(yaml.safe_load(path.read_text(encoding="utf-8"))) & set(config_class.METHODS)
    other = data.draw(st.sampled_from(sorted(set(config_class.METHODS) - there)))
    with pytest.raises(ConfigError, match=f"{other} on the command line belongs to the section {other}"):
        load(config_class, "--config", str(path), f"--{other}", "{}")


def test_help_of_a_section_explains_it(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "configs" / "digits" / "dmd_1step.yaml"
    with pytest.raises(SystemExit) as left:
        load(DmdConfig, "--config", str(path), "--gan.help")
    assert left.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--gan.r1_weight R1_WEIGHT" in told
    assert "Weight of the student's adversarial loss" in told


def test_help_shows_one_section(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "configs" / "digits" / "scm.yaml"
    with pytest.raises(SystemExit):
        load(ConsistencyConfig, "--config", str(path), "--help")
    shown = capsys.readouterr().out
    assert "--scm.coordinates" in shown
    assert "--dcm.grid_steps" not in shown
    with pytest.raises(SystemExit):
        load(ConsistencyConfig, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "One of the sections scm, dcm, ect" in shown
    assert "--scm.coordinates" not in shown
