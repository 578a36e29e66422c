from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.core.config import ConfigError, OptimizerConfig, RunConfig, load_config, parse_config, save_resolved


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    steps: int
    """Number of student steps."""
    times: tuple[float, ...] = (1.0, 0.5)
    """Times of the steps."""
    sampler: Literal["sde", "ode"] = "sde"
    """How the student renoises."""
    name: str = "student"
    """Name of the student."""
    start: str | None = None
    """Path to start from."""
    shift: float = 1.0
    """Timestep shift."""


@dataclasses.dataclass(frozen=True)
class GanConfig:
    weight: float
    """Weight of the loss."""
    every: int = 1
    """Steps between updates."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight: given {self.weight}, allowed is a number >= 0")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything of one experiment."""

    run: RunConfig
    student: StudentConfig
    optimizer: OptimizerConfig
    gan: GanConfig | None = None
    """Adversarial loss."""


COMPLETE = """
run:
  directory: runs/toy
  seed: 0
  steps: 100
  batch_size: 8
  checkpoint_every: 10
  keep_checkpoints: 2
  sample_every: 10
  log_every: 1
student:
  steps: 4
optimizer:
  learning_rate: 1e-4
"""


def load(arguments: list[str], config_class: type = ExperimentConfig) -> tuple:
    return load_config(config_class, arguments, prog="train", description="Train.")


@pytest.fixture
def complete(tmp_path: Path) -> str:
    path = tmp_path / "complete.yaml"
    path.write_text(COMPLETE)
    return str(path)


def test_file_and_overrides(complete: str) -> None:
    config, resolved = load(["--config", complete, "--student.steps", "2", "--student.times=[1, 0.25]"])
    assert config.student == StudentConfig(steps=2, times=(1.0, 0.25))
    assert config.optimizer.learning_rate == 1e-4
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.run.batch_size == 8
    assert config.gan is None
    assert resolved["student"]["times"] == [1.0, 0.25]
    assert resolved["run"]["steps"] == 100


@pytest.mark.parametrize("arguments", [["--dry_run"], ["--dry_run", "true"], ["--run.dry_run"], ["--run.dry_run=true"]])
def test_dry_run_spellings(complete: str, arguments: list[str]) -> None:
    config, _ = load(["--config", complete, *arguments, "--student.steps=3"])
    assert config.run.dry_run is True
    assert config.student.steps == 3


@pytest.mark.parametrize("arguments", [["--resume", "latest"], ["--resume=latest"], ["--run.resume", "latest"]])
def test_resume_spellings(complete: str, arguments: list[str]) -> None:
    assert load(["--config", complete, *arguments])[0].run.resume == "latest"


def test_unknown_key_on_command_line_names_the_nearest(complete: str) -> None:
    with pytest.raises(ValueError, match=r"unknown key student\.stesp on .* line; did you mean student\.steps\?"):
        load(["--config", complete, "--student.stesp", "2"])


def test_unknown_key_without_a_near_one_shows_those_beside_it(complete: str) -> None:
    for name, known in (("gan.zzzzzz", "gan.weight, gan.every"), ("zzzzzzzzz", "run, student, optimizer, gan")):
        with pytest.raises(ConfigError) as caught:
            load(["--config", complete, f"--{name}", "2"])
        assert str(caught.value).endswith(f"unknown key {name} on the command line; known keys: {known}")


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("studnet:\n  steps: 1\n", r"unknown key studnet in .*complete.yaml; did you mean student\?"),
        ("gan: {wieght: 1.0}\n", r"unknown key gan\.wieght .*did you mean gan\.weight\?"),
        ("student:\n  steps: 2\n", r"line 15: key student is given twice"),
        ("gan: 3\n", r"gan: given 3 .*give its keys: gan\.weight, gan\.every"),
        ("gan: {every: 2}\n", r"missing keys: gan\.weight \(float\)"),
        ("gan: {weight: heavy}\n", r"gan\.weight: given heavy, allowed is float"),
        ("gan: {weight: -1}\n", r"gan\.weight: given -1\.0, allowed is a number >= 0"),
        ("gan: [\n", r"is not valid YAML"),
    ],
)
def test_bad_file(complete: str, addition: str, message: str) -> None:
    with Path(complete).open("a") as file:
        file.write(addition)
    with pytest.raises(ConfigError, match=message):
        load(["--config", complete])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--student.steps=many", r"student\.steps: given many, allowed is int"),
        ("--student.steps=2.5", r"student\.steps: given 2\.5, allowed is int"),
        ("--student.sampler=dpm", r"student\.sampler: given dpm, allowed is one of 'sde', 'ode'"),
        ("--run.max_seconds=soon", r"run\.max_seconds: given soon, allowed is float or null"),
        ("--optimizer.betas=[0.9]", r"optimizer\.betas: given \(0\.9,\), allowed are 2 numbers in \[0, 1\) for adamw"),
        ("--optimizer.betas=[0.9, 1.0]", r"optimizer\.betas: given \(0\.9, 1\.0\), allowed are 2 numbers in \[0, 1\)"),
        ("--run.gradient_accumulation=3", r"run\.batch_size: given 8, which is not divisible by .* 3"),
        ("--run.log_every=0", r"run\.log_every: given 0, allowed is an integer >= 1"),
        ("--student=other.yaml", r"student: given 'other\.yaml' on the command line, but it is a group"),
    ],
)
def test_wrong_values_name_key_given_and_allowed(complete: str, argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(["--config", complete, argument])


def test_missing_keys_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "partial.yaml"
    path.write_text(COMPLETE.replace("  steps: 4\n", "  shift: 3\n").replace("  seed: 0\n", ""))
    with pytest.raises(ConfigError, match=r"missing keys: run\.seed \(int\), student\.steps \(int\); give them"):
        load(["--config", str(path)])


@pytest.mark.parametrize("text", ["", "3\n", "[1, 2]\n", "student:\n"])
def test_files_without_keys_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"holds no keys|is a group"):
        load(["--config", str(path)])


def test_missing_file_and_two_files(complete: str) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        load(["--config", complete + ".not"])
    with pytest.raises(ConfigError, match="given 2 files"):
        load(["--config", complete, "--config", complete])


def test_parse_config_exits_with_code_two(complete: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_config(ExperimentConfig, ["--config", complete, "--student.stesp=1"], prog="train", description="Train.")
    assert raised.value.code == 2
    assert "train: error: unknown key student.stesp" in capsys.readouterr().err


def test_help_exits_with_zero_and_explains_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_config(ExperimentConfig, ["--help"], prog="train", description="Train a student.")
    shown = " ".join(capsys.readouterr().out.split())
    assert raised.value.code == 0
    for text in ("Train a student.", "--dry_run", "Number of student steps.", "Samples per step over all processes"):
        assert shown.count(text) == 1


@pytest.mark.parametrize("literal", ["1e-4", "1E-4", "1.e-4", "1.0e-4", "0.0001", "+1e-4"])
def test_every_spelling_of_a_float_is_a_float(complete: str, literal: str) -> None:
    path = Path(complete)
    path.write_text(path.read_text().replace("1e-4", literal))
    assert load(["--config", complete])[0].optimizer.learning_rate == 1e-4
    assert load(["--config", complete, f"--student.shift={literal}"])[0].student.shift == 1e-4


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    name=st.one_of(st.sampled_from(["1e-4", "null", "yes", "0x1", "1:20", "", "~", "a: b", "2020-01-01"]), st.text()),
    start=st.none() | st.from_regex(r"[a-m0-9./_-]{1,12}", fullmatch=True),
    shift=st.floats(allow_nan=False, min_value=1e-300),
    times=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    weight=st.none() | st.floats(0, 1e30),
)
def test_resolved_file_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    start: str | None,
    shift: float,
    times: list[float],
    weight: float | None,
) -> None:
    folder = tmp_path_factory.mktemp("resolved")
    (folder / "in.yaml").write_text(COMPLETE)
    config, _ = load(["--config", str(folder / "in.yaml")])
    student = StudentConfig(steps=1, times=tuple(times), name=name, start=start, shift=shift)
    gan = None if weight is None else GanConfig(weight=weight)
    config = dataclasses.replace(config, student=student, gan=gan)
    save_resolved(folder / "out.yaml", config)
    again, resolved = load(["--config", str(folder / "out.yaml")])
    assert again == config
    assert resolved["student"]["shift"] == shift
    assert (folder / "out.yaml").read_bytes().isascii()
    # Sections that are not there are not written.
    assert len(yaml.safe_load((folder / "out.yaml").read_text())) == 3 + (gan is not None)


def test_flat_configuration() -> None:
    config, resolved = load(["--steps", "3"], StudentConfig)
    assert config == StudentConfig(steps=3)
    assert resolved["times"] == [1.0, 0.5]


def test_optional_group_from_the_command_line(complete: str) -> None:
    assert load(["--config", complete, "--gan.weight=2"])[0].gan == GanConfig(weight=2.0)
    with Path(complete).open("a") as file:
        file.write("gan: {weight: 1.0, every: 5}\n")
    assert load(["--config", complete, "--gan.weight=2"])[0].gan == GanConfig(weight=2.0, every=5)
    assert load(["--config", complete, "--gan=null"])[0].gan is None


def test_help_of_a_script_imports_no_torch_and_is_fast() -> None:
    script = textwrap.dedent(
        """
        import sys
        from fewstep.core.config import RunConfig, parse_config
        try:
            parse_config(RunConfig, ["--help"], prog="train", description="Train.")
        except SystemExit as done:
            print("torch" in sys.modules, done.code)
        """
    )
    seconds = []
    for _ in range(2):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
        seconds.append(time.monotonic() - started)
        assert done.stdout.splitlines()[-1] == "False 0"
    assert min(seconds) < 2.0
