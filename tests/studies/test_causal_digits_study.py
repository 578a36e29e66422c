"""The study's parts: sinks of one size, videos of a finished run, the table."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from studies import causal as study

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.stages.train import train_causal_video
from fewstep.embedded.digits.images import label_of_prompt
from fewstep.embedded.moving_digits.clips import direction_of_prompt, moving_digits, speed_of_prompt
from fewstep.embedded.moving_digits.judges import load_judges
from fewstep.embedded.moving_digits.measures import VideoReference, VideoResult, video_reference
from tests.causal_video.tiny_causal_run import FLOWS, VideoInputs, tiny_causal, write_inputs

POLICY = CachePolicy(2, 1, "static")
PROMPTS = ("a red cat", "two dogs")


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of these tests are those of a CPU, also on a machine with a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> VideoInputs:
    """A tiny teacher, videos and weights on disk."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def result_of(accuracy: float) -> VideoResult:
    return VideoResult(2, 25, accuracy, 0.5, 0.5, 0.0, 0.3, 0.4, 10.0, 20.0, (0.9, 0.7), (1.0, 2.0))


def test_sinks_are_compared_over_as_many_visible_frames() -> None:
    layout = ChunkLayout.uniform(12, 1)
    for sink in study.SINKS:
        policy = study.with_sink(POLICY, sink)
        recent, first = policy.chunk_window(layout).visible(9)
        assert len(recent) + len(first) == 3
        assert policy.sink == sink
    with pytest.raises(ValueError, match=r"set student\.policy\.window_frames"):
        study.with_sink(CachePolicy(), "static")


@pytest.mark.slow
def test_a_finished_run_streams_at_any_schedule_and_length(inputs: VideoInputs, tmp_path: Path) -> None:
    changes = {"student.layout": (1, 1, 1), "student.policy": POLICY, "run.steps": 1}
    videos = []
    for name in ("teacher_forcing", "self_forcing"):
        config = tiny_causal(inputs, tmp_path / name, name, changes)
        assert train_causal_video(config) == 0
        assert study.latest_step(tmp_path / name) == 1
        student = study.load_student(tmp_path / name)
        assert student.config == config
        assert student.is_flow == (name in FLOWS)
        for sink, chunks in (("static", 3), ("none", 3), ("none", 6), ("ema", 6)):
            schedule = StepSchedule.steps([2, 1])
            videos.append(study.sample_student(student, PROMPTS, schedule=schedule, sink=sink, chunks=chunks))
        short, window, long, averaged = videos[-4:]
        assert short.shape == (2, 3, 9, 32, 32)
        assert long.shape == (2, 3, 21, 32, 32)
        # Nothing is forgotten within three frames; later on the sink matters, and the beginning stays as it was.
        assert torch.allclose(short, window, atol=1e-5)
        assert torch.allclose(long[:, :, :9], short, atol=1e-5)
        assert float((long[:, :, -4:] - averaged[:, :, -4:]).abs().max()) > 1e-4
    assert not torch.allclose(videos[0], videos[4], atol=1e-3)
    assert study.latest_step(tmp_path / "none") == -1


def test_the_table_has_medians_over_seeds(tmp_path: Path) -> None:
    row = study.StudyRow("tf_dcm", 0, "[4, 2]", "static", 7, result_of(0.8))
    rows = [row, dataclasses.replace(row, seed=1, result=result_of(0.9))]
    rows.append(study.StudyRow("teacher", None, "50 Euler", "", 7, result_of(1.0)))
    study.write_table(rows, tmp_path, command=["study.py", "--seeds", "0", "1"])
    lines = (tmp_path / "README.md").read_text(encoding="ascii").splitlines()
    assert lines[2].startswith("`python study.py --seeds 0 1`")
    assert "| tf_dcm | [4, 2] | static | 7 | 0.850 [0.800, 0.900] |" in lines[6]
    assert lines[6].endswith("| 0.200 [0.200, 0.200] | 2 |")
    assert "| teacher | 50 Euler |  | 7 | 1.000 |" in lines[7]
    assert len(json.loads((tmp_path / "results.json").read_text(encoding="ascii"))["rows"]) == 3


def test_what_is_judged_is_kept_and_not_made_again(tmp_path: Path) -> None:
    judge = study.StudyJudge(load_judges(study.JUDGES), reference_of_two(), "train", 2, tmp_path / "judged")
    asked = study.study_prompts(2)
    calls: list[str] = []

    def pixels() -> torch.Tensor:
        calls.append("made")
        return moving_digits("train", seed=1, indices=range(2)).pixels

    made_of = ("self_forcing (dcm)", "seed 1", "[4, 2]")
    first = judge.result(asked, pixels, made_of=made_of)
    assert judge.result(asked, pixels, made_of=made_of) == first
    assert [path.name for path in judge.kept.iterdir()] == ["self_forcing_dcm-seed_1-4_2-train-2_videos.json"]
    assert calls == ["made"]
    judge.result(asked, pixels, made_of=("self_forcing (dcm)", "seed 2", "[4, 2]"))
    assert len(calls) == 2
    long = study.study_prompts(80)[:: study.LONG_SHARE]
    assert len({label_of_prompt(one) for one in long}) == 10
    assert len({(direction_of_prompt(one), speed_of_prompt(one)) for one in long}) == 8


def reference_of_two() -> VideoReference:
    return video_reference(load_judges(study.JUDGES), moving_digits("train", seed=0, indices=range(2)).pixels)


def test_other_weights_are_judged_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"abd")
    assert study.fingerprint(tmp_path / "a") == "ba7816bf8f01"
    assert study.fingerprint(tmp_path / "b") != study.fingerprint(tmp_path / "a")


def test_consistency_chains_share_their_first_stage() -> None:
    runs = {
        study.run_directory(Path("runs"), chain, stage, 1) for chain in study.CHAINS for stage in study.CHAINS[chain]
    }
    assert sorted(run.name for run in runs) == [
        "astrolabe_seed1",
        "ode_seed1",
        "self_forcing_dcm_seed1",
        "self_forcing_ode_seed1",
        "self_forcing_scm_seed1",
        "steered_dcm_seed1",
        "steered_seed1",
        "teacher_forcing_seed1",
        "tf_dcm_seed1",
        "tf_scm_seed1",
    ]
