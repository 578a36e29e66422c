"""The study of the reward methods and the benchmark of slow scorers."""

import threading
from pathlib import Path

import pytest
from studies.reward import HACKING, MEASURES, METHODS, StudyPoint, study_config, study_curves, table, train
from studies.reward_overlap import SlowScorer, measure_overlap
from torch import Tensor

from fewstep.dmd.reward.sections import DirectConfig
from fewstep.dmd.reward.train import train_step
from fewstep.embedded.digits.scorers import StrokeWeight
from tests.dmd.reward.reward_run import METHODS as TINY
from tests.dmd.reward.reward_run import reward_config, started, write_student
from tests.dmd.tiny_run import write_inputs


def points(method: str, step: int, values: list[float]) -> list[StudyPoint]:
    """One point per seed, whose measures are value, value + 1, ..."""
    count = len(MEASURES)
    return [StudyPoint(method, seed, step, tuple(v + k for k in range(count))) for seed, v in enumerate(values)]


def test_table_shows_the_last_checkpoint_with_its_spread() -> None:
    found = [*points("start", 0, [3.0, 1.0, 2.0]), *points("nft", 20, [9.0] * 3), *points("nft", 40, [0.0, 0.5, 0.25])]
    lines = table(found).splitlines()
    assert lines[2].startswith("| start | 0 | 2 [1, 3] | 3 [2, 4] |")
    assert lines[3].startswith("| nft | 40 | 0.25 [0, 0.5] | 1.25 [1, 1.5] |")
    assert "| 425 [400, 450] |" in lines[3]
    assert len(lines) == 4


def test_curves_start_at_the_distilled_student() -> None:
    found = [*points("start", 0, [1.0, 2.0]), *points("nft", 20, [3.0, 4.0]), *points("crd", 20, [5.0, 5.0])]
    curves = {(curve.run, curve.metric): curve for curve in study_curves(found)}
    assert len(curves) == 2 * len(MEASURES)
    assert (curves["nft", "fid"].steps, curves["nft", "fid"].values) == ((0, 20), (4.5, 6.5))
    assert curves["crd", "stroke_weight"].values == (3.5, 7.0)


def test_every_method_starts_from_the_same_student(tmp_path: Path) -> None:
    assert set(METHODS) == set(TINY)
    base, run = tmp_path / "base", tmp_path / "run"
    configs = {name: study_config(name, base=base, run=run, seed=2) for name in (*METHODS, HACKING)}
    assert {config.student.init for config in configs.values()} == {str(base)}
    assert {(config.run.seed, config.run.directory) for config in configs.values()} == {(2, str(run))}
    assert len({(config.run.steps, config.run.batch_size) for config in configs.values()}) == 1
    hacked = configs[HACKING]
    assert [entry.name for entry in hacked.reward.scorers] == ["stroke_weight"]
    assert [entry.name for entry in hacked.reward.held_out] == ["held_out_log_probability"]
    plain = configs["rtdmd"]
    assert hacked.matching is not None
    assert plain.matching is not None
    assert hacked.matching.weight < plain.matching.weight
    assert hacked.rtdmd is not None
    assert hacked.rtdmd.direct == DirectConfig(weight=1.0, margin=100.0)
    with pytest.raises(ValueError, match="no run of a distilled student; train it with"):
        train(tmp_path, tmp_path, "nft", seed=0)


class Traced(StrokeWeight):
    """Stroke weight that remembers in which thread it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[str] = []

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        self.threads.append(threading.current_thread().name.split("_")[0])
        return super().forward(pixels, prompts)


@pytest.mark.slow
def test_scorers_wait_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    inputs = write_inputs(tmp_path)
    student = write_student(inputs, tmp_path / "student")
    for overlap, thread in ((True, "reward"), (False, "MainThread")):
        changes = {"reward.overlap": overlap, "run.gradient_accumulation": 2}
        scorer = Traced()
        config = reward_config(inputs, student, tmp_path / thread, "gndm", changes)
        with started(config, [scorer]) as (method, trainer):
            train_step(method, trainer)
        assert scorer.threads == [thread, thread]
    config = reward_config(inputs, student, tmp_path / "timed", "gndm", changes)
    cost = measure_overlap(config, seconds=0.1, rounds=2)
    # Two slices wait one after the other.
    assert cost.in_turn_seconds > 0.2
    assert (cost.slices, cost.rounds, cost.method) == (2, 2, "gndm")
    assert SlowScorer(StrokeWeight(), 0.1).card.name == "stroke_weight"
    with pytest.raises(ValueError, match="time at least one round of a wait above 0"):
        measure_overlap(config, seconds=0.0, rounds=2)
