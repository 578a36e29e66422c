"""Exports from run directories, and the script around them."""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.core.denoiser import Denoiser
from fewstep.core.export.record import read_record
from fewstep.core.export.run import ExportFiles, export_run
from fewstep.core.families.table import build_family
from fewstep.core.grids import step_grid
from fewstep.core.networks.lora import add_lora
from fewstep.core.run_settings import RunSettings, read_settings
from fewstep.core.training.checkpoint import save_checkpoint
from tests.tiny_pipelines import build_sd3, save_pipeline


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_pipeline(build_sd3(), tmp_path_factory.mktemp("teacher") / "tiny_sd3")


def trained_tensors(lora_rank: int, seed: int) -> dict[str, Tensor]:
    """What a trainer stores of a student: the tensors that were trained, under the names of its Denoiser."""
    pipeline = build_sd3()
    family = build_family(pipeline)
    network: nn.Module = family.network(pipeline)
    if lora_rank:
        add_lora(network, rank=lora_rank, alpha=8.0, targets=family.lora_targets, seed=0)
    denoiser = Denoiser(network, family)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in denoiser.named_parameters()
        if parameter.requires_grad
    }


def make_run(directory: Path, teacher: Path, *, lora_rank: int = 0, ema: bool = True) -> Path:
    run = directory / "tiny_2step"
    for step in (10, 20):
        tensors = {"student": trained_tensors(lora_rank, step)}
        if ema:
            tensors["student_ema"] = trained_tensors(lora_rank, step + 1)
        save_checkpoint(run, step, tensors=tensors, state={}, keep=2)
    RunSettings(
        method="dmd",
        teacher_path=str(teacher),
        guidance=2.5,
        steps=2,
        shift=3.0,
        sampler="sde",
        lora_rank=lora_rank,
        lora_alpha=8.0,
    ).save(run)
    return run


def test_settings_are_read_and_missing_keys_are_named(tmp_path, teacher):
    run = make_run(tmp_path, teacher)
    found = read_settings(run)
    assert (found.method, found.teacher_path, found.guidance, found.steps, found.shift) == (
        "dmd",
        str(teacher),
        2.5,
        2,
        3,
    )
    assert (found.sampler, found.lora_alpha, found.any_steps, found.second_time) == ("sde", 8.0, False, "none")
    content = json.loads((run / "student.json").read_text(encoding="utf-8"))
    older = {name: value for name, value in content.items() if name not in ("times", "teacher_dtype", "lora_targets")}
    (run / "student.json").write_text(json.dumps(older), encoding="utf-8")
    assert read_settings(run) == found
    (run / "student.json").write_text(json.dumps({**content, "stepz": 1}), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"student\.json does not describe a student: its keys \['stepz'\] are unknown"
    ):
        read_settings(run)
    del content["shift"]
    (run / "student.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"student\.json does not describe a student: .*'shift'"):
        read_settings(run)
    with pytest.raises(ValueError, match=r"student\.json does not exist"):
        read_settings(tmp_path)


def test_latest_average_is_exported_by_default(tmp_path, teacher):
    run = make_run(tmp_path, teacher)
    directory, record = export_run(run)
    assert directory == run / "export"
    assert (record.training_step, record.ema, record.name, record.base_model) == (20, True, "tiny_2step", "tiny_sd3")
    assert (record.training_guidance, record.times) == (2.5, step_grid(2, shift=3.0))
    directory, record = export_run(run, checkpoint="checkpoint-10", weights="live", output=tmp_path / "live")
    assert (record.training_step, record.ema) == (10, False)
    stored = load_file(directory / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = trained_tensors(0, 10)
    assert len(expected) > 50
    assert all(torch.equal(stored[name.removeprefix("network.")], tensor) for name, tensor in expected.items())


def test_the_newest_grid_and_the_hubs_id_are_on_the_card(tmp_path, teacher):
    """Of the grids up to the exported step, never that of the start."""
    run = make_run(tmp_path, teacher)
    (run / "samples").mkdir()
    for step in (0, 5, 10, 30):
        (run / "samples" / f"step-{step:07d}.png").write_bytes(f"grid {step}".encode())
    (run / "samples" / "step-0000020 (copy).png").write_bytes(b"stray")
    directory, record = export_run(run, files=ExportFiles(hub_id="owner/teacher"))
    assert (record.picture_step, record.base_model_id) == (10, "owner/teacher")
    assert (directory / "samples.png").read_bytes() == b"grid 10"
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert "base_model: owner/teacher\nbase_model_relation: finetune\n" in card
    assert "at step 10 of the training" in card
    directory, record = export_run(run, checkpoint="checkpoint-10", output=tmp_path / "earlier")
    assert "same prompts and seeds.\n" in (directory / "README.md").read_text(encoding="utf-8")
    assert record.base_model_id is None
    with pytest.raises(ValueError, match="base_model is 'teacher'; give the id of a model of the hub"):
        export_run(run, output=tmp_path / "no", files=ExportFiles(hub_id="teacher"))


def test_a_student_that_renoises_is_exported_where_seeds_hold(tmp_path, teacher):
    run = make_run(tmp_path, teacher)
    directory, record = export_run(run, sampler="ode")
    assert (record.sampler, record.training_sampler, record.step_noise) == ("ode", "sde", "none")
    assert "these files follow the velocity instead" in (directory / "README.md").read_text(encoding="utf-8")
    scheduler = json.loads((directory / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert scheduler["stochastic_sampling"] is False
    settings = dataclasses.replace(read_settings(run), sampler="ode")
    settings.save(run)
    with pytest.raises(
        ValueError, match="trained a student of the sampler 'ode' by dmd, which samples in no other way"
    ):
        export_run(run, sampler="sde", output=tmp_path / "no")


def test_adapters_of_a_run_are_merged_or_written_alone(tmp_path, teacher):
    run = make_run(tmp_path, teacher, lora_rank=2)
    assert export_run(run)[1].weights == "merged"
    directory, record = export_run(run, output=tmp_path / "lora", files=ExportFiles(lora_only=True))
    assert record.weights == "lora"
    assert (directory / "pytorch_lora_weights.safetensors").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "ema"}, r"no student_ema\.safetensors, only student"),
        (
            {"checkpoint": "checkpoint-7", "weights": "live"},
            "no checkpoint checkpoint-7; .*checkpoint-10, checkpoint-20",
        ),
        ({"files": ExportFiles(dtype="int8")}, "dtype 'int8'"),
        ({"steps": 4}, "train one of 4 steps"),
    ],
)
def test_unusable_requests_are_named(tmp_path, teacher, arguments, message):
    run = make_run(tmp_path, teacher, ema=False)
    with pytest.raises(ValueError, match=message):
        export_run(run, **arguments)
    assert not (run / "export").exists()


def test_weights_of_another_network_are_named(tmp_path, teacher):
    run = make_run(tmp_path, teacher)
    tensors = trained_tensors(0, 1)
    tensors["network.extra.weight"] = tensors.pop("network.proj_out.weight")
    save_checkpoint(run, 30, tensors={"student_ema": tensors}, state={}, keep=3)
    with pytest.raises(ValueError, match=r"1 missing \['proj_out\.weight'\], 1 unexpected \['extra\.weight'\]"):
        export_run(run)


def run_script(monkeypatch, repository: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["export_pipeline.py", *arguments])
    runpy.run_path(str(repository / "scripts" / "export_pipeline.py"), run_name="__main__")


def test_script_prints_the_arguments_and_the_snippet(tmp_path, teacher, repository, monkeypatch, capsys):
    run = make_run(tmp_path, teacher)
    run_script(monkeypatch, repository, "--run", str(run))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run / 'export'}: step 20, call the pipeline with num_inference_steps=2, guidance_scale=1.0"
    assert lines.count(f'pipeline = DiffusionPipeline.from_pretrained("{run / "export"}")') == 1
    assert read_record(run / "export").training_step == 20
    with pytest.raises(SystemExit) as caught:
        run_script(monkeypatch, repository, "--run", str(run))
    assert str(caught.value.code).startswith("error: ")
    assert str(caught.value.code).count("overwrite=True") == 1


def test_help_imports_nothing_heavy(repository):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['export_pipeline.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(repository / 'scripts' / 'export_pipeline.py')!r}, run_name='__main__')\n"
        "except SystemExit as error:\n"
        "    assert error.code == 0\n"
        "print(sorted(name for name in ('torch', 'diffusers', 'fewstep.core') if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.count("--overwrite") >= 1
