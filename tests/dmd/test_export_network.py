"""A run's networks as folders that roles of another run start from, fresh adapters on top (RTDMD's second stage)."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.export.network import NetworkRole, export_network
from fewstep.core.export.run import export_run, load_run_student
from fewstep.core.fake_score import FakeScoreOutput
from fewstep.core.run_settings import read_settings
from fewstep.core.teacher import Teacher
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.dmd.reward.train import train_reward
from fewstep.dmd.train import train_dmd
from tests.dmd.reward.reward_run import METHODS, reward_config, started
from tests.dmd.tiny_run import TinyInputs, start, tiny_config

BASE: dict[str, Any] = {"teacher.dtype": "bfloat16", "student.steps": 2, "run.steps": 2, "run.checkpoint_every": 2}
ADAPTERS: dict[str, Any] = {"student.lora_rank": 2, "student.lora_alpha": 3.0, "fake_score.lora_rank": 3}
KINDS: dict[str, dict[str, Any]] = {"adapters": {**BASE, **ADAPTERS}, "whole": {**BASE, "gan": None}}


@pytest.fixture(scope="module")
def runs(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two steps with adapters on a bf16 base, and of all weights."""
    found = {}
    for kind, changes in KINDS.items():
        found[kind] = tmp_path_factory.mktemp(kind) / "run"
        assert train_dmd(tiny_config(inputs, found[kind], changes)) == 0
    return found


def files_of(folder: Path) -> dict[str, str]:
    """Hashes by name, without the network."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder).parts[0] != "transformer"
    }


def trained_velocity(inputs: TinyInputs, run: Path, kind: str, role: str, places: tuple[Any, ...]) -> Tensor:
    """That of a role of the run, resumed."""
    setup, trainer = start(tiny_config(inputs, run.parent / "again", KINDS[kind]))
    trainer.resume(list_checkpoints(run)[-1])
    with torch.no_grad():
        if role == "fake_score":
            output = setup.fake_role.module(*places)
            assert isinstance(output, FakeScoreOutput)
            found = output.velocity
        else:
            found = setup.student.denoiser(*places)
    trainer.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["student_live", "fake_score"])
def test_the_folder_holds_the_network_as_it_was_trained(
    inputs: TinyInputs, runs: dict[str, Path], tmp_path: Path, kind: str, role: NetworkRole
) -> None:
    folder = export_network(runs[kind], tmp_path / "network", role=role)
    found = Teacher.load(folder)
    x, t = torch.randn((2, *found.latent_shape()), generator=torch.Generator().manual_seed(3)), torch.tensor([0.4, 0.9])
    places = x, t, found.encode(["a red cat", "two dogs"])
    with torch.no_grad():
        velocity = found.denoiser(*places)
    trained = trained_velocity(inputs, runs[kind], kind, role, places)
    # Adapters on a bf16 base compute in bf16, which the merged network in fp32 does not; a fake score of all weights
    # has the table of positions of its bf16 teacher, 1.3e-3.
    close = {("whole", "student_live"): 1e-5, ("whole", "fake_score"): 5e-3}
    torch.testing.assert_close(velocity, trained, rtol=0, atol=close.get((kind, role), 0.05))
    with torch.no_grad():
        plain = Teacher.load(inputs.teacher).denoiser(*places)
    assert float((velocity - plain).abs().max()) > 1e-3
    assert files_of(folder) == files_of(inputs.teacher)


def test_the_average_is_that_of_the_export(runs: dict[str, Path], tmp_path: Path) -> None:
    """Exact: the weights under the adapters are the bf16 ones that training saw, merged in fp32."""
    folder = export_network(runs["adapters"], tmp_path / "network")
    loaded = load_run_student(runs["adapters"], read_settings(runs["adapters"]))
    x = torch.randn((2, *loaded.teacher.latent_shape()), generator=torch.Generator().manual_seed(3))
    places = x, torch.tensor([0.4, 0.9]), loaded.teacher.encode(["a red cat", "two dogs"])
    with torch.no_grad():
        torch.testing.assert_close(
            Teacher.load(folder).denoiser(*places), loaded.student.denoiser(*places), rtol=0, atol=1e-5
        )
    half = export_network(runs["adapters"], tmp_path / "half", dtype=torch.bfloat16)
    with torch.no_grad():
        error = Teacher.load(half).denoiser(*places) - loaded.student.denoiser(*places)
    assert 0 < float(error.abs().max()) < 0.05


@pytest.mark.slow
def test_rewards_go_on_with_fresh_adapters_on_both(inputs: TinyInputs, runs: dict[str, Path], tmp_path: Path) -> None:
    """As RTDMD's second stage does; the student's export is then the merged one with its new adapters in."""
    student = export_network(runs["adapters"], tmp_path / "student")
    fake = export_network(runs["adapters"], tmp_path / "fake", role="fake_score")
    changes: dict[str, Any] = {
        **METHODS["rtdmd"],
        "teacher.dtype": "bfloat16",
        "student.init": None,
        "student.path": str(student),
        "fake_score.path": str(fake),
        "student.lora_rank": 2,
        "student.lora_alpha": 2.0,
        "fake_score.lora_rank": 2,
        "matching.cold_start_steps": 0,
    }
    config = reward_config(inputs, runs["adapters"], tmp_path / "run", "rtdmd", changes)
    assert train_reward(config) == 0
    tensors = load_checkpoint(list_checkpoints(tmp_path / "run")[-1]).tensors
    for role in ("student", "fake_score"):
        assert all(".lora_" in name for name in tensors[role])
        # The second factor of fresh adapters is zero, and has moved.
        assert max(float(value.abs().max()) for name, value in tensors[role].items() if ".lora_B" in name) > 1e-5
    # The export is compared with the training's sampler before it appears.
    assert export_run(tmp_path / "run", output=tmp_path / "export")[1].num_inference_steps == 2
    loaded = load_run_student(tmp_path / "run", read_settings(tmp_path / "run"))
    # Under the new adapters lie the merged weights, rounded as training had them, and not the teacher's.
    layer = "transformer_blocks.0.attn.to_q"
    under = dict(loaded.student.denoiser.network.named_parameters())[f"{layer}.base_layer.weight"]
    merged, plain = (
        dict(Teacher.load(place).denoiser.network.named_parameters())[f"{layer}.weight"]
        for place in (student, inputs.teacher)
    )
    assert torch.equal(under, merged.bfloat16().float())
    assert not torch.equal(under, plain.bfloat16().float())


def test_reference_and_older_policy_of_adapters_stand_on_one_base(
    inputs: TinyInputs, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Frozen weights are there once for student, reference and older policy; the reference begins as the base."""
    student = export_network(runs["adapters"], tmp_path / "student")
    changes = {"teacher.dtype": "bfloat16", "student.init": None, "student.path": str(student), "student.lora_rank": 2}
    with started(reward_config(inputs, runs["adapters"], tmp_path / "run", "nft", changes)) as (method, _):
        setup: Any = method.setup  # pyright: ignore[reportAttributeAccessIssue]
        older = next(iter(setup.snapshots.values())).module
        networks = [setup.student.denoiser, setup.reference, older]
        found = [dict(denoiser.network.named_parameters()) for denoiser in networks]
        assert found[0].keys() == found[1].keys() == found[2].keys()
        adapters = [name for name in found[0] if ".lora_" in name]
        assert len(adapters) > 10
        for name in found[0]:
            places = {weights[name].data_ptr() for weights in found}
            assert len(places) == (3 if ".lora_" in name else 1), name
        base = Teacher.load(student, dtype=torch.bfloat16).denoiser
        x_t, t = torch.randn(2, *setup.latent_shape), torch.tensor([0.25, 0.5])
        condition = setup.prompts.rows([0, 1])
        with torch.no_grad():
            assert torch.equal(setup.reference(x_t, t, condition), base(x_t, t, condition))


def test_a_fake_score_of_another_scale_is_refused(inputs: TinyInputs, runs: dict[str, Path], tmp_path: Path) -> None:
    changes = {**KINDS["adapters"], "fake_score.init": str(runs["adapters"]), "fake_score.lora_alpha": 60.0}
    with pytest.raises(ValueError, match=r"trained with lora_alpha .*, and fake_score\.lora_alpha is 60\.0"):
        start(tiny_config(inputs, tmp_path, changes))


def test_a_folder_with_two_kinds_of_weights_gets_a_plain_network(
    inputs: TinyInputs, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Its encoders are there plain and in fp16: the network is what a role looks for, and hidden files stay behind."""
    both = tmp_path / "both"
    shutil.copytree(inputs.teacher, both)
    Teacher.load(inputs.teacher, dtype=torch.float16).pipeline.save_pretrained(both, variant="fp16")
    (both / ".cache").mkdir()
    (both / "model.safetensors").write_bytes(b"x")
    changes = {**BASE, "teacher.path": str(both), "teacher.variant": "fp16"}
    assert train_dmd(tiny_config(inputs, tmp_path / "run", changes)) == 0
    folder = export_network(tmp_path / "run", tmp_path / "network")
    assert sorted(file.name for file in (folder / "transformer").glob("*.safetensors")) == [
        "diffusion_pytorch_model.safetensors"
    ]
    assert not (folder / ".cache").exists()
    assert not (folder / "model.safetensors").exists()
    setup, trainer = start(tiny_config(inputs, tmp_path / "next", {**changes, "student.path": str(folder)}))
    trainer.close()
    assert len(setup.prompts) == 5


def test_what_cannot_be_written_is_named(inputs: TinyInputs, runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="give another folder"):
        export_network(runs["whole"], tmp_path / "there")
    with pytest.raises(ValueError, match=r"student\.json does not exist"):
        export_network(tmp_path / "nowhere", tmp_path / "network")
    with pytest.raises(ValueError, match="there is no checkpoint checkpoint-9"):
        export_network(runs["whole"], tmp_path / "network", role="fake_score", checkpoint="checkpoint-9")
    alone = reward_config(inputs, runs["whole"], tmp_path / "alone", "nft", {"run.steps": 2})
    assert train_reward(alone) == 0
    with pytest.raises(ValueError, match="has no fake score: give the run of a method that trains one"):
        export_network(tmp_path / "alone", tmp_path / "network", role="fake_score")
    assert not (tmp_path / "network").exists()


def test_the_script_writes_the_folder(repository: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    call = [sys.executable, str(repository / "scripts" / "export_network.py"), "--run", str(runs["whole"])]
    call += ["--role", "fake_score", "--output", str(tmp_path / "fake")]
    first = subprocess.run(call, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "for fake_score.path of another run of the same teacher" in first.stdout
    assert (tmp_path / "fake" / "transformer" / "config.json").is_file()
