"""Judging with the user's own prompts and pictures: no classifier, and a floor from the halves of the folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.core.media.pictures import find_pictures
from fewstep.embedded.digits.images import balanced_prompt
from fewstep.embedded.digits.reference import DIGIT_PROMPTS
from fewstep.evaluation.choice import Choice, own_judge
from fewstep.evaluation.evaluate import Comparison, compare
from fewstep.evaluation.generation import generate, load_pipeline
from fewstep.evaluation.judge import Judge
from fewstep.evaluation.latency import TimingPlan
from fewstep.evaluation.measures.features import extract_features
from fewstep.evaluation.measures.statistics import feature_distance
from fewstep.evaluation.notes import table_notes
from fewstep.evaluation.provenance import Provenance
from fewstep.evaluation.record import figures_of
from fewstep.evaluation.references import own_reference
from fewstep.evaluation.report import write_report
from fewstep.evaluation.samples.pipelines import Sampling
from fewstep.evaluation.systems import OwnReference, System, pick_reference, picture_size, read_system
from fewstep.evaluation.table import results_table
from tests.tiny_pipelines import PIXELS, build_sd3, build_sd15, build_sdxl, save_pipeline

PICTURES = 24
PROMPTS = tuple(f"prompt {letter}" for letter in "abcdefghijkl")


class ColourFeatures(nn.Module):
    """Means and deviations of the three channels, [B, 6]."""

    num_features = 6
    any_size = True
    name, digest = "colours, 6 features", ""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()), requires_grad=False)

    def resize(self, pixels: Tensor) -> Tensor:
        return pixels if pixels.shape[-2:] == (PIXELS, PIXELS) else nn.functional.interpolate(pixels, (PIXELS, PIXELS))

    def forward(self, resized: Tensor) -> Tensor:
        return torch.cat([resized.mean(dim=(2, 3)), resized.std(dim=(2, 3))], dim=1) * self.one


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
def judge(pictures, prompt_file, tmp_path_factory) -> Judge:
    own = OwnReference(str(prompt_file), str(pictures), PIXELS, PIXELS, cut=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        reference = own_reference(own, extractors={"image": ColourFeatures()})
    return Judge(reference, ("fid", "kid"), repetitions=10)


@pytest.fixture(scope="module")
def found(judge, sd3_folder, tmp_path_factory) -> Comparison:
    sampling = Sampling(tmp_path_factory.mktemp("samples"), 30, (0, 1))
    comparison = compare([System("tiny", str(sd3_folder), 2, 1.0)], judge=judge, sampling=sampling)
    assert comparison is not None
    return comparison


def expected_features(pictures: Path) -> Tensor:
    """Features of the pictures by name: 20 x 16 pixels are cut to their centre 16 columns."""
    arrays = [np.array(Image.open(path)) for path in sorted(pictures.iterdir()) if path.suffix != ".txt"]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).double()[..., 2:18] / 255.0
    return ColourFeatures()(pixels)


def test_fid_and_floor_are_those_of_the_folder(found, judge, pictures, sd3_folder) -> None:
    real = expected_features(pictures)
    own = judge.reference.real["image"]
    assert own.features.shape == (PICTURES, 6)
    assert (own.features - real).abs().max() < 1e-6
    prompts = [PROMPTS[index % 12] for index in range(30)]
    pixels = generate(load_pipeline(sd3_folder), prompts, indices=range(30), seed=1, steps=2, guidance=1.0)
    fid = found.rows[0].results[1].figures["fid"]
    # Samples are stored with 8 bits.
    drawn = extract_features(ColourFeatures(), (pixels * 255.0).round() / 255.0)
    assert fid.value == pytest.approx(feature_distance(drawn, own.features), rel=1e-4)
    floor = feature_distance(own.features[0::2], own.features[1::2])
    assert floor > 0.001
    assert fid.floor == pytest.approx(floor, rel=1e-6)
    assert (fid.samples, fid.references, fid.source) == (30, 24, "colours, 6 features")
    assert (found.reference, found.floor_of_halves) == ("photos", True)
    assert found.rows[0].results[0].figures["fid"].floor == fid.floor


def test_there_is_no_classifier(found) -> None:
    assert [kind.key for kind in found.kinds] == ["fid", "kid"]
    assert [sorted(one.figures) for one in found.rows[0].results] == [["fid", "kid"]] * 2
    assert found.rows[0].spread("accuracy") is None


def test_grid_shows_ten_prompts_and_pictures(found, judge) -> None:
    assert found.grid.prompts == PROMPTS[:10]
    assert found.grid.real.shape == (10, 3, PIXELS, PIXELS)
    assert found.grid.pixels[0].shape == (10, 3, PIXELS, PIXELS)
    assert judge.reference.sample_prompts(14)[10:] == [*PROMPTS[10:], *PROMPTS[:2]]


def test_table_and_notes(found) -> None:
    table = results_table(found)
    assert table.header == ("system", "steps", "guidance", "FID", "KID", "samples", "seeds")
    floor = found.rows[0].results[0].figures["fid"].floor
    assert [row[0] for row in table.rows] == ["real images", "tiny"]
    assert (table.rows[0][3], table.rows[1][5], table.rows[1][6]) == (f"{floor:.2f}", "30", "0, 1")
    # Thirty images are marked wherever they are shown.
    assert table.rows[1][3].endswith(" !")
    notes = table_notes(found)
    assert notes[0] == ("30 generated images per seed against 24 real images of photos; features: colours, 6 features.")
    assert notes[1].count("the two halves of the folder against each other") == 1
    assert notes[-1] == "! 30 images, fewer than 2000: for trying out, not for publishing."
    assert sum("Accuracy" in note for note in notes) == 0


def test_report_and_figures_of_an_export(found, tmp_path) -> None:
    made = Provenance("python x", "2026-01-02", "3.11.0", (("torch", "2.15"),), "Some CPU", 2)
    files = write_report(tmp_path, found, provenance=made)
    content = json.loads(files.json.read_text())
    assert (content["reference"], [one["key"] for one in content["measures"]]) == ("photos", ["fid", "kid"])
    assert content["rows"][0]["results"][0]["figures"]["fid"]["warnings"][0].startswith("30 images, fewer than 2000")
    # The grid, real pictures above it, and the best and the worst samples.
    assert files.html.read_text().count("data:image/png") == 3
    results = found.rows[0].results
    figure, _ = figures_of(results, found.kinds, found.reference)
    assert figure.name == "FID (lower is better)"
    assert figure.value == pytest.approx((results[0].value("fid") + results[1].value("fid")) / 2, abs=1e-4)
    assert figure.setting == (
        "2 steps, guidance 1, 30 images, seed 0, 1; against 24 real images of photos; colours, 6 features; "
        f"real images {results[0].figures['fid'].floor:.4g}; "
        "30 images, fewer than 2000: for trying out, not for publishing"
    )


def test_speed_is_timed_with_own_prompts(judge, sd3_folder, tmp_path) -> None:
    plan = TimingPlan(repeats=1, warmup=0, batch_size=2)
    sampling = Sampling(tmp_path, 20)
    comparison = compare([System("tiny", str(sd3_folder), 1, 1.0)], judge=judge, sampling=sampling, timing=plan)
    assert comparison is not None
    row = comparison.rows[0]
    assert row.latency is not None
    assert row.latency.batch_size == 2


def test_statistics_alone_are_a_reference(pictures, prompt_file, sd3_folder, tmp_path) -> None:
    """mu and sigma of another package: FID and its interval, over images alone; what needs pictures is refused."""
    real = expected_features(pictures)
    np.savez(tmp_path / "photos.npz", mu=real.mean(dim=0).numpy(), sigma=torch.cov(real.T.double()).numpy())
    own = OwnReference(str(prompt_file), str(tmp_path / "photos.npz"), PIXELS, PIXELS)
    reference = own_reference(own, extractors={"image": ColourFeatures()})
    sampling = Sampling(tmp_path / "samples", 30)
    comparison = compare(
        [System("tiny", str(sd3_folder), 2, 1.0)], judge=Judge(reference, ("fid",), repetitions=10), sampling=sampling
    )
    assert comparison is not None
    fid = comparison.rows[0].results[0].figures["fid"]
    assert (fid.references, fid.floor) == (None, None)
    assert fid.low is not None
    assert fid.low < fid.value
    assert comparison.grid.real is None
    made = Provenance("python x", "2026-01-02", "3.11.0", (("torch", "2.15"),), "Some CPU", 2)
    assert write_report(tmp_path / "report", comparison, provenance=made).html.stat().st_size > 5000
    with pytest.raises(ValueError, match=r"metric 'kid' needs pictures; photos\.npz holds their mean and covariance"):
        Judge(reference, ("kid",))


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
    (tmp_path / "photos").mkdir()
    place = str(tmp_path / "photos")
    assert pick_reference(place, [system], prompts="p", cut=True) == OwnReference("p", place, 24, 32, cut=True)
    other = System("y", str(folder), 1, 1.0)
    with pytest.raises(ValueError, match=r"the pipelines draw \[\(16, 16\), \(24, 32\)\]"):
        pick_reference(place, [system, other], prompts="p", cut=True)
    assert pick_reference(place, [system, other], prompts="p") == OwnReference("p", place, 24, 32)
    assert pick_reference("digits:train", [system], prompts=None) == "train"
    assert pick_reference("digits", [system], prompts=None) == "test"
    for given, message in (
        (("digits:valid", None), "the digits have digits:test and digits:train"),
        (("digits", "p"), "brings its own prompts"),
        (("nowhere", "p"), "there is no nowhere"),
        ((None, None), "give --prompts FILE"),
    ):
        with pytest.raises(ValueError, match=message):
            pick_reference(given[0], [system], prompts=given[1])


def test_bad_folders_and_prompts_are_errors(pictures, prompt_file, tmp_path) -> None:
    extractors = {"image": ColourFeatures()}
    for number, path in enumerate(find_pictures(pictures)[:7]):
        (tmp_path / f"{number}.png").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"holds 7 pictures; use at least 8"):
        own_reference(OwnReference(str(prompt_file), str(tmp_path), 16, 16), extractors=extractors)
    (tmp_path / "8.webp").write_text("no picture", encoding="ascii")
    with pytest.raises(ValueError, match=r"8\.webp is no whole picture"):
        own_reference(OwnReference(str(prompt_file), str(tmp_path), 16, 16), extractors=extractors)
    with pytest.raises(ValueError, match=r"prompt file .* does not exist"):
        own_reference(OwnReference("nowhere", str(pictures), 16, 16), extractors=extractors)
    with pytest.raises(ValueError, match="does not tell its picture size"):
        picture_size(System("x", str(tmp_path), 1, 1.0))


def test_a_choice_is_checked_before_anything_is_read(pictures, prompt_file, tmp_path) -> None:
    own = OwnReference(str(prompt_file), str(pictures), 16, 16)
    for metrics, message in (
        (("fid", "kid"), "fid, kid of your own pictures needs --weights inception=PATH"),
        (("fd_dinov2",), "--weights dinov2=PATH"),
        (("cmmd",), "--weights clip_vision=PATH"),
        ((), "no metric compares with it"),
    ):
        with pytest.raises(ValueError, match=message):
            own_judge(own, Choice(metrics))
    with pytest.raises(ValueError, match="fid compares with real pictures; give --reference"):
        own_judge(OwnReference(str(prompt_file), None, 16, 16), Choice(("fid",)))
    with pytest.raises(ValueError, match="metric 'sharpness' is unknown; known are fid"):
        Choice(("sharpness",))
    with pytest.raises(ValueError, match="protocol is 'mine'"):
        Choice(("fid",), protocol="mine")
    with pytest.raises(ValueError, match="--weights names 'x'"):
        Choice(("fid",), {"x": str(tmp_path)})
    with pytest.raises(ValueError, match="there is no such file or folder; it is weights-inception"):
        Choice(("fid",), {"inception": "nowhere"})
