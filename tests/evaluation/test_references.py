"""Judging with the user's own prompts and pictures: no classifier, and a floor from the halves of the folder."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.embedded.digits.images import balanced_prompt
from fewstep.embedded.digits.reference import DIGIT_PROMPTS
from fewstep.evaluation.evaluate import Comparison, Judge, build_judge, compare
from fewstep.evaluation.fid import FeatureStatistics, extract_features
from fewstep.evaluation.generation import generate, load_pipeline
from fewstep.evaluation.latency import TimingPlan
from fewstep.evaluation.provenance import Provenance
from fewstep.evaluation.record import figures_of
from fewstep.evaluation.references import folder_reference, list_pictures
from fewstep.evaluation.report import table_notes, write_report
from fewstep.evaluation.systems import OwnReference, System, pick_reference, picture_size, read_system
from fewstep.evaluation.table import results_table
from tests.tiny_pipelines import PIXELS, build_sd3, build_sd15, build_sdxl, save_pipeline

PICTURES = 24
PROMPTS = tuple(f"prompt {letter}" for letter in "abcdefghijkl")


class ColourFeatures(nn.Module):
    """Means and deviations of the three channels, [B, 6]."""

    num_features = 6
    name = "colours, 6 features"

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cat([pixels.mean(dim=(2, 3)), pixels.std(dim=(2, 3))], dim=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 pictures of 20 x 16 pixels, whose names give another order than their writing, and a file that is none."""
    folder = tmp_path_factory.mktemp("real") / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in reversed(range(PICTURES)):
        tint = generator.uniform(0.2, 1.0, size=3)
        pixels = (generator.uniform(size=(16, 20, 3)) * tint * 255.0).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}{'.PNG' if number == 5 else '.png'}")
    (folder / "notes.txt").write_text("no picture", encoding="ascii")
    return folder


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n", encoding="ascii")
    return file


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory) -> Path:
    return save_pipeline(build_sd3(), tmp_path_factory.mktemp("pipelines") / "tiny")


@pytest.fixture(scope="module")
def judge(pictures, prompt_file) -> Judge:
    own = OwnReference(str(prompt_file), str(pictures), PIXELS, PIXELS)
    return Judge(folder_reference(own, extractor=ColourFeatures()))


@pytest.fixture(scope="module")
def found(judge, sd3_folder) -> Comparison:
    return compare([System("tiny", str(sd3_folder), 2, 1.0)], judge=judge, samples=30, seeds=[0, 1])


def distance(first: Tensor, second: Tensor) -> float:
    """The closed form, which is not what computes the reported figures."""
    both = [FeatureStatistics.from_features(rows, split="", feature_extractor="") for rows in (first, second)]
    return both[0].distance(both[1])


def expected_features(pictures: Path) -> Tensor:
    """Features of the pictures by name: 20 x 16 pixels are cut to their centre 16 columns."""
    arrays = [np.array(Image.open(path)) for path in sorted(pictures.iterdir()) if path.suffix != ".txt"]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).double()[..., 2:18] / 255.0
    return ColourFeatures()(pixels)


def test_fid_and_floor_are_those_of_the_folder(found, judge, pictures, sd3_folder) -> None:
    real = expected_features(pictures)
    assert judge.reference.real.features.shape == (PICTURES, 6)
    assert (judge.reference.real.features - real).abs().max() < 1e-6
    prompts = [PROMPTS[index % 12] for index in range(30)]
    pixels = generate(load_pipeline(sd3_folder), prompts, indices=range(30), seed=1, steps=2, guidance=1.0)
    fid = found.rows[0].results[1].fid
    drawn = extract_features(ColourFeatures(), pixels)
    assert fid.value == pytest.approx(distance(drawn, judge.reference.real.features), rel=1e-6)
    floor = distance(judge.reference.real.features[0::2], judge.reference.real.features[1::2])
    assert floor > 0.001
    assert fid.floor == pytest.approx(floor, rel=1e-6)
    assert (fid.samples, fid.reference_samples, fid.floor_samples, fid.seed) == (30, 24, 12, 1)
    assert (fid.reference_split, fid.feature_extractor) == ("photos", "colours, 6 features")
    kid = found.rows[0].results[1].kid
    assert (kid.subset_size, kid.reference_samples) == (12, 24)
    assert found.rows[0].results[0].fid.floor == fid.floor


def test_there_is_no_classifier(found) -> None:
    assert (found.reference_accuracy, found.reference_diversity) == (None, None)
    assert [(one.accuracy, one.diversity, one.clip) for one in found.rows[0].results] == [(None, None, None)] * 2
    assert (found.rows[0].accuracy(), found.rows[0].diversity()) == (None, None)


def test_grid_shows_ten_prompts_and_pictures(found, judge) -> None:
    assert found.grid.prompts == PROMPTS[:10]
    assert found.grid.real.shape == (10, 3, PIXELS, PIXELS)
    assert found.grid.pixels[0].shape == (10, 3, PIXELS, PIXELS)
    assert judge.reference.sample_prompts(14)[10:] == [*PROMPTS[10:], *PROMPTS[:2]]


def test_table_and_notes(found) -> None:
    table = results_table(found)
    assert table.header == ("system", "steps", "guidance", "FID", "FID floor", "KID", "samples", "seeds")
    fid = found.rows[0].results[0].fid
    floor = f"{fid.floor:.2f}"
    assert [row[0] for row in table.rows] == ["real images", "tiny"]
    assert (table.rows[0][3], table.rows[0][4], table.rows[0][6]) == (floor, "-", "12")
    assert (table.rows[1][4], table.rows[1][6], table.rows[1][7]) == (floor, "30", "0, 1")
    notes = table_notes(found)
    assert notes[0] == (
        "FID and KID: 30 generated images per seed against 24 real images of the folder photos; "
        "features: colours, 6 features."
    )
    assert notes[1].count("the two halves of the folder against each other, 12 real images") == 1
    assert sum("Accuracy" in note for note in notes) == 0


def test_report_and_figures_of_an_export(found, tmp_path) -> None:
    made = Provenance("python x", "2026-01-02", "3.11.0", (("torch", "2.15"),), "Some CPU", 2)
    files = write_report(tmp_path, found, provenance=made)
    content = json.loads(files.json.read_text())
    assert (content["reference_split"], content["reference_accuracy"]) == ("photos", None)
    assert (content["rows"][0]["summary"]["accuracy"], content["rows"][0]["results"][0]["diversity"]) == (None, None)
    assert files.html.read_text().count("data:image/png") == 2
    results = found.rows[0].results
    (figure,) = figures_of(results)
    assert figure.value == pytest.approx((results[0].fid.value + results[1].fid.value) / 2, abs=1e-4)
    assert figure.setting == (
        "2 steps, guidance 1, 30 images, seed 0, 1; 24 images of photos, colours, 6 features; "
        f"floor {results[0].fid.floor:.3f}"
    )


def test_speed_is_timed_with_own_prompts(judge, sd3_folder) -> None:
    plan = TimingPlan(repeats=1, warmup=0, batch_size=2)
    row = compare([System("tiny", str(sd3_folder), 1, 1.0)], judge=judge, samples=20, timing=plan).rows[0]
    assert row.latency is not None
    assert row.latency.batch_size == 2


def test_digit_prompts_repeat_where_the_reference_does() -> None:
    assert [balanced_prompt(index) for index in range(DIGIT_PROMPTS, 2 * DIGIT_PROMPTS)] == [
        balanced_prompt(index) for index in range(DIGIT_PROMPTS)
    ]
    assert DIGIT_PROMPTS == 160


@pytest.mark.parametrize("build", [build_sd3, build_sd15, build_sdxl])
def test_picture_size_is_that_of_the_drawn_pictures(build, tmp_path) -> None:
    system = System("x", str(save_pipeline(build(), tmp_path / "x")), 1, 1.0)
    assert picture_size(system) == (PIXELS, PIXELS)
    pixels = generate(load_pipeline(system.path), ["a"], indices=[0], seed=0, steps=1, guidance=1.0)
    assert pixels.shape == (1, 3, PIXELS, PIXELS)


def test_size_in_the_record_is_the_size_that_is_drawn(tmp_path) -> None:
    folder = save_pipeline(build_sd3(), tmp_path / "x")
    record = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 24, "width": 32}
    (folder / "distillation.json").write_text(json.dumps(record), encoding="ascii")
    system = read_system(folder)
    assert picture_size(system) == (24, 32)
    assert picture_size(read_system(folder, steps=2)) == (24, 32)
    pipeline = load_pipeline(folder)
    pixels = generate(pipeline, ["a"], indices=[0], seed=0, steps=1, guidance=1.0, grid=system.grid)
    assert pixels.shape == (1, 3, 24, 32)
    own = pick_reference("test", [system], prompts="p", images="i")
    assert own == OwnReference("p", "i", 24, 32)
    with pytest.raises(ValueError, match=r"pictures of \[\(16, 16\), \(24, 32\)\] pixels"):
        pick_reference("test", [system, System("y", str(folder), 1, 1.0)], prompts="p", images="i")
    assert pick_reference("train", [system], prompts=None, images=None) == "train"


def test_bad_folders_and_prompts_are_errors(pictures, prompt_file, tmp_path) -> None:
    for number, path in enumerate(list_pictures(pictures)[:7]):
        (tmp_path / f"{number}.jpg").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"holds 7 pictures .* use at least 8"):
        list_pictures(tmp_path)
    (tmp_path / "8.webp").write_text("no picture", encoding="ascii")
    with pytest.raises(ValueError, match=r"8\.webp is no whole picture"):
        folder_reference(OwnReference(str(prompt_file), str(tmp_path), 16, 16), extractor=ColourFeatures())
    with pytest.raises(ValueError, match="there is no directory"):
        list_pictures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"prompt file .* does not exist"):
        folder_reference(OwnReference("nowhere", str(pictures), 16, 16), extractor=ColourFeatures())
    with pytest.raises(ValueError, match="give --inception FILE"):
        build_judge(OwnReference(str(prompt_file), str(pictures), 16, 16))
    with pytest.raises(ValueError, match="does not tell its picture size"):
        picture_size(System("x", str(tmp_path), 1, 1.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--prompts",), "--prompts without --reference_images; give both"),
        (("--reference_images",), "--reference_images without --prompts; give both"),
        (("--prompts", "--reference_images"), "give --inception FILE"),
    ],
)
def test_command_line_errors(given, message, repository, sd3_folder, prompt_file, pictures, tmp_path) -> None:
    values = {"--prompts": str(prompt_file), "--reference_images": str(pictures)}
    own = [text for option in given for text in (option, values[option])]
    arguments = ["--pipeline", str(sd3_folder), "--steps", "1", "--guidance", "1", "--output", str(tmp_path / "report")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate_pipeline.py", *arguments, *own])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(repository / "scripts" / "evaluate_pipeline.py"), run_name="__main__")
    assert str(stopped.value).count(message) == 1
    assert not (tmp_path / "report").exists()
