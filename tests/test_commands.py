"""The command `fewstep`, from the wheel alone: names, configurations by name, errors, and a training."""

import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.commands.cli import COMMANDS, overview, run_cli
from fewstep.commands.train import TRAININGS, config_names, with_named_config


def call(*words: str) -> tuple[str | int | None, list[str]]:
    """(exit code or message, sys.argv as the command was left with) of `fewstep words` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fewstep", *words])
        try:
            run_cli()
        except SystemExit as stopped:
            return stopped.code, sys.argv
        return None, sys.argv


def test_every_command_is_listed_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = overview()
    assert all(f"  {name} " in text for name in COMMANDS)
    assert all(f"  train {name} " in text for name in TRAININGS)
    for name in COMMANDS:
        if name != "configs":
            assert call(*name.split(), "--help")[0] == 0
            told = capsys.readouterr().out
            assert told.startswith(f"usage: fewstep {name} ")
            assert " ".join(COMMANDS[name][0][1:].split()[:3]) in " ".join(told.split())
    for name in TRAININGS:
        assert call("train", name, "--help")[0] == 0
        assert f"fewstep train {name}" in capsys.readouterr().out
    assert call("--help")[0] == 0
    assert call()[0] == 2


def test_mistyped_commands_name_the_nearest() -> None:
    assert call("evalute", "image")[0] == (
        "error: fewstep has no command 'evalute image'; did you mean 'evaluate image'? `fewstep --help` lists them"
    )
    assert "did you mean 'train reward'?" in str(call("train", "rewards")[0])


def test_configurations_go_by_name(repository: Path) -> None:
    names = config_names()
    assert len(names) >= 60
    assert names["digits/dmd_1step"] == repository / "configs" / "digits" / "dmd_1step.yaml"
    assert not any(name.startswith("accelerate") for name in names)
    expected = str(names["sdxl/dmd2_4step_lora"])
    assert with_named_config(["--config", "sdxl/dmd2_4step_lora", "--x"]) == ["--config", expected, "--x"]
    assert with_named_config(["--config=sdxl/dmd2_4step_lora"]) == [f"--config={expected}"]
    assert with_named_config(["--config", "mine.yaml"]) == ["--config", "mine.yaml"]
    with pytest.raises(SystemExit, match="near: sdxl/dmd2_4step_lora"):
        with_named_config(["--config", "sdxl/dmd2_4step_lor"])


def test_the_installed_command_answers_at_once(repository: Path) -> None:
    """Its help needs no torch."""
    program = Path(sys.executable).parent / "fewstep"
    done = subprocess.run([program, "train"], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 2
    assert done.stdout.count("causal_reward") == 1
    code = "import sys, fewstep.commands.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository)
    assert done.stdout.strip() == "False"
