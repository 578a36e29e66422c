"""What `evaluate_video` does: sample, score and aggregate are VBench's three stages, measure needs nothing of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.commands.draw_videos import VideoSource
    from fewstep.evaluation.vbench.suite import Suite

PER_PROMPT = 100
NO_VBENCH = "give --prompts FILE, or --vbench_root DIR for VBench's own"


def video_parser(about: str = "") -> argparse.ArgumentParser:
    """The four stages with their options, without any slow import."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    found = argparse.ArgumentParser(description=about.strip(), formatter_class=formatter)
    stages = found.add_subparsers(required=True, metavar="sample|score|aggregate|measure")

    def stage(name: str, about: str, run: Any) -> argparse.ArgumentParser:
        made = stages.add_parser(name, help=about, description=about, formatter_class=formatter)
        made.set_defaults(run=run)
        return made

    _sample_options(stage("sample", "draw videos into a store, and link them under VBench's names", sample))
    _score_options(stage("score", "score a folder of videos with VBench in its own environment", score_videos))
    totals = stage("aggregate", "normalise, weigh and add up what was scored", aggregate)
    totals.add_argument("--results", required=True, help="the --output of score")
    totals.add_argument("--submission", action="store_true", help="write the zip for VBench's leaderboard")
    _measure_options(stage("measure", "motion, flicker, drift, chunk boundaries and scorers, with a page", measure))
    return found


def _sample_options(stage: argparse.ArgumentParser) -> None:
    add = stage.add_argument
    add("--pipeline", required=True, metavar="DIR", help="Wan, AnyFlow or causal export, or a hub id")
    add("--output", required=True, help="folder of store and videos")
    add("--prompts", help="your own, one a line")
    add("--vbench_root", help="checkout of VBench, or the folder of its package")
    add("--dimensions", default="all", help="of VBench, with commas")
    add("--count", type=int, default=5, help="videos a prompt")
    add("--flickering", type=int, default=25, help="videos a prompt of temporal_flickering, of which five are chosen")
    add("--extended", help="longer texts to ask for: JSONL with prompt and extended, or a line for each prompt")
    add("--seed", type=int, default=0)
    add("--steps", type=int, help="None: distillation.json")
    add("--guidance", type=float, help="None: distillation.json")
    add("--frames", type=int, help="of stock pipelines; None: distillation.json, or their own")
    add("--chunks", type=int, help="of causal students; None: as trained")
    add("--height", type=int)
    add("--width", type=int)
    add("--rate", type=int, help="frames per second; None: the export's, or 16")
    add("--batch_size", type=int, default=1)
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="None: as the weights are stored")


def _score_options(stage: argparse.ArgumentParser) -> None:
    add = stage.add_argument
    add("--videos", required=True, help="folder that sample wrote: OUTPUT/videos")
    add("--output", required=True, help="folder of the results")
    add("--vbench_root", required=True, help="checkout of VBench, or the folder of its package")
    add("--dimensions", default="all", help="with commas")
    add("--python", default=".venv-vbench/bin/python", help="interpreter of VBench's environment (make vbench-env)")
    add("--cache", default="~/.cache/vbench", help="folder of VBench's weights")
    add("--device", default="cuda", help="cpu or cuda")
    add("--count", type=int, default=5, help="videos a prompt")
    add(
        "--partial", action="store_true", help="score what is there although videos are missing; there is then no total"
    )
    add("--no_filter", action="store_true", help="temporal_flickering without VBench's static filter")
    add("--long", action="store_true", help="VBench-Long, from a checkout")


def _measure_options(stage: argparse.ArgumentParser) -> None:
    add = stage.add_argument
    add(
        "--videos",
        action="append",
        required=True,
        metavar="[NAME=]DIR",
        help="stores or folders; the first is baseline",
    )
    add("--output", required=True, help="folder of the page")
    add(
        "--scorer",
        action="append",
        default=[],
        metavar="NAME[=WEIGHTS]",
        help="of clips or frames, see docs/rewards.md",
    )
    add("--reference", help="folder of real videos, for FVD")
    add("--videomae", help="folder of a VideoMAE, for FVD")
    add("--fvd_frames", type=int, default=16, help="frames that FVD compares, from the first")
    add("--repetitions", type=int, default=200, help="of the bootstrap")
    add("--device", default="cpu", help="cpu or cuda")


def sample(options: argparse.Namespace) -> None:
    """Draw what is missing of the store, by all processes, and write the folder for VBench. Raises ValueError."""
    from fewstep.commands.evaluate_image import require_device, require_folder
    from fewstep.core.media.videos import require_ffmpeg

    require_ffmpeg("a store of videos")
    require_folder(options.output)
    require_device(options.device)
    if options.rate is not None and options.rate < 1:
        raise ValueError(f"--rate is {options.rate}; use at least 1 frame per second")
    suite, videos, texts = _asked(options)
    source = _source(options, list(texts.values()))
    from accelerate import PartialState

    from fewstep.evaluation.samples.draw import blocks_of, fill_blocks
    from fewstep.evaluation.samples.store import SampleStore

    state, folder = PartialState(), Path(options.output) / "store"
    if state.process_index == 0:
        SampleStore(folder, source.plan)
    state.wait_for_everyone()
    store = SampleStore(folder, source.plan)
    there = store.samples().keys()
    blocks = blocks_of([video.index for video in videos], options.batch_size)
    missing = [block for block in blocks if any(index not in there for index in block)]
    of_index = {video.index: texts[video.prompt] for video in videos}
    if missing[state.process_index :: state.num_processes]:
        draw = source.load()
        mine = missing[state.process_index :: state.num_processes]
        fill_blocks(store, draw, mine, lambda index: of_index[index], rank=state.process_index)
    state.wait_for_everyone()
    if state.process_index > 0:
        return
    store.merge()
    print(f"{len(videos)} videos in {folder}")
    if suite is not None:
        from fewstep.evaluation.vbench.folder import write_folder

        print(f"for VBench: {write_folder(store, videos, extended=texts, output=Path(options.output) / 'videos')}")


def _asked(options: argparse.Namespace) -> tuple[Suite | None, list[Any], dict[str, str]]:
    """The suite, the videos that are wanted, and what the pipeline is asked for each prompt."""
    from fewstep.core.data import read_prompts
    from fewstep.evaluation.vbench.suite import Suite, Video, parse_dimensions, read_extended

    if (options.prompts is None) == (options.vbench_root is None):
        raise ValueError(NO_VBENCH if options.prompts is None else "--prompts beside --vbench_root: give one of them")
    if options.batch_size < 1 or options.count < 1:
        raise ValueError(f"batch_size is {options.batch_size} and count {options.count}; use at least 1")
    if options.prompts is not None:
        prompts = list(dict.fromkeys(read_prompts(options.prompts)))
        texts = read_extended(options.extended, prompts)
        pairs = enumerate(prompts)
        if options.count > PER_PROMPT:
            raise ValueError(f"count is {options.count}; at most {PER_PROMPT} videos a prompt")
        # A fixed stride, so that a video is the same whatever the count.
        videos = [Video(p, n, place * PER_PROMPT + n) for place, p in pairs for n in range(options.count)]
        return None, videos, texts
    suite = Suite.read(options.vbench_root)
    dimensions = parse_dimensions(options.dimensions)
    videos = suite.videos(dimensions, count=options.count, flickering=options.flickering)
    return suite, videos, read_extended(options.extended, suite.prompts)


def _source(options: argparse.Namespace, texts: Sequence[str]) -> VideoSource:
    from fewstep.commands.draw_videos import VideoCall, video_source

    names = ("pipeline", "steps", "guidance", "frames", "height", "width", "chunks", "rate", "device", "dtype")
    call = VideoCall(**{name: getattr(options, name) for name in names})
    return video_source(call, seed=options.seed, prompts=texts)


def score_videos(options: argparse.Namespace) -> None:
    """Score with VBench. Raises ValueError for what is missing, RuntimeError for dimensions that failed."""
    from fewstep.evaluation.vbench.score import Scoring, score_suite
    from fewstep.evaluation.vbench.suite import Suite, parse_dimensions

    scoring = Scoring(
        videos=Path(options.videos),
        output=Path(options.output),
        python=options.python,
        root=options.vbench_root,
        cache=Path(options.cache).expanduser(),
        device=options.device,
        count=options.count,
        partial=options.partial,
        filtered=not options.no_filter,
        long=options.long,
    )
    folder = score_suite(scoring, Suite.read(options.vbench_root), parse_dimensions(options.dimensions))
    print(f"results in {folder}")


def aggregate(options: argparse.Namespace) -> None:
    """Print VBench's table; write totals.json and, if asked, the submission. Raises ValueError."""
    from fewstep.evaluation.vbench.aggregate import protocol_line, read_results, totals, write_submission
    from fewstep.evaluation.vbench.page import totals_table, write_totals

    scores = read_results(options.results)
    found = totals(scores)
    print(totals_table(scores, found).text(), protocol_line(options.results), sep="\n\n")
    if found.missing:
        print(f"no total: {len(found.missing)} dimensions are missing: {', '.join(found.missing)}")
    write_totals(options.results, scores, found)
    if options.submission:
        print(f"submission: {write_submission(options.results)}")


def measure(options: argparse.Namespace) -> None:
    """Judge films and write a page. Raises ValueError."""
    import torch

    from fewstep.commands.evaluate_image import load_scorer_entries, require_device, require_folder, scorer_entry
    from fewstep.core.media.videos import VIDEO_SUFFIXES
    from fewstep.evaluation import provenance, report, table
    from fewstep.evaluation.scorers.frames import FrameScore
    from fewstep.evaluation.systems import named_place
    from fewstep.evaluation.video import features, judge

    require_folder(options.output)
    require_device(options.device)
    if options.repetitions < 2:
        raise ValueError(f"--repetitions is {options.repetitions}; use at least 2 (200 is usual)")
    pairs = [named_place(text) for text in options.videos]
    films = [judge.Films.read(name or Path(place).absolute().name, place) for name, place in pairs]
    scorers = load_scorer_entries([scorer_entry(text) for text in options.scorer], options.device)
    lifted = tuple(one if one.card.needs_video else FrameScore(one) for one in scorers)
    extractor, reference = None, None
    if (options.reference is None) != (options.videomae is None):
        raise ValueError("FVD needs both --reference FOLDER of real videos and --videomae FOLDER of weights")
    if options.videomae is not None:
        extractor = features.load_videomae(options.videomae, device=options.device)
        files = [path for path in sorted(Path(options.reference).iterdir()) if path.suffix.lower() in VIDEO_SUFFIXES]
        reference = features.clip_features(extractor, files, frames=options.fvd_frames)
        assert isinstance(reference, torch.Tensor)
    chosen = judge.FilmJudge(
        lifted,
        extractor,
        reference,
        reference_name=options.reference or "no reference",
        frames=options.fvd_frames,
        repetitions=options.repetitions,
        device=options.device,
    )
    found, curves = judge.compare_films(chosen, films)
    made = provenance.collect_provenance(provenance.program_name(), arguments=sys.argv[1:], device=options.device)
    words = {"title": "Evaluation of videos", "curves_title": "Over time"}
    page = report.write_report(options.output, found, provenance=made, curves=curves, **words).html
    print(table.results_table(found).text(), f"report: {page}", sep="\n\n")


def evaluate_video(about: str = "") -> None:
    """The command, as it is typed; ends the process."""
    options = video_parser(about).parse_args()
    try:
        options.run(options)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f"error: {error}")
