"""The training script on mistakes: what it says, its exit code, and that nothing is written."""

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.core.config import ConfigError, OptimizerConfig, load_config, save_resolved
from fewstep.core.settings import FakeScoreConfig, GridStudentConfig, SampleDataConfig, TeacherConfig
from fewstep.dmd.config import DmdConfig, FDistillObjective, GanConfig, RegressionConfig, SidObjective
from fewstep.dmd.train import train_dmd
from tests.dmd.run_server import SCRIPT, RunServer
from tests.dmd.tiny_run import TinyInputs, changed, tiny_config, with_gan

OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def read(arguments: list[str]) -> DmdConfig:
    return load_config(DmdConfig, arguments, prog="train_dmd.py", description="")[0]


@pytest.fixture
def config(inputs: TinyInputs, tmp_path: Path) -> DmdConfig:
    """Settings of a run into `tmp_path / run`."""
    return tiny_config(inputs, tmp_path / "run")


def run_script(config: DmdConfig, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The plain script; with settings that it refuses it does not get as far as importing torch."""
    save_resolved(folder / "config.yaml", config)
    command = [sys.executable, str(SCRIPT), "--config", str(folder / "config.yaml"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student.stepz", "2"], "unknown key student.stepz on the command line; did you mean student.steps?"),
        (["--student.steps", "two"], "student.steps: given two, allowed is int"),
        (
            ["--sid.alpha", "1.5"],
            "sid.alpha on the command line belongs to the section sid, and the method of this run is dmd",
        ),
        (["--student.sampler", "flow_map"], "student.sampler: given flow_map, allowed is one of 'sde', 'ode'"),
        (["--dmd.alpha", "1.5"], "unknown key dmd.alpha on the command line; did you mean sid.alpha?"),
        (
            ["--dmd", "null"],
            "dmd: given null on the command line; change the section of the method in the file",
        ),
        (["--gan.weight", "0.1"], "missing keys: gan.latents (str)"),
    ],
)
def test_unusable_settings_exit_with_two(config: DmdConfig, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run_script(config, tmp_path, *arguments)
    assert done.returncode == 2
    assert f"train_dmd.py: error: {message}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_unknown_key_in_the_file_names_the_nearest(config: DmdConfig, tmp_path: Path) -> None:
    save_resolved(tmp_path / "config.yaml", config)
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    (tmp_path / "config.yaml").write_text(text.replace("  sample_count:", "  sample_cuont:"), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "unknown key data.sample_cuont in" in done.stderr
    assert "did you mean data.sample_count?" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dmd": None, "f_distill": FDistillObjective()}, "f_distill reads density ratios off the discriminator"),
        ({"sid": SidObjective()}, "the sections dmd and sid are given, and a run has one method"),
        ({"dmd": None}, "no method is given: add one of the sections dmd, sid, f_distill"),
        (
            {"regression": RegressionConfig(pairs="pairs", weight=1.0), "student.steps": 2},
            "regression with student.steps 2: DMD1 is a one-step method",
        ),
        ({"student.steps": 0}, "steps is 0; it must be at least 1"),
        ({"fake_score.ratio": 0}, "ratio is 0; it must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    config: DmdConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        changed(config, changes)


@pytest.mark.slow
def test_empty_prompt_file_ends_the_script(config: DmdConfig, server: RunServer, tmp_path: Path) -> None:
    prompts = tmp_path / "empty.txt"
    prompts.write_text("\n \n", encoding="utf-8")
    save_resolved(tmp_path / "config.yaml", changed(config, {"data.prompts": str(prompts)}))
    started = server.start("--config", str(tmp_path / "config.yaml"), log=tmp_path / "log.txt")
    assert started.wait() == 1
    assert f"prompt file {prompts} holds no prompt" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("vae", r"component vae \(AutoencoderKL\) is missing in"),
        ("text_encoder_2", r"component text_encoder_2 \(CLIPTextModelWithProjection\) is missing in"),
        ("transformer/diffusion_pytorch_model.safetensors", r"component transformer .* has no .safetensors weights"),
        ("model_index.json", r"has no model_index.json: give the folder that pipeline.save_pretrained wrote"),
    ],
)
def test_incomplete_teacher_is_named_and_nothing_is_written(
    config: DmdConfig, broken_teacher: Path, tmp_path: Path, component: str, message: str
) -> None:
    missing = broken_teacher / component
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    with pytest.raises(ValueError, match=message):
        train_dmd(changed(config, {"teacher.path": str(broken_teacher)}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.path": "no such folder"}, "no such folder is neither a folder nor the name of a model on the hub"),
        ({"data.prompts": "lost.txt"}, "prompt file lost.txt does not exist"),
        ({"gan": GanConfig(latents="lost", weight=0.1)}, r"latents.safetensors does not exist"),
        (
            {"student.init": "lost.safetensors"},
            "student.init lost.safetensors is no .safetensors file, no run",
        ),
    ],
)
def test_missing_files_are_named(config: DmdConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_dmd(changed(config, changes))


def test_latents_as_pairs_are_refused(config: DmdConfig, inputs: TinyInputs) -> None:
    with pytest.raises(ValueError, match=r"holds latents without noise; make pairs with scripts/make_teacher_pairs.py"):
        train_dmd(changed(config, {"regression": RegressionConfig(pairs=str(inputs.latents), weight=0.1)}))


def test_latents_of_another_size_are_refused(config: DmdConfig, inputs: TinyInputs) -> None:
    message = r"gan.latents holds latents of shape \(4, 8, 8\), this run makes \(4, 16, 16\); set data.height/width"
    with pytest.raises(ValueError, match=message):
        train_dmd(changed(config, {"gan": with_gan(inputs), "data.height": 32, "data.width": 32}))


def test_weights_of_another_network_are_refused(config: DmdConfig, inputs: TinyInputs, tmp_path: Path) -> None:
    other = inputs.teacher / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"does not fit the teacher's network: .* weights missing"):
        train_dmd(changed(config, {"student.init": str(other)}))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"student.init .*broken.safetensors cannot be read"):
        train_dmd(changed(config, {"student.init": str(broken)}))


def test_run_directory_that_is_a_file_is_refused(config: DmdConfig, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("here", encoding="utf-8")
    with pytest.raises(ValueError, match=r"run directory .*run is a file; choose another directory"):
        train_dmd(config)
    assert (tmp_path / "run").read_text(encoding="utf-8") == "here"


def test_printed_settings_are_a_file_to_start_from(
    config: DmdConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_resolved(tmp_path / "config.yaml", config)
    file = ["--config", str(tmp_path / "config.yaml")]
    with pytest.raises(SystemExit) as end:
        read([*file, "--student.steps", "3", "--print_config"])
    assert end.value.code in (0, None)
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    again = read(["--config", str(tmp_path / "printed.yaml")])
    assert again == changed(config, {"student.steps": 3})
    assert not (tmp_path / "run").exists()


def test_a_section_as_one_mapping_is_looked_into(config: DmdConfig, tmp_path: Path, inputs: TinyInputs) -> None:
    save_resolved(tmp_path / "config.yaml", config)
    file = ["--config", str(tmp_path / "config.yaml")]
    made = read([*file, "--gan", f"{{latents: {inputs.latents}, weight: 0.25}}"])
    assert made.gan is not None
    assert (made.gan.weight, made.gan.latents) == (0.25, str(inputs.latents))
    for argument, message in (
        ("{latents: x, wieght: 0.1}", r"unknown key gan\.wieght on the command line; did you mean gan\.weight"),
        ("{latents: x, latents: y", "not valid YAML"),
    ):
        with pytest.raises(ConfigError, match=message):
            read([*file, "--gan", argument])
    with pytest.raises(ConfigError, match=r"unknown key dmd\.a on the command line"):
        read([*file, "--dmd", "{a: 1}"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GridStudentConfig(optimizer=OPTIMIZER, lora_alpha=2.0), r"lora_alpha is 2\.0 with lora_rank 0"),
        (lambda: GridStudentConfig(optimizer=OPTIMIZER, lora_rank=-1), "lora_rank is -1"),
        (lambda: GridStudentConfig(optimizer=OPTIMIZER, shift=0.0), r"shift is 0\.0; it must be positive"),
        (lambda: GridStudentConfig(optimizer=OPTIMIZER, ema_decay=1.0), r"ema_decay 1\.0 must lie in \[0, 1\)"),
        (lambda: FakeScoreConfig(optimizer=OPTIMIZER, lora_alpha=2.0), r"lora_alpha is 2\.0 with lora_rank 0"),
        (lambda: TeacherConfig(path="x", guidance=math.inf), "guidance is inf"),
        (lambda: SampleDataConfig(prompts="x", sample_count=0), "sample_count is 0"),
        (lambda: SampleDataConfig(prompts="x", width=-8), "width is -8"),
        (lambda: FDistillObjective(divergence="rkl", time_bins=4), "time_bins with divergence 'rkl'"),
        (lambda: FDistillObjective(divergence="js", time_bins=-1), "time_bins is -1"),
    ],
)
def test_a_value_that_nothing_would_read_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_two_methods_in_one_file_are_both_named(config: DmdConfig, tmp_path: Path) -> None:
    save_resolved(tmp_path / "config.yaml", config)
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("sid: {}\n")
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8").replace("sid: null\n", "")
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="the sections dmd and sid are given, and a run has one method"):
        read(["--config", str(tmp_path / "config.yaml")])
