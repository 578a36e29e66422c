"""Exports of causal students: a run becomes a directory that streams what the training rolled out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.causal_video.denoise import ChunkNoise, VideoCondition
from fewstep.causal_video.export import pipeline as export_module
from fewstep.causal_video.export.pipeline import check_verification, export_causal_run, merged_network
from fewstep.causal_video.export.run import load_run_network, read_causal_run
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.rollout import rollout
from fewstep.causal_video.settings import FILE_NAME, CausalSettings
from fewstep.causal_video.stages.train import train_causal_video
from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
from fewstep.core.export.check import ExportMismatchError
from fewstep.core.export.record import Verification
from fewstep.core.teacher import Teacher
from fewstep.core.training.checkpoint import latest_checkpoint
from tests.causal_video.tiny_causal import largest
from tests.causal_video.tiny_causal_run import VideoInputs, tiny_causal


@pytest.fixture(scope="module")
def run(inputs: VideoInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of tf_dcm."""
    folder = tmp_path_factory.mktemp("run") / "student"
    assert train_causal_video(tiny_causal(inputs, folder, "tf_dcm", {"run.steps": 2})) == 0
    return folder


def test_an_export_streams_what_the_training_rolls_out(run: Path) -> None:
    output, record = export_causal_run(run)
    assert output == run / "export"
    assert record.training_step == 2
    assert record.ema
    assert record.verification.sampler_difference < 1e-6
    assert record.verification.rounding_difference == 0
    assert record.stock_difference < 1e-5
    content = json.loads((output / "distillation.json").read_text(encoding="utf-8"))
    assert (content["method"], content["training_step"]) == (record.method, 2)
    assert content["settings"]["layout"]["lengths"] == list(record.settings.layout.lengths)
    assert content["verification"]["sampler_difference"] == record.verification.sampler_difference
    assert (record.defaults.height, record.defaults.width) == (32, 32)
    files = sorted(path.name for path in output.iterdir() if path.is_file())
    assert files == ["README.md", FILE_NAME, "distillation.json", "model_index.json"]
    assert not list(output.rglob("*.bin"))
    pipe = CausalVideoPipeline.from_pretrained(output)
    assert pipe.settings == CausalSettings.load(run)
    latents = torch.cat([chunk.latents for chunk in pipe.stream("a red cat", chunks=3, seed=4)], dim=2)
    with torch.no_grad():
        rolled = rollout(
            pipe.network,
            VideoCondition(pipe.encode(["a red cat"])),
            ChunkNoise(4, (0,), pipe.latent_size(), stream="stream"),
            pipe.settings,
            exits=pipe.settings.schedule.exits(2, 3),
        )
    assert torch.equal(latents, rolled.video)
    card = (output / "README.md").read_text()
    assert "text-to-video" in card
    assert "Later chunks repeat the last row. A chunk sees all of the past; context is clean." in card
    assert str(run.parent) not in card + (output / "distillation.json").read_text()
    with pytest.raises(FileExistsError):
        export_causal_run(run)


def test_weights_and_steps_can_be_chosen(run: Path, tmp_path: Path) -> None:
    _, record = export_causal_run(run, tmp_path / "live", weights="live", steps=[2, 1], dtype="bfloat16")
    assert not record.ema
    assert [len(times) for times in record.settings.schedule.times] == [2, 1]
    assert [len(times) for times in record.trained_times] == [3, 2]
    assert 0 < record.verification.rounding_difference < 0.1
    stored = load_file(tmp_path / "live" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert stored["patch_embedding.weight"].dtype == torch.bfloat16
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    trained = load_file(checkpoint / "student.safetensors")
    assert torch.equal(stored["patch_embedding.weight"], trained["transformer.patch_embedding.weight"].bfloat16())
    assert "It was trained at other times" in (tmp_path / "live" / "README.md").read_text()


@pytest.mark.slow
def test_adapters_are_merged(inputs: VideoInputs, tmp_path: Path) -> None:
    changes = {"run.steps": 3, "student.init": str(inputs.init), "data.image_share": 0.0}
    folder = tmp_path / "student"
    assert train_causal_video(tiny_causal(inputs, folder, "self_forcing_lora", changes)) == 0
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    config = read_causal_run(folder)
    with_adapters, step = load_run_network(config, Teacher.load(config.teacher.path), checkpoint, "live")
    assert step == 3
    _, record = export_causal_run(folder, weights="live")
    assert record.verification.sampler_difference < 1e-6
    pipe = CausalVideoPipeline.from_pretrained(folder / "export")
    base = load_file(inputs.init)
    weight = pipe.network.transformer.state_dict()["blocks.0.attn1.to_q.weight"]
    assert largest(weight, base["blocks.0.attn1.to_q.weight"]) > 1e-6
    assert largest(weight, base["blocks.0.attn1.to_q.weight"]) < 0.1
    x, t, text = torch.randn(1, 4, 3, 8, 8), torch.tensor([0.5]), pipe.encode(["a red cat"])
    with torch.no_grad():
        trained = CausalWan(with_adapters.eval()).bidirectional(x, t, text)
        assert largest(pipe.network.bidirectional(x, t, text), trained) < 1e-4
    assert set(merged_network(with_adapters).state_dict()) == set(base)


@pytest.mark.slow
def test_runs_that_cannot_be_exported(run: Path, inputs: VideoInputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the directory of a run of scripts/train_causal_video"):
        export_causal_run(tmp_path)
    with pytest.raises(ValueError, match="dtype 'int8'"):
        export_causal_run(run, tmp_path / "a", dtype="int8")
    with pytest.raises(ValueError, match="no checkpoint checkpoint-9"):
        export_causal_run(run, tmp_path / "a", checkpoint="checkpoint-9")
    flow = tmp_path / "flow"
    assert train_causal_video(tiny_causal(inputs, flow, "teacher_forcing", {"run.steps": 1})) == 0
    with pytest.raises(ValueError, match="trains a many-step student of a flow"):
        export_causal_run(flow)
    _, record = export_causal_run(flow, steps=[5])
    assert len(record.settings.schedule.of(0)) == 5
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no export"):
        export_causal_run(run, tmp_path / "notes", overwrite=True)


def test_an_export_that_streams_something_else_does_not_appear(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export_module.write_pipeline

    def damage(pipeline: Any, stored: Any, settings: Any, draft: Path, dtype: torch.dtype, **how: Any) -> None:
        write(pipeline, stored, settings, draft, dtype, **how)
        path = draft / "transformer" / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        weights["proj_out.weight"] *= 1.01
        save_file(weights, path, metadata={"format": "pt"})

    monkeypatch.setattr(export_module, "write_pipeline", damage)
    with pytest.raises(ExportMismatchError, match="the stream of the export and the rollout"):
        export_causal_run(run, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    assert list(tmp_path.iterdir()) == []
    check_verification(Verification(1e-6, 3e-5, 0.0, 1e-5), 1e-6, "float32")
    for found, stock in (((float("nan"), 0.0), 0.0), ((0.0, 1e-4), 0.0), ((0.0, 0.0), 1e-3)):
        with pytest.raises(ExportMismatchError):
            check_verification(Verification(found[0], 3e-5, found[1], 1e-5), stock, "float32")
