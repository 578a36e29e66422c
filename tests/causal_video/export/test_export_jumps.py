"""Exports of students of two times: a directory that our streams and diffusers' causal class both open."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AnyFlowFARPipeline

from fewstep.causal_video.export.far import check_far, export_far, far_video, streamed
from fewstep.causal_video.export.pipeline import export_causal_run
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.far import far_transformer, wan_of_far
from fewstep.causal_video.policy import KEEP_ALL, CachePolicy
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings, SecondTime, StreamDefaults
from fewstep.causal_video.stages.config import CausalTeacherConfig
from fewstep.causal_video.stages.train import train_causal_video
from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
from fewstep.core.training.checkpoint import list_checkpoints, load_checkpoint
from fewstep.core.two_time import add_second_time, second_time_of
from fewstep.core.weights import find_weights
from tests.causal_video.tiny_causal import largest
from tests.causal_video.tiny_causal_run import VideoInputs, start_causal, tiny_causal
from tests.causal_video.tiny_streams import build_stream_pipeline

# diffusers calls flex attention without compiling it.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

LAYOUT = ChunkLayout((2, 2, 2))


def student(kind: SecondTime, schedule: StepSchedule, *, side: int = 64) -> CausalVideoPipeline:
    """A random student of two times; two frames of 64 x 64 pixels have 128 tokens."""
    stock = build_stream_pipeline(settings=CausalSettings(LAYOUT, KEEP_ALL)).stock
    assert stock.transformer is not None
    assert kind != "none"
    add_second_time(stock.transformer, kind)
    layers = second_time_of(stock.transformer)
    assert layers is not None
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in layers.second.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    settings = CausalSettings(LAYOUT, KEEP_ALL, schedule, kind)
    return CausalVideoPipeline(stock, settings, StreamDefaults(side, side))


@pytest.mark.parametrize("kind", ["gate", "sum"])
def test_the_way_to_diffusers_and_back_loses_no_bit(kind: SecondTime) -> None:
    pipe = student(kind, StepSchedule.steps([2]))
    assert pipe.stock.transformer is not None
    own = copy.deepcopy(pipe.stock.transformer)
    back = wan_of_far(far_transformer(own, LAYOUT))
    layers = second_time_of(back)
    assert layers is not None
    assert layers.kind == kind
    names = own.state_dict()
    assert {name: torch.equal(x, back.state_dict()[name]) for name, x in names.items()} == dict.fromkeys(names, True)
    files = [far_transformer(own, LAYOUT).state_dict() for _ in range(2)]
    assert all(torch.equal(x, files[1][name]) for name, x in files[0].items())


@pytest.mark.parametrize(("kind", "steps"), [("gate", 4), ("sum", 3), ("gate", 1)])
def test_diffusers_makes_the_same_video_in_many_steps(kind: SecondTime, steps: int, tmp_path: Path) -> None:
    pipe = student(kind, StepSchedule.steps([steps], shift=3.0))
    assert export_far(pipe, tmp_path / "far") < 1e-5
    loaded = AnyFlowFARPipeline.from_pretrained(tmp_path / "far", dtype=torch.float32)
    # The scheduler has the student's shift: a number of steps says its grid.
    latents = streamed(pipe, "a cat", 0)
    loaded.scheduler.set_timesteps(steps)
    assert loaded.scheduler.sigmas[:-1].tolist() == pytest.approx(pipe.settings.schedule.of(0), abs=1e-6)
    assert largest(far_video(loaded, pipe, "a cat", 0), latents) < 1e-5
    # A jump to another end is another call: the second time is there.
    with_one = student(kind, StepSchedule.steps([steps + 1], shift=3.0))
    assert largest(streamed(with_one, "a cat", 0), latents) > 1e-3


def test_a_grid_that_no_shift_makes(tmp_path: Path) -> None:
    assert export_far(student("gate", StepSchedule(((1.0, 0.9, 0.1),))), tmp_path / "far") < 1e-5


def test_a_saved_pipeline_is_loaded_as_it_was(tmp_path: Path) -> None:
    pipe = student("sum", StepSchedule.steps([2, 1]))
    pipe.save_pretrained(tmp_path / "saved")
    loaded = CausalVideoPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.settings == pipe.settings
    assert torch.equal(streamed(loaded, "a cat", 1), streamed(pipe, "a cat", 1))
    with pytest.raises(ValueError, match="others for some"):
        check_far(pipe)
    with pytest.raises(ValueError, match=r"second_time 'none', and the network has 2 time\(s\)"):
        CausalVideoPipeline(pipe.stock, CausalSettings(LAYOUT), StreamDefaults(64, 64))


@pytest.mark.parametrize("case", ["tf_meanflow", "tf_anyflow"])
def test_runs_are_exported_and_go_on(case: str, inputs: VideoInputs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train_causal_video(tiny_causal(inputs, folder, case, {"run.steps": 2})) == 0
    output, record = export_causal_run(folder)
    assert record.verification.sampler_difference < 1e-6
    assert record.verification.rounding_difference == 0
    assert record.stock_difference < 1e-5
    kind = record.settings.second_time
    assert kind == {"tf_meanflow": "sum", "tf_anyflow": "gate"}[case]
    assert "AnyFlowFARPipeline" in (output / "model_index.json").read_text()
    assert "opens the same directory as an AnyFlowFARPipeline" in (output / "README.md").read_text()
    pipe = CausalVideoPipeline.from_pretrained(output)
    frames = pipe("a red cat", chunks=3, seed=4).frames
    assert frames is not None
    assert frames.shape == (1, 3, 17, 32, 32)
    _, half = export_causal_run(folder, tmp_path / "half", dtype="bfloat16", steps=[4])
    assert 0 < half.verification.rounding_difference < 0.1
    loaded = CausalVideoPipeline.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert bool(loaded("a red cat", chunks=2).latents.isfinite().all())
    later = tiny_causal(
        inputs, tmp_path / "later", "self_forcing", {"student.second_time": kind, "student.init": str(folder)}
    )
    assert train_causal_video(later) == 0
    assert export_causal_run(tmp_path / "later")[1].verification.sampler_difference < 1e-6
    # From the export the start is the same, to the last bit.
    begun = []
    for number, init in enumerate((folder, output)):
        changes = {"student.second_time": kind, "student.init": str(init)}
        setup, trainer = start_causal(tiny_causal(inputs, tmp_path / f"from{number}", "self_forcing", changes))
        trainer.close()
        begun.append(setup.student.transformer.state_dict())
    assert len(begun[0]) == len(begun[1])
    assert all(torch.equal(tensor, begun[1][name]) for name, tensor in begun[0].items())
    for init, second, message in (
        (folder, "none", "holds a network whose second time is"),
        (folder, {"gate": "sum", "sum": "gate"}[kind], f"second time is '{kind}', and student.second_time is"),
        (output, "none", "holds a network whose second time is"),
    ):
        changes = {"student.second_time": second, "student.init": str(init)}
        with pytest.raises(ValueError, match=message):
            train_causal_video(tiny_causal(inputs, tmp_path / "refused", "self_forcing", changes))


def test_files_of_other_gates_are_not_taken_for_ours(tmp_path: Path) -> None:
    """A file without its config, one with another gate, and one of a network of one time, whose gate is 0."""
    pipe = student("sum", StepSchedule.steps([2]))
    pipe.save_pretrained(tmp_path / "export")
    network = tmp_path / "export" / "transformer"
    name = "diffusion_pytorch_model.safetensors"
    shutil.copy(network / name, tmp_path / name)
    with pytest.raises(ValueError, match=r"student\.init .* no config\.json beside it says how"):
        find_weights(str(tmp_path / name)).names()
    config = json.loads((network / "config.json").read_text())
    (network / "config.json").write_text(json.dumps({**config, "gate_value": 0.7}))
    with pytest.raises(ValueError, match="or one with another gate than students here have"):
        find_weights(str(tmp_path / "export")).tensors()
    plain = build_stream_pipeline(settings=CausalSettings(LAYOUT, KEEP_ALL, StepSchedule.steps([1])))
    plain = CausalVideoPipeline(plain.stock, plain.settings, StreamDefaults(64, 64))
    export_far(plain, tmp_path / "far")
    assert plain.stock.transformer is not None
    own, stored = plain.stock.transformer.state_dict(), find_weights(str(tmp_path / "far")).tensors()
    assert own.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in own.items())


def test_the_card_says_what_was_trained(inputs: VideoInputs, tmp_path: Path) -> None:
    taught = CausalTeacherConfig(weights=str(inputs.init), guidance=1.5)
    changes = {"run.steps": 1, "causal_teacher": taught, "student.shift": 5.0}
    assert train_causal_video(tiny_causal(inputs, tmp_path / "run", "tf_meanflow", changes)) == 0
    output, record = export_causal_run(tmp_path / "run", steps=[1])
    assert record.training_guidance == 1.5
    assert "It was trained at other times" not in (output / "README.md").read_text()
    pipe = CausalVideoPipeline.from_pretrained(output)
    pipe.save_pretrained(tmp_path / "again")
    for folder in (output, tmp_path / "again"):
        assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["shift"] == 5.0
    # Settings that do not say it are for the network's own second time.
    noisy = CausalSettings(pipe.settings.layout, CachePolicy(noisy_from=0), pipe.settings.schedule)
    with pytest.raises(ValueError, match="leave noisy_from out"):
        pipe.open("a", settings=noisy)
    plain = CausalSettings(pipe.settings.layout, pipe.settings.policy, pipe.settings.schedule)
    assert pipe.open("a", settings=plain).settings == pipe.settings


def test_adapters_of_a_flow_map_are_merged(inputs: VideoInputs, tmp_path: Path) -> None:
    changes = {"run.steps": 2, "student.lora_rank": 2}
    assert train_causal_video(tiny_causal(inputs, tmp_path / "run", "tf_meanflow", changes)) == 0
    output, record = export_causal_run(tmp_path / "run")
    assert record.verification.sampler_difference < 1e-6
    assert record.stock_difference < 1e-5
    # A later stage has adapters of its own on it, beside the layers of the second time, or in those of both.
    for number, targets in enumerate(((), ("attn1.to_q", "time_embedder.linear_1"))):
        later = {"student.lora_rank": 2, "student.second_time": "sum", "student.init": str(output)}
        config = tiny_causal(inputs, tmp_path / f"{number}", "self_forcing", {**later, "student.lora_targets": targets})
        assert train_causal_video(config) == 0
        tensors = load_checkpoint(list_checkpoints(tmp_path / f"{number}")[-1]).tensors["student"]
        second = [name for name in tensors if ".second." in name]
        assert len(second) == (4 if number == 0 else 2)
        assert all((".lora_" in name) == (number == 1) for name in second)
        assert export_causal_run(tmp_path / f"{number}")[1].verification.sampler_difference < 1e-6
