"""Judging whole pipeline directories: real images score at the floor, untrained pipelines do not."""

import math

import pytest
import torch

from fewstep.embedded.digits.images import label_of_prompt, load_digits_split
from fewstep.embedded.digits.reference import digits_judge, evaluation_prompts
from fewstep.evaluation.evaluate import compare, judge_pixels
from fewstep.evaluation.latency import TimingPlan
from fewstep.evaluation.results import Spread
from fewstep.evaluation.systems import System, read_system


@pytest.fixture(scope="module")
def judge(classifier_folder):
    return digits_judge("test", classifier=classifier_folder)


@pytest.mark.slow
def test_real_images_score_at_the_floor(judge) -> None:
    """Training images in the place of generated ones."""
    images = load_digits_split("train")
    prompts = evaluation_prompts(400)
    rows = [torch.where(images.labels == digit)[0] for digit in range(10)]
    pixels = torch.stack([images.pixels[rows[label_of_prompt(text)][i // 10]] for i, text in enumerate(prompts)])
    system = System("real", "", 1, 1.0)
    result = judge_pixels(judge, pixels, prompts=prompts, system=system, seed=0)
    assert result.accuracy is not None
    assert result.diversity is not None
    assert result.fid.value < 2.0 * result.fid.floor
    assert result.accuracy.value > 0.97
    assert 0.8 < result.diversity.value / result.diversity.reference < 1.2
    assert abs(result.kid.value) < 3.0 * result.kid.spread
    assert (result.fid.samples, result.fid.reference_samples, result.fid.floor_samples) == (400, 500, 400)
    # One image per digit, over and over: right, but collapsed.
    repeated = pixels[:10].repeat(40, 1, 1, 1)
    collapsed = judge_pixels(judge, repeated, prompts=prompts, system=system, seed=0)
    assert collapsed.diversity is not None
    assert collapsed.diversity.value < 0.01 * result.diversity.value
    assert collapsed.fid.value > 5.0 * result.fid.value


def test_untrained_pipeline_is_far_from_the_floor(pipeline_folder, classifier_folder) -> None:
    judge = digits_judge("train", classifier=classifier_folder)
    system = read_system(pipeline_folder, steps=2, guidance=1.0)
    found = [compare([system], judge=judge, samples=40, seeds=[3], batch_size=size) for size in (64, 7)]
    result, again = (comparison.rows[0].results[0] for comparison in found)
    assert (result.name, result.steps, result.guidance, result.seed, result.samples) == ("teacher", 2, 1.0, 3, 40)
    assert (result.fid.reference_split, result.fid.reference_samples, result.fid.floor_samples) == ("train", 1297, 40)
    assert result.fid.value > 10.0 * result.fid.floor
    assert result.accuracy is not None
    assert result.accuracy.value < 0.5
    assert again.fid.value == pytest.approx(result.fid.value, rel=1e-4)


@pytest.mark.slow
def test_compare_groups_training_seeds_and_times_each_row(judge, pipeline_folder, export_folder) -> None:
    systems = [
        read_system(pipeline_folder, steps=3, guidance=2.0),
        read_system(export_folder, name="student"),
        System("student", str(pipeline_folder), 2, 1.0),
    ]
    plan = TimingPlan(repeats=2, warmup=0, batch_size=2)
    found = compare(systems, judge=judge, samples=20, seeds=[0, 1], timing=plan)
    teacher, student = found.rows
    assert (teacher.label(), student.label()) == ("teacher, 3 steps, guidance 2", "student, 2 steps")
    assert [result.seed for result in student.results] == [0, 1, 0, 1]
    assert student.fid().count == 4
    assert student.fid().minimum <= student.fid().median <= student.fid().maximum
    assert student.fid().maximum > student.fid().minimum
    assert teacher.latency is not None
    assert (teacher.latency.batch_size, teacher.latency.repeats) == (2, 2)
    assert found.grid.names == ("teacher, 3 steps, guidance 2", "student, 2 steps")
    assert [tuple(pixels.shape) for pixels in (*found.grid.pixels, found.grid.real)] == [(10, 3, 32, 32)] * 3
    assert (found.reference_split, found.reference_samples) == ("test", 500)


def test_prompts_are_balanced() -> None:
    labels = torch.tensor([label_of_prompt(prompt) for prompt in evaluation_prompts(200)])
    assert labels.bincount().tolist() == [20] * 10
    assert evaluation_prompts(60) == evaluation_prompts(200)[:60]


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert math.isclose(Spread.of([1.0, 2.0]).median, 1.5)
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


def test_bad_input_is_an_error(judge, classifier_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="reference is 'valid'; use one of test, train"):
        digits_judge("valid", classifier=classifier_folder)
    with pytest.raises(ValueError, match="samples is 0; use at least 20"):
        compare([System("a", str(tmp_path), 1, 1.0)], judge=judge, samples=0)
    with pytest.raises(ValueError, match="0 systems and 1 seeds"):
        compare([], judge=judge)
    with pytest.raises(ValueError, match="no classifier weights"):
        digits_judge("test", classifier=tmp_path)
