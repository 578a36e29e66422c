"""Settings of consistency runs: the section is the method, and what nothing reads is refused."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fewstep.consistency.config import ConsistencyConfig, ConsistencyMatchingConfig
from fewstep.consistency.mcm.config import McmConfig, McmDiscriminatorConfig
from fewstep.consistency.sana_sprint.config import SprintConfig, SprintConsistencyConfig, SprintDiscriminatorConfig
from fewstep.consistency.sections import (
    AlphaflowConfig,
    AnyflowConfig,
    DcmConfig,
    DmfConfig,
    EctConfig,
    ImfConfig,
    MeanflowConfig,
    PairsConfig,
    ScmConfig,
)
from fewstep.core.config import ConfigError, load_config, save_resolved
from tests.consistency.tiny_consistency_run import FAKE_SCORE, MATCHED, OBJECTIVES, tiny_consistency
from tests.dmd.tiny_run import TinyInputs, changed

METHODS = ["alphaflow", "anyflow", "dcm", "dmf", "ect", "imf", "meanflow", "pairs", "rcm", "sana_sprint", "scm"]
FILES = [f"digits/{name}" for name in (*METHODS, "sana_sprint_control")] + ["digits_video/anyflow", "digits_video/mcm"]
# A field of each section.
FIELDS = {
    "scm": ("coordinates", "rf"),
    "dcm": ("grid_steps", "12"),
    "ect": ("q", "7"),
    "meanflow": ("kappa", "0.5"),
    "imf": ("power", "0.25"),
    "alphaflow": ("alpha_end", "1.41"),
    "dmf": ("constant", "2.0"),
    "anyflow": ("rollout_steps", "[4]"),
    "sana_sprint": ("time_mean", "0.1"),
    "mcm": ("constant", "0.1"),
    "pairs": ("autoencoder", "x"),
}


FLOW_MAP = ("methods/flow_map.py", "batch.py", "tangents.py", "tangent_check.py", "setup.py")
# The modules of consistency/ that may read a section.
READERS = {
    ScmConfig: ("methods/scm.py", "batch.py", "tangents.py", "tangent_check.py", "setup.py"),
    DcmConfig: ("methods/dcm.py",),
    EctConfig: ("methods/ect.py", "batch.py"),
    MeanflowConfig: ("methods/meanflow.py", *FLOW_MAP),
    ImfConfig: ("methods/imf.py", *FLOW_MAP),
    AlphaflowConfig: ("methods/alphaflow.py", "methods/meanflow.py", *FLOW_MAP),
    DmfConfig: ("methods/dmf.py", *FLOW_MAP),
    AnyflowConfig: ("methods/anyflow.py", *FLOW_MAP),
    SprintConfig: ("sana_sprint/step.py", "sana_sprint/setup.py", "setup.py"),
    SprintConsistencyConfig: ("sana_sprint/step.py", "methods/scm.py", "tangents.py", "tangent_check.py", "setup.py"),
    SprintDiscriminatorConfig: ("sana_sprint/step.py", "sana_sprint/setup.py"),
    PairsConfig: ("setup.py",),
    McmConfig: ("mcm/step.py", "mcm/setup.py", "methods/dcm.py"),
    McmDiscriminatorConfig: ("mcm/step.py", "mcm/setup.py", "setup.py"),
}


def read(repository: Path, name: str, *changes: str) -> ConsistencyConfig:
    arguments = ["--config", str(repository / "configs" / f"{name}.yaml"), *changes]
    return load_config(ConsistencyConfig, arguments, prog="test", description="")[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_committed_files_name_their_method(repository: Path, tmp_path: Path, name: str) -> None:
    config = read(repository, name)
    file = name.partition("/")[2]
    assert config.method == {"sana_sprint_control": "sana_sprint"}.get(file, file)
    save_resolved(tmp_path / "again.yaml", config)
    again, _ = load_config(ConsistencyConfig, ["--config", str(tmp_path / "again.yaml")], prog="test", description="")
    assert again == config


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_field_of_another_method_is_refused(repository: Path, name: str) -> None:
    own = next(method for method in FIELDS if getattr(read(repository, name), method) is not None)
    assert set(FIELDS) == set(ConsistencyConfig.METHODS)
    for method, (field, value) in FIELDS.items():
        if method == own:
            continue
        with pytest.raises(ConfigError, match=f"{method}.{field} on the command line belongs to the section {method}"):
            read(repository, name, f"--{method}.{field}", value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("ect.q", "7"), ("alphaflow.alpha_end", "1.41"), ("meanflow.kappa", "0.5"), ("anyflow.rollout_steps", "[2]")],
)
def test_the_script_ends_with_code_2_and_names_the_section(repository: Path, key: str, value: str) -> None:
    script, config = "scripts/train_consistency.py", "configs/digits/scm.yaml"
    command = [sys.executable, script, "--config", config, f"--{key}", value]
    found = subprocess.run(command, capture_output=True, text=True, cwd=repository, timeout=60, check=False)
    assert found.returncode == 2
    section = key.partition(".")[0]
    assert f"{key} on the command line belongs to the section {section}, and the method of this run is scm" in (
        found.stderr
    )


@pytest.mark.parametrize("section", READERS)
def test_every_field_is_read_by_its_method(repository: Path, section: Any) -> None:
    files = [repository / "consistency" / name for name in READERS[section]]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    found = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {field.name for field in dataclasses.fields(section)} - found == set()


def test_fields_of_before_are_unknown(repository: Path) -> None:
    for key in ("method", "second_time", "loss.objective", "student.sampler", "scm.grid_steps", "dmf.second_time"):
        with pytest.raises(ConfigError, match=f"unknown key {key}"):
            read(repository, "digits/scm", f"--{key}", "scm")


def test_matching_makes_the_method(repository: Path) -> None:
    weight = ("--matching.weight", "0.1", "--fake_score.optimizer.learning_rate", "1e-3")
    assert read(repository, "digits/scm").method == "scm"
    assert read(repository, "digits/scm", *weight).method == "rcm"
    assert read(repository, "digits/dcm", *weight).method == "rcm"
    second = read(repository, "digits/anyflow", *weight, "--anyflow.rollout_steps", "[2, 4]")
    assert second.method == "anyflow"
    assert second.anyflow is not None
    assert second.anyflow.rollout_steps == (2, 4)
    alone = read(repository, "digits/rcm", "--matching", "null", "--fake_score", "null")
    assert alone.method == "scm"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("scm", {"dcm": DcmConfig()}, "the sections scm and dcm are given, and a run has one method"),
        ("scm", {"scm": None}, "no method is given: add one of the sections scm, dcm, ect"),
        ("scm", {"student.steps": 0}, "steps is 0"),
        ("scm", {"fake_score": FAKE_SCORE}, "the section fake_score is given without matching"),
        (
            "scm",
            {"matching": ConsistencyMatchingConfig(weight=0.1)},
            "the section matching is given without fake_score",
        ),
        ("rcm", {"matching": None}, "the section fake_score is given without matching"),
        ("rcm", {"fake_score": None}, "the section matching is given without fake_score"),
        ("rcm", {"scm": ScmConfig(learned_weight=True)}, "scm.learned_weight with the section matching"),
        ("ect", MATCHED, "the section matching beside ect: distribution matching goes with scm, dcm"),
        ("meanflow", MATCHED, "the section matching beside meanflow"),
        ("dmf", MATCHED, "the section matching beside dmf"),
        ("anyflow", {"anyflow": AnyflowConfig(rollout_steps=(1, 2))}, "which only anyflow with the section matching"),
        ("meanflow_data", {"teacher.guidance": 1.0}, "kappa: given 0.5, which only velocity 'data' with a teacher"),
    ],
)
def test_sections_that_do_not_fit_are_named(
    inputs: TinyInputs, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    config = tiny_consistency(inputs, tmp_path, name)
    with pytest.raises(ValueError, match=message):
        changed(config, changes)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (ScmConfig, {"max_time_share": 1.5, "coordinates": "rf"}, "share from 0 to 1"),
        (ScmConfig, {"max_time_share": 0.5}, "tangent is zero and teaches nothing"),
        (ScmConfig, {"central_step": 0.01}, "central_step: given 0.01, which only tangent 'central' reads"),
        (ScmConfig, {"tangent": "central", "check_tangent": False}, "check_tangent: given False, which only tangent"),
        (ScmConfig, {"tangent": "central", "central_step": 0.0}, "central_step: given 0.0, allowed is a number > 0"),
        (ScmConfig, {"normalizer": 0.0}, "normalizer 0.0"),
        (ScmConfig, {"warmup_of": "state"}, "tangent_warmup 0, where nothing reads it"),
        (
            ScmConfig,
            {"warmup_of": "state", "coordinates": "rf", "tangent_warmup": 5},
            "it is for a warm-up in TrigFlow",
        ),
        (ScmConfig, {"tangent_warmup": -1}, "tangent_warmup is -1"),
        (DcmConfig, {"grid_steps": 1}, "at least 2 steps"),
        (DcmConfig, {"grid_shift": 0.0}, "grid_shift 0.0"),
        (EctConfig, {"time_std": 0.0}, "time_std is 0.0"),
        (EctConfig, {"q": 1.0}, "q 1.0"),
        (EctConfig, {"stage_steps": 0}, "stage_steps is 0"),
        (EctConfig, {"largest_time": 1.0}, "largest_time 1.0"),
        (EctConfig, {"huber": -0.1}, "huber -0.1"),
        (MeanflowConfig, {"equal_share": 1.5}, r"equal_share must lie in \[0, 1\]"),
        (MeanflowConfig, {"pair_shift": 3.0}, "pair_shift: given 3.0, which only pairs 'partition' reads"),
        (MeanflowConfig, {"pairs": "partition", "time_mean": 0.0}, "time_mean: given 0.0, which only pairs 'ordered'"),
        (MeanflowConfig, {"kappa": 0.5}, "kappa: given 0.5, which only velocity 'data' reads"),
        (MeanflowConfig, {"condition_drop": 0.2}, "condition_drop: given 0.2, which only velocity 'data' reads"),
        (MeanflowConfig, {"velocity": "data", "kappa": 1.0}, r"kappa: given 1.0, allowed is a number in \[0, 1\)"),
        (MeanflowConfig, {"velocity": "data", "guidance_interval": (0.5, 0.5)}, "guidance_interval: given"),
        (MeanflowConfig, {"power": -1.0}, "power is -1.0"),
        (ImfConfig, {"constant": 0.0}, "constant 0.0"),
        (AlphaflowConfig, {"alpha_end": 0.0}, "alpha_start 0.0 must be below alpha_end 0.0"),
        (DmfConfig, {"constant": -1.0}, "constant -1.0"),
        (AnyflowConfig, {"rollout_steps": ()}, "rollout_steps is"),
        (AnyflowConfig, {"rollout_steps": (4, 0)}, "rollout_steps is"),
        (ConsistencyMatchingConfig, {"weight": 0.0}, "weight: given 0.0, allowed is a number > 0"),
        (ConsistencyMatchingConfig, {"weight": 0.1, "start": -1}, "start: given -1"),
    ],
)
def test_values_that_do_not_fit_are_named(section: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(**values)


def test_latents_are_required(repository: Path, tmp_path: Path) -> None:
    text = (repository / "configs" / "digits" / "scm.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("  latents:")]
    (tmp_path / "scm.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"missing keys: data\.latents"):
        load_config(ConsistencyConfig, ["--config", str(tmp_path / "scm.yaml")], prog="test", description="")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_student_follows_from_the_method(inputs: TinyInputs, tmp_path: Path, name: str) -> None:
    config = tiny_consistency(inputs, tmp_path, name)
    found = config.student_settings
    second = {"meanflow": "sum", "imf": "gate", "alphaflow": "sum", "dmf": "decoupled", "anyflow": "gate"}
    method = config.method
    assert (found.sampler, found.second_time) == (("flow_map", second[method]) if method in second else ("sde", "none"))
    assert (found.method, found.any_steps, found.guidance_embedded) == (method, True, False)
    assert (found.steps, found.guidance, found.teacher_path) == (2, config.teacher.guidance, str(inputs.teacher))
    takes = {"scm", "rcm", *second}
    assert (config.tangent is not None) == (method in takes)
    copy = dataclasses.replace(config, student=dataclasses.replace(config.student, steps=4, shift=3.0))
    assert (copy.student_settings.steps, copy.student_settings.shift) == (4, 3.0)


def test_ect_has_no_teacher_to_guide(inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_consistency(inputs, tmp_path, "ect")
    with pytest.raises(ValueError, match=r"teacher\.guidance is 2\.0, and ect has no teacher to guide"):
        changed(config, {"teacher.guidance": 2.0})
