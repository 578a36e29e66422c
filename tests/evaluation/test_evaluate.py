"""Judging whole pipeline directories: real images score at the floor, untrained pipelines do not."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.embedded.digits.images import label_of_prompt, load_digits_split
from fewstep.embedded.digits.reference import digits_judge, evaluation_prompts
from fewstep.evaluation.choice import Choice
from fewstep.evaluation.evaluate import Comparison, compare, judge_pixels
from fewstep.evaluation.judge import Judge
from fewstep.evaluation.latency import TimingPlan
from fewstep.evaluation.results import Spread
from fewstep.evaluation.samples.pipelines import OnePipeline, Sampling
from fewstep.evaluation.samples.store import SampleStore
from fewstep.evaluation.systems import System, read_system

METRICS = ("fid", "kid", "prc", "dc", "fid_inf", "classes")


@pytest.fixture(scope="module")
def judge(classifier_folder) -> Judge:
    return digits_judge("test", classifier=classifier_folder, choice=Choice(METRICS, repetitions=20))


def compared(*arguments: object, **options: object) -> Comparison:
    found = compare(*arguments, **options)  # pyright: ignore[reportArgumentType]
    assert found is not None
    return found


@pytest.mark.slow
def test_real_images_score_at_the_floor(judge) -> None:
    """Training images in the place of generated ones."""
    images = load_digits_split("train")
    prompts = evaluation_prompts(400)
    rows = [torch.where(images.labels == digit)[0] for digit in range(10)]
    pixels = torch.stack([images.pixels[rows[label_of_prompt(text)][i // 10]] for i, text in enumerate(prompts)])
    system = System("real", "", 1, 1.0)
    result = judge_pixels(judge, pixels, prompts=prompts, system=system, seed=0)
    fid, kid, diversity = (result.figures[key] for key in ("fid", "kid", "diversity"))
    assert fid.floor is not None
    assert fid.value < 2.0 * fid.floor
    assert result.value("accuracy") > 0.97
    assert diversity.floor is not None
    assert 0.8 < diversity.value / diversity.floor < 1.2
    assert kid.low is not None
    assert kid.high is not None
    assert kid.low < 0.0 < kid.high
    assert (fid.samples, fid.references) == (400, 500)
    assert [result.value(key) > 0.8 for key in ("precision", "recall", "coverage")] == [True] * 3
    assert fid.warnings == ("400 images, fewer than 2000: for trying out, not for publishing",)
    # One image per digit, over and over: right, but collapsed.
    repeated = pixels[:10].repeat(40, 1, 1, 1)
    collapsed = judge_pixels(judge, repeated, prompts=prompts, system=system, seed=0)
    assert collapsed.value("diversity") < 0.01 * diversity.value
    assert collapsed.value("fid") > 5.0 * fid.value
    assert collapsed.value("recall") == 0.0
    assert result.ranking is not None
    assert sorted(result.ranking.order) == list(range(400))
    with pytest.raises(ValueError, match="has no cmmd; measured are fid"):
        result.value("cmmd")


@pytest.mark.slow
def test_figures_do_not_depend_on_batch_processes_or_an_interruption(
    pipeline_folder, classifier_folder, tmp_path, monkeypatch
) -> None:
    """Batches of 16 and 7; two processes one after the other; a kill in the middle. Samples are loaded once."""
    judge = digits_judge("train", classifier=classifier_folder)
    system = read_system(pipeline_folder, steps=2, guidance=1.0)
    whole = compared([system], judge=judge, sampling=Sampling(tmp_path / "a", 40, (3,), 16))
    result = whole.rows[0].results[0]
    assert (result.name, result.steps, result.guidance, result.seed, result.samples) == ("teacher", 2, 1.0, 3, 40)
    fid = result.figures["fid"]
    assert (fid.references, fid.source, whole.reference) == (
        1297,
        "digits classifier, 64 features",
        "digits, train split",
    )
    assert fid.floor is not None
    assert fid.value > 10.0 * fid.floor
    assert result.value("accuracy") < 0.5
    other = compared([system], judge=judge, sampling=Sampling(tmp_path / "b", 40, (3,), 7))
    assert other.rows[0].results[0].value("fid") == pytest.approx(fid.value, rel=1e-4)
    # The second process finds the store, makes its blocks and is done; the first one makes the rest and judges.
    for rank in (0, 1):
        store = Sampling(tmp_path / "c", 40, (3,), 16, rank=rank, world_size=2)
        folder = store.folder
        if rank == 0:
            with pytest.raises(ValueError, match="lacks 16 of 40 samples"):
                compare([system], judge=judge, sampling=store)
        else:
            assert compare([system], judge=judge, sampling=store) is None
    both = compared([system], judge=judge, sampling=Sampling(folder, 40, (3,), 16))
    assert both.rows[0].results[0].value("fid") == fid.value
    # Nothing is missing, so no pipeline is loaded.
    monkeypatch.setattr(OnePipeline, "get", lambda *_: pytest.fail("a pipeline is loaded"))
    again = compared([system], judge=judge, sampling=Sampling(tmp_path / "a", 40, (3,), 16))
    assert again.rows[0].results[0].value("fid") == fid.value


@pytest.mark.slow
def test_rows_are_compared_in_pairs_and_timed_one_at_a_time(judge, pipeline_folder, export_folder, tmp_path) -> None:
    systems = [
        read_system(pipeline_folder, steps=3, guidance=2.0),
        read_system(export_folder, name="student"),
        System("student", str(pipeline_folder), 2, 1.0),
    ]
    plan = TimingPlan(repeats=2, warmup=0, batch_size=2)
    sampling = Sampling(tmp_path / "samples", 40, (0, 1))
    found = compared(systems, judge=judge, sampling=sampling, timing=plan)
    teacher, student = found.rows
    assert (teacher.label(), student.label()) == ("teacher, 3 steps, guidance 2", "student, 2 steps")
    assert [result.seed for result in student.results] == [0, 1, 0, 1]
    spread = student.spread("fid")
    assert spread is not None
    assert spread.count == 4
    assert spread.minimum <= spread.median <= spread.maximum
    assert student.interval("fid") is None
    assert found.differences[0] == {}
    difference = found.differences[1]["fid"]
    means = [sum(result.value("fid") for result in row.results) / len(row.results) for row in (student, teacher)]
    assert difference.value == pytest.approx(means[0] - means[1])
    assert difference.low < difference.value < difference.high
    assert teacher.latency is not None
    assert (teacher.latency.batch_size, teacher.latency.repeats) == (2, 2)
    assert found.grid.real is not None
    assert [tuple(pixels.shape) for pixels in (*found.grid.pixels, found.grid.real)] == [(10, 3, 32, 32)] * 3
    assert [strip.pixels.shape for strip in found.extremes] == [(10, 3, 32, 32)] * 2
    assert found.notes == (
        "The baseline is called at guidance 2, and students here were distilled at guidance 1: what they were "
        "distilled from is another teacher.",
    )


@pytest.mark.slow
def test_bf16_pipelines_are_judged_in_bf16(judge, pipeline_folder, tmp_path) -> None:
    from fewstep.evaluation.generation import load_pipeline

    load_pipeline(pipeline_folder).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    system = read_system(tmp_path / "half", steps=2, guidance=1.0)
    assert system.dtype == "bfloat16"
    holder = OnePipeline("cpu")
    assert holder.get(system.path, system.dtype).transformer.dtype == torch.bfloat16
    found = compared([system], judge=judge, sampling=Sampling(tmp_path / "samples", 40))
    (folder,) = [path.parent for path in (tmp_path / "samples").glob("*/store.json") if "_grid" not in path.parent.name]
    assert SampleStore.open(folder).plan.dtype == "bfloat16"
    assert found.rows[0].results[0].value("fid") > 1.0


def test_pictures_from_anywhere_are_judged(judge, tmp_path, monkeypatch) -> None:
    """Real digits in the order of the prompts, as files: what the pixels in memory give."""
    images = load_digits_split("train")
    prompts = evaluation_prompts(40)
    rows = [torch.where(images.labels == digit)[0] for digit in range(10)]
    chosen = [rows[label_of_prompt(text)][i // 10] for i, text in enumerate(prompts)]
    pixels = torch.stack([images.pixels[row] for row in chosen])
    for number, one in enumerate(pixels):
        file = tmp_path / "photos" / f"p{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray((one * 255).round().byte().permute(1, 2, 0).numpy()).save(file)
    system = System("photos", str(tmp_path / "photos"), 0, 1.0, pictures=True)
    found = compared([system], judge=judge, sampling=Sampling(tmp_path / "none", 40), timing=TimingPlan())
    memory = judge_pixels(judge, pixels, prompts=prompts, system=system, seed=0)
    result = found.rows[0].results[0]
    for key in memory.figures:
        assert result.value(key) == pytest.approx(memory.value(key), rel=1e-6, abs=1e-9)
    assert found.rows[0].latency is None
    assert found.grid.pixels[0].shape == (10, 3, 32, 32)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_samples(tmp_path, repository) -> None:
    """Peak memory of judging 200 and 2,000 pictures of 256 x 256, which are 157 MB and 1.5 GB of numbers."""
    import subprocess
    import sys

    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(40):
        blocks = generator.integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((256, 256)).save(folder / f"{number:04d}.png")
    for number in range(40, 2000):
        (folder / f"{number:04d}.png").hardlink_to(folder / f"{number % 40:04d}.png")
    few = tmp_path / "few"
    few.mkdir()
    for number in range(200):
        (few / f"{number:04d}.png").hardlink_to(folder / f"{number:04d}.png")
    program = (
        "import resource, sys, torch; from pathlib import Path;"
        "from fewstep.evaluation.measures.features import picture_features;"
        "from fewstep.core.media.pictures import find_pictures;"
        "from tests.evaluation.measures.test_features import Means;"
        "torch.set_num_threads(1); picture_features(Means(), find_pictures(sys.argv[1]));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for place in (few, folder):
        command = [sys.executable, "-c", program, str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository)
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.1 * peaks[0]


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
    sampling = Sampling(tmp_path / "samples", 0)
    with pytest.raises(ValueError, match="samples is 0; use at least 20"):
        compare([System("a", str(tmp_path), 1, 1.0)], judge=judge, sampling=sampling)
    with pytest.raises(ValueError, match="0 systems and 1 seeds"):
        compare([], judge=judge, sampling=sampling)
    with pytest.raises(ValueError, match="'fid_inf' needs at least 40 images"):
        compare([System("a", str(tmp_path), 1, 1.0)], judge=judge, sampling=Sampling(tmp_path / "samples", 30))
    with pytest.raises(ValueError, match="no classifier weights"):
        digits_judge("test", classifier=tmp_path)
    with pytest.raises(ValueError, match="metric 'cmmd' needs real pictures and the weights of its features"):
        Judge(judge.reference, ("cmmd",))
    with pytest.raises(ValueError, match="repetitions is 1; use 0"):
        Judge(judge.reference, ("fid",), repetitions=1)
