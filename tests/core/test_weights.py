"""One meaning of `student.init`: whatever holds a student's weights gives the same network."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.core.denoiser import Denoiser
from fewstep.core.families.table import build_family
from fewstep.core.networks.lora import add_lora
from fewstep.core.training.checkpoint import save_checkpoint
from fewstep.core.weights import WEIGHTS_NAME, find_weights, load_weights
from tests.tiny_pipelines import build_sd3, save_pipeline


def moved_network() -> nn.Module:
    """The tiny transformer with weights that no other one has."""
    network = build_sd3().transformer
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.add_(0.01 * (number + 1))
    return network


def of_denoiser(network: nn.Module) -> dict[str, Tensor]:
    """What a trainer stores."""
    return dict(Denoiser(network, build_family(build_sd3())).state_dict())


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as a run of two checkpoints, one of its checkpoints, an export, shards, a folder and a file."""
    folder, network = tmp_path_factory.mktemp("weights"), moved_network()
    run = folder / "run"
    early = {name: torch.zeros_like(tensor) for name, tensor in of_denoiser(network).items()}
    save_checkpoint(run, 1, tensors={"student": early, "student_ema": early}, state={}, keep=3)
    latest = {"student": early, "student_ema": of_denoiser(network), "fake_score": {"a": torch.ones(1)}}
    save_checkpoint(run, 2, tensors=latest, state={}, keep=3)
    pipeline = build_sd3()
    pipeline.register_modules(transformer=network)
    save_pipeline(pipeline, folder / "export")
    pipeline.transformer.save_pretrained(folder / "sharded" / "transformer", max_shard_size="20KB")
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / "plain.safetensors"
    )
    return {
        "run": run,
        "checkpoint": run / "checkpoint-2",
        "export": folder / "export",
        "shards": folder / "sharded",
        "folder": folder / "export" / "transformer",
        "file": folder / "plain.safetensors",
        "file of a checkpoint": run / "checkpoint-2" / "student_ema.safetensors",
    }


KINDS = ("run", "checkpoint", "export", "shards", "folder", "file", "file of a checkpoint")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_network(stored: dict[str, Path], kind: str) -> None:
    weights, network = find_weights(str(stored[kind])), build_sd3().transformer
    load_weights(network, weights)
    expected = moved_network().state_dict()
    assert set(weights.names()) >= {name for name, _ in network.named_parameters()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    assert (len(weights.files) > 3) == (kind == "shards")


def test_a_run_brings_its_fake_score(stored: dict[str, Path]) -> None:
    for kind in ("run", "checkpoint"):
        found = find_weights(str(stored[kind]))
        assert found.run == stored["run"].resolve()
        assert found.beside("fake_score") == stored["checkpoint"] / "fake_score.safetensors"
        assert found.beside("time_weight") is None
    assert find_weights(str(stored["export"])).beside("fake_score") is None


def test_what_holds_no_weights_is_named(stored: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"steered_teacher nowhere is no \.safetensors file, no run directory"):
        find_weights("nowhere", "steered_teacher")
    with pytest.raises(ValueError, match=r"student.init .* is no \.safetensors file"):
        find_weights(str(tmp_path))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"student.init .*broken.safetensors cannot be read"):
        find_weights(str(broken)).names()
    index = stored["shards"] / "transformer" / f"{WEIGHTS_NAME}.index.json"
    copy = tmp_path / "transformer"
    copy.mkdir()
    content = json.loads(index.read_text(encoding="utf-8"))
    (copy / index.name).write_text(json.dumps(content), encoding="utf-8")
    files = len(set(content["weight_map"].values()))
    with pytest.raises(ValueError, match=rf"student.init .*transformer lacks {files} of its {files} files"):
        find_weights(str(tmp_path))


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run", 1, tensors={"latent_reward": {"a": torch.ones(1)}}, state={}, keep=1)
    with pytest.raises(ValueError, match=r"holds no student_ema.safetensors: it is no checkpoint of a student"):
        find_weights(str(tmp_path / "run"))


def test_adapters_alone_are_refused(tmp_path: Path) -> None:
    pipeline = build_sd3()
    add_lora(pipeline.transformer, rank=2, alpha=2.0, targets=build_family(pipeline).lora_targets, seed=0)
    tensors = {f"network.{name}": p.detach() for name, p in pipeline.transformer.named_parameters() if p.requires_grad}
    save_checkpoint(tmp_path / "run", 1, tensors={"student": tensors, "student_ema": tensors}, state={}, keep=1)
    found = find_weights(str(tmp_path / "run"))
    assert found.holds_adapters
    with pytest.raises(ValueError, match="holds adapters alone, without the weights under them: export that run"):
        load_weights(build_sd3().transformer, found)


def test_weights_of_another_network_are_counted(stored: dict[str, Path]) -> None:
    wrong = find_weights(str(stored["export"] / "vae"))
    with pytest.raises(ValueError, match=r"student.init .*vae does not fit the teacher's network: \d+ weights missing"):
        load_weights(build_sd3().transformer, wrong)
    before = build_sd3().transformer
    expected = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    with pytest.raises(ValueError, match="unknown"):
        load_weights(before, wrong)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in before.state_dict().items())


def test_an_export_of_a_flow_map_is_no_start(stored: dict[str, Path], tmp_path: Path) -> None:
    """Its weights fit the teacher's network, and stand for its own grid of times alone."""
    folder = tmp_path / "export"
    shutil.copytree(stored["export"], folder)
    record = {"sampler": "flow_map", "pipeline": "StableDiffusion3Pipeline", "second_time": "sum"}
    (folder / "distillation.json").write_text(json.dumps(record), encoding="utf-8")
    for given in (folder, folder / "transformer", folder / "transformer" / WEIGHTS_NAME):
        weights = find_weights(str(given))
        assert weights.stated("second_time") == "sum"
        with pytest.raises(ValueError, match="export of a flow map: its second time is baked"):
            load_weights(build_sd3().transformer, weights)
    (folder / "distillation.json").write_text(json.dumps(record | {"sampler": "sde"}), encoding="utf-8")
    load_weights(build_sd3().transformer, find_weights(str(folder)))
    assert find_weights(str(stored["file"])).stated("second_time") is None
