"""Consistency students of a teacher of videos: two steps of each method, samples, exports, exact resume, mistakes."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from PIL import Image

from fewstep.consistency.sections import DmfConfig
from fewstep.consistency.train import train_consistency, train_step
from fewstep.core.data import LatentDataset
from fewstep.core.export.run import export_run, load_run_student
from fewstep.core.grids import step_grid
from fewstep.core.run_settings import read_settings
from fewstep.core.student import Student
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from tests.consistency.tiny_consistency_run import start_consistency, tiny_consistency
from tests.consistency.tiny_video_run import HEADS, MATCHED, MCM, VIDEO_CASES, VideoInputs, tiny_video, write_inputs
from tests.dmd.tiny_run import TinyInputs, assert_same_checkpoint
from tests.tiny_videos import VIDEO_FRAMES, VIDEO_LATENTS, VIDEO_SIDE

GOLDEN = Path(__file__).parent / "golden_video.json"
CALL: Any = {"height": VIDEO_SIDE, "width": VIDEO_SIDE, "num_frames": VIDEO_FRAMES, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> VideoInputs:
    return write_inputs(tmp_path_factory.mktemp("videos"))


def two_steps(inputs: VideoInputs, folder: Path, name: str) -> list[dict[str, float]]:
    """Metrics of two steps; `moved` is how far they moved the student's weights on average."""
    config = tiny_video(inputs, folder, name)
    setup, trainer = start_consistency(config)
    found = []
    for _ in range(2):
        before = [value.detach().clone() for _, value in setup.student_role.parameters]
        metrics = train_step(config, setup, trainer)
        pairs = zip(setup.student_role.parameters, before, strict=True)
        moved = sum(float((value.detach() - old).double().abs().sum()) for (_, value), old in pairs)
        trainer.advance()
        losses = {key: float(value) for key, value in metrics.items() if key.endswith(("_loss", "_logit"))}
        found.append({**losses, "moved": moved / sum(value.numel() for value in before)})
    trainer.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", VIDEO_CASES)
def test_two_steps_give_the_committed_numbers(videos: VideoInputs, tmp_path: Path, name: str) -> None:
    found = two_steps(videos, tmp_path, name)
    known = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.is_file() else {}
    if os.environ.get("UPDATE_GOLDEN") == "1":
        known[name] = found
        GOLDEN.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    for metrics, golden in zip(found, known[name], strict=True):
        assert metrics == pytest.approx(golden, rel=2e-3, abs=1e-6)
    assert 1e-4 < found[0]["moved"] < 1e-2
    assert known.keys() <= VIDEO_CASES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rcm", "anyflow", "mcm"])
def test_a_resumed_run_equals_an_uninterrupted_one(videos: VideoInputs, tmp_path: Path, name: str) -> None:
    assert train_consistency(tiny_video(videos, tmp_path / "straight", name)) == 0
    assert train_consistency(tiny_video(videos, tmp_path / "resumed", name, {"steps": 2})) == 0
    assert train_consistency(tiny_video(videos, tmp_path / "resumed", name, {"resume": "latest"})) == 0
    left, right = (load_checkpoint(list_checkpoints(tmp_path / folder)[-1]) for folder in ("straight", "resumed"))
    assert left.step == 4
    assert_same_checkpoint(left, right)


@pytest.mark.slow
def test_one_time_exports_as_a_wan_pipeline_at_any_steps(videos: VideoInputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train_consistency(tiny_video(videos, run, "mcm", {"steps": 1})) == 0
    for steps in (1, 2, 4):
        path, record = export_run(run, steps=steps, output=tmp_path / f"export_{steps}")
        assert record.times == step_grid(steps, shift=3.0)
        assert record.verification is not None
        assert record.verification.sampler_difference < 1e-5
        assert record.call_arguments() == {"num_inference_steps": steps, "guidance_scale": 1.0, **CALL}
        assert type(DiffusionPipeline.from_pretrained(path)) is WanPipeline


def test_anyflow_exports_once_for_all_steps(videos: VideoInputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train_consistency(tiny_video(videos, run, "anyflow", {"steps": 1})) == 0
    path, record = export_run(run)
    assert (record.pipeline, record.any_steps) == ("AnyFlowPipeline", True)
    pipeline: Any = DiffusionPipeline.from_pretrained(path)
    assert type(pipeline).__name__ == "AnyFlowPipeline"
    pipeline.set_progress_bar_config(disable=True)
    loaded = load_run_student(run, read_settings(run))
    noise = torch.randn(1, *VIDEO_LATENTS, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        condition = loaded.teacher.encode(["a red cat"])
    for steps in (1, 2, 8):
        found = pipeline(
            "a red cat", latents=noise.clone(), output_type="latent", num_inference_steps=steps, **CALL
        ).frames
        student = Student(loaded.student.denoiser, step_grid(steps, shift=3.0), "flow_map")
        expected = student.sample(noise, condition)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    # A run goes on from the export as from the run, to the last bit; another kind of second time is refused.
    begun = []
    for number, init in enumerate((run, path)):
        config = tiny_video(videos, tmp_path / str(number), "anyflow", {"steps": 1})
        config = dataclasses.replace(config, student=dataclasses.replace(config.student, init=str(init)))
        setup, trainer = start_consistency(config)
        trainer.close()
        begun.append(setup.student.denoiser.network.state_dict())
    assert all(torch.equal(tensor, begun[1][name]) for name, tensor in begun[0].items())
    other = tiny_video(videos, tmp_path / "other", "anyflow", {"steps": 1})
    assert other.anyflow is not None
    told = dataclasses.replace(other.student, init=str(path))
    other = dataclasses.replace(other, student=told, anyflow=dataclasses.replace(other.anyflow, second_time="sum"))
    with pytest.raises(ValueError, match="whose second time is 'gate', and this method has 'sum'"):
        start_consistency(other)


def test_the_sample_grid_has_a_row_of_frames_for_each_video(videos: VideoInputs, tmp_path: Path) -> None:
    assert train_consistency(tiny_video(videos, tmp_path / "run", "dcm", {"steps": 1, "sample_every": 1})) == 0
    pictures = sorted((tmp_path / "run" / "samples").glob("*.png"))
    assert len(pictures) == 2
    with Image.open(pictures[0]) as picture:
        # Two videos, the teacher's and the student's; nine frames enlarged to 64 pixels, beside the labels.
        assert picture.height == 4 * 66
        assert (picture.width - 9 * 66) > 100


def test_settings_that_do_not_fit_are_named(videos: VideoInputs, inputs: TinyInputs, tmp_path: Path) -> None:
    config = tiny_video(videos, tmp_path, "dcm")
    with pytest.raises(ValueError, match=r"this run makes \(4, 21, 8, 8\); set .* data\.frames for videos"):
        start_consistency(dataclasses.replace(config, data=dataclasses.replace(config.data, frames=None)))
    pictures = tiny_consistency(inputs, tmp_path, "dcm")
    with pytest.raises(ValueError, match="frames is 9, and a teacher of the family sd3 makes pictures"):
        start_consistency(dataclasses.replace(pictures, data=dataclasses.replace(pictures.data, frames=9)))
    decoupled = dataclasses.replace(config, dcm=None, dmf=DmfConfig())
    with pytest.raises(ValueError, match="'decoupled' is not known for WanTransformer3DModel"):
        start_consistency(decoupled)
    mcm = tiny_video(videos, tmp_path, "mcm")
    with pytest.raises(ValueError, match="no method is given: add one of the sections scm, dcm"):
        dataclasses.replace(mcm, mcm=None)
    with pytest.raises(ValueError, match="the sections dcm and mcm are given"):
        dataclasses.replace(config, mcm=MCM)
    with pytest.raises(ValueError, match="matching beside mcm: distribution matching goes with scm, dcm"):
        dataclasses.replace(mcm, **MATCHED)
    with pytest.raises(ValueError, match="use 'bf16' or 'no'"):
        dataclasses.replace(mcm, run=dataclasses.replace(mcm.run, mixed_precision="fp16"))
    many = dataclasses.replace(MCM, discriminator=dataclasses.replace(HEADS, frames=4))
    with pytest.raises(ValueError, match=r"mcm\.discriminator\.frames is 4 of 3 latent frames"):
        start_consistency(dataclasses.replace(mcm, mcm=many))
    LatentDataset(torch.zeros(2, 4, 1, 4, 4), ("a", "b")).save(tmp_path / "pictures")
    shown = dataclasses.replace(MCM, discriminator=dataclasses.replace(HEADS, pictures=str(tmp_path / "pictures")))
    with pytest.raises(ValueError, match=r"shape \(4, 1, 4, 4\), this run judges \(4, 1, 8, 8\)"):
        start_consistency(dataclasses.replace(mcm, mcm=shown))
    with pytest.raises(ValueError, match="mcm distils motion: give a teacher of videos"):
        start_consistency(dataclasses.replace(pictures, dcm=None, mcm=MCM))
