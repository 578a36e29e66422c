"""One path for videos of every kind: drawn, resumed, linked for VBench, measured, with a page."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEModel

from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
from fewstep.commands import draw_videos
from fewstep.commands.evaluate_video import evaluate_video
from fewstep.core.export.pipeline import export_pipeline
from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.grids import step_grid
from fewstep.core.media.videos import iterate_frames
from fewstep.evaluation.generation import generate, load_pipeline
from fewstep.evaluation.samples.store import SampleStore
from fewstep.evaluation.systems import StepGrid
from tests.causal_video.tiny_streams import build_stream_pipeline
from tests.core.export.test_export_anyflow import REPORT as ANYFLOW_REPORT
from tests.core.export.test_export_anyflow import two_time_wan
from tests.evaluation.vbench.suite_files import write_suite
from tests.tiny_pipelines import save_pipeline
from tests.tiny_videos import build_video_pipeline

SIZE = ("--height", "32", "--width", "32")
# Of two videos of each of three prompts, which have places for a hundred.
PLACES = (0, 1, 100, 101, 200, 201)


def call(*arguments: object) -> str | int | None:
    """The command in this process; its exit code or message."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate_video.py", *map(str, arguments)])
        try:
            evaluate_video()
        except SystemExit as stopped:
            return stopped.code
    return None


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "stock"
    build_video_pipeline(text_tokens=8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "causal"
    build_stream_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a cat\na dog\na cow\n")
    return file


@pytest.fixture(scope="module")
def stores(stock: Path, causal: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two videos of each prompt by a stock pipeline and by a causal student."""
    folder = tmp_path_factory.mktemp("stores")
    common = ("--prompts", prompts, "--count", 2, *SIZE)
    drawn = ("--steps", 2, "--guidance", 1, "--frames", 9)
    assert call("sample", "--pipeline", stock, "--output", folder / "stock", *drawn, *common) is None
    assert call("sample", "--pipeline", causal, "--output", folder / "causal", "--chunks", 3, *common) is None
    return {"stock": folder / "stock" / "store", "causal": folder / "causal" / "store"}


@pytest.mark.slow
def test_stock_pipelines_and_causal_students_fill_stores(stores: dict[str, Path], causal: Path) -> None:
    for name, frames in (("stock", 9), ("causal", 1 + 8 + 8)):
        store = SampleStore.open(stores[name])
        samples = store.require_indices(PLACES)
        assert [one.prompt for one in samples] == ["a cat", "a cat", "a dog", "a dog", "a cow", "a cow"]
        films = [list(iterate_frames(store.folder / one.file)) for one in samples]
        assert [len(film) for film in films] == [frames] * 6
        assert films[0][0].size == (32, 32)
        assert len({one.sha256 for one in samples}) == 6
    plan = SampleStore.open(stores["causal"]).plan
    assert plan.call["chunk_starts"] == [0, 1, 9]
    # A stream of the same seed is the same video.
    pipeline = CausalVideoPipeline.from_pretrained(causal)
    seed = draw_videos.shared_integer(0, 101, "video", 2**31)
    chunks = [output.images() for output in pipeline.stream("a dog", chunks=3, seed=seed)]
    film = list(iterate_frames(stores["causal"] / SampleStore.open(stores["causal"]).require_indices(PLACES)[3].file))
    shown = torch.tensor([picture.getpixel((5, 5)) for picture in film]).float()
    expected = torch.cat([torch.from_numpy(part[:, 5, 5].copy()) for part in chunks]).float()
    assert (shown - expected).abs().mean() < 12.0


@pytest.mark.slow
def test_a_resume_makes_nothing_twice(stock: Path, prompts: Path, tmp_path: Path, monkeypatch) -> None:
    common = ("--pipeline", stock, "--prompts", prompts, "--steps", 1, "--guidance", 1, "--frames", 5, *SIZE)
    arguments = ("sample", *common, "--count", 1, "--output", tmp_path)
    assert call(*arguments) is None
    store = SampleStore.open(tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*.mp4")}
    assert len(before) == 3
    store.path(100).unlink()
    assert call(*arguments) is None
    after = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*.mp4")}
    assert [after[path] == before[path] for path in sorted(before)] == [True, False, True]
    monkeypatch.setattr(draw_videos, "load_pipeline", lambda *_, **__: pytest.fail("a pipeline is loaded"))
    assert call(*arguments) is None
    assert "seed = 0, and 7 is asked for" in str(call(*arguments, "--seed", 7))


@pytest.mark.slow
def test_a_vbench_folder_holds_original_names(causal: Path, tmp_path: Path) -> None:
    root = write_suite(tmp_path / "root")
    texts = tmp_path / "long.txt"
    texts.write_text("sign long\ndog long\ncat long\nvase long\n")
    arguments = ("--vbench_root", root, "--dimensions", "object_class,temporal_flickering", "--count", 1)
    rest = ("--flickering", 2, "--extended", texts, "--output", tmp_path / "out", "--chunks", 2, *SIZE)
    assert call("sample", "--pipeline", causal, *arguments, *rest) is None
    names = sorted(path.name for path in (tmp_path / "out" / "videos").iterdir())
    assert names == sorted(
        [
            *(f"In a still frame, a stop sign-{number}.mp4" for number in range(2)),
            *(f"a still vase-{number}.mp4" for number in range(2)),
            "a dog-0.mp4",
        ]
    )
    lines = (tmp_path / "out" / "videos.manifest.jsonl").read_text().splitlines()
    record = next(one for one in map(json.loads, lines) if one["file"] == "a dog-0.mp4")
    assert (record["prompt"], record["asked"], record["number"], record["index"]) == ("a dog", "dog long", 0, 25)
    assert (record["rate"], record["kind"], record["call"]["chunks"]) == (16, "videos", 2)
    (tmp_path / "out" / "videos" / "stray.mp4").write_bytes(b"")
    message = str(call("sample", "--pipeline", causal, *arguments, *rest))
    assert "holds 'stray.mp4', which is no video of this run" in message


@pytest.mark.slow
def test_films_are_measured_and_compared(stores: dict[str, Path], tmp_path: Path, capsys) -> None:
    config = VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=4, tubelet_size=2, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    VideoMAEModel(config).save_pretrained(tmp_path / "videomae")
    real = stores["stock"] / "0000"
    arguments = ("--videos", f"wan={stores['stock']}", "--videos", stores["causal"], "--output", tmp_path / "page")
    fvd = ("--reference", real, "--videomae", tmp_path / "videomae", "--fvd_frames", 9, "--repetitions", 20)
    assert call("measure", *arguments, *fvd) is None
    content = json.loads((tmp_path / "page" / "report.json").read_text())
    rows = {row["name"]: row["results"][0]["figures"] for row in content["rows"]}
    assert rows["wan"]["fvd"]["value"] == pytest.approx(0.0, abs=1e-5)
    assert rows["store"]["fvd"]["value"] > 0.0
    assert rows["store"]["fvd"]["warnings"][0].startswith("6 films for 16 features")
    assert "boundary" in rows["store"]
    assert "boundary" not in rows["wan"]
    assert 0.0 < rows["wan"]["flickering"]["value"] < 1.0
    assert content["rows"][1]["minus_baseline"]["bend"]["low"] < content["rows"][1]["minus_baseline"]["bend"]["high"]
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("Over time") == 1
    assert capsys.readouterr().out.count("report: ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "--pipeline", "CAUSAL", "--steps", "2", "--prompts", "PROMPTS"), "--steps beside a causal student"),
        (("sample", "--pipeline", "STOCK", "--chunks", "2", "--prompts", "PROMPTS"), "is no causal student"),
        (("sample", "--pipeline", "STOCK", "--prompts", "PROMPTS"), "give --steps"),
        (("sample", "--pipeline", "STOCK"), "give --prompts FILE, or --vbench_root DIR"),
        (("sample", "--pipeline", "STOCK", "--prompts", "PROMPTS", "--vbench_root", "x"), "give one of them"),
        (("sample", "--pipeline", "nowhere", "--prompts", "PROMPTS"), "there is no directory nowhere"),
        (("sample", "--pipeline", "STOCK", "--prompts", "PROMPTS", "--count", "0"), "count 0; use at least 1"),
        (("measure", "--videos", "nowhere"), "there is no directory nowhere of films"),
        (("measure", "--videos", "STOCK"), "holds 0 films"),
        (("measure", "--videos", "STORE", "--videomae", "x"), "FVD needs both"),
        (("score", "--videos", "x", "--vbench_root", "x"), "has no VBench_full_info.json"),
    ],
)
def test_bad_input_fails_with_a_sentence(
    arguments: tuple[str, ...], message: str, stock: Path, causal: Path, prompts: Path, stores, tmp_path: Path
) -> None:
    places = {"CAUSAL": causal, "STOCK": stock, "PROMPTS": prompts, "STORE": stores["stock"]}
    output = tmp_path / "out"
    text = str(call(*(places.get(part, part) for part in arguments), "--output", output))
    assert text.startswith("error: ")
    assert text.count(message) == 1
    assert not (output / "store").exists()


def test_results_that_are_not_there(tmp_path: Path) -> None:
    assert "has no results; score the videos first" in str(call("aggregate", "--results", tmp_path))


@pytest.mark.slow
def test_an_anyflow_export_is_drawn_at_its_steps_or_any(prompts: Path, tmp_path: Path) -> None:
    """Told by its own record, or with another number of steps, as its files serve all of them."""
    teacher = save_pipeline(build_video_pipeline(text_tokens=8, shift=5.0), tmp_path / "teacher")
    export_pipeline(
        str(teacher),
        two_time_wan("gate"),
        sampler=SamplerSpec(step_grid(2, shift=5.0), "flow_map", 5.0),
        output=tmp_path / "export",
        report=ANYFLOW_REPORT,
    )
    common = ("--prompts", prompts, "--count", 1)
    assert call("sample", "--pipeline", tmp_path / "export", "--output", tmp_path / "own", *common) is None
    assert call("sample", "--pipeline", tmp_path / "export", "--output", tmp_path / "4", "--steps", 4, *common) is None
    own, four = (SampleStore.open(tmp_path / name / "store") for name in ("own", "4"))
    assert (own.plan.call["steps"], four.plan.call["steps"]) == (2, 4)
    films = [list(iterate_frames(store.folder / store.samples()[0].file)) for store in (own, four)]
    assert [len(film) for film in films] == [9, 9]
    assert own.samples()[0].sha256 != four.samples()[0].sha256
    pipeline = load_pipeline(tmp_path / "export")
    grid = StepGrid(frames=9, height=32, width=32)
    found = generate(pipeline, ["a cat"], indices=[0], seed=0, steps=2, guidance=1.0, grid=grid)
    assert found.shape == (1, 3, 9, 32, 32)
    assert 0.0 <= float(found.min()) < float(found.max()) <= 1.0
