"""What `evaluate_image` does with its options: checks first, samples next, figures last."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.evaluation.choice import Choice
    from fewstep.evaluation.judge import Judge
    from fewstep.evaluation.samples.pipelines import Sampling
    from fewstep.evaluation.scorers.scorer import Scorer
    from fewstep.evaluation.systems import System

DTYPES = ("float32", "bfloat16", "float16")
# Where nothing is asked for: what can be had of digits, of real pictures, and of a file of statistics.
DEFAULT_METRICS = {"digits": "fid,kid,classes", "pictures": "fid,kid,prc", "statistics": "fid", "nothing": ""}


def image_parser(classifier: str | None = None, about: str = "") -> argparse.ArgumentParser:
    """The options, without any slow import. `classifier` is where the digits' one is if that is not told."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    found = argparse.ArgumentParser(description=about.strip(), formatter_class=formatter)
    add = found.add_argument
    add("--pipeline", action="append", default=[], metavar="[NAME=]DIR", help="diffusers folder or hub id; repeatable")
    add("--pictures", action="append", default=[], metavar="[NAME=]DIR", help="finished pictures; repeatable")
    add("--steps", type=int, nargs="+", help="one for all pipelines or one each; None: distillation.json")
    add("--guidance", type=float, nargs="+", help="one for all pipelines or one each; None: distillation.json")
    add("--grid", nargs="+", help="sigmas such as 1,0.5, or own; one for all pipelines or one each")
    add("--baseline", type=int, default=0, help="number of the pipeline that others are compared with, from 0")
    add("--metrics", help="fid,kid,prc,dc,fid_inf,fd_dinov2,cmmd,classes, names of scorers; None: what fits")
    add("--scorer", action="append", default=[], metavar="NAME[=WEIGHTS]", help="of docs/rewards.md, or its YAML")
    add(
        "--weights", action="append", default=[], metavar="NAME=PATH", help="of inception, dinov2, clip_vision, scorers"
    )
    add("--protocol", default="clean", help="clean, torch-fidelity, legacy-tensorflow or legacy-pytorch")
    add("--reference", help="folder of pictures, .npz of statistics, or digits, digits:train")
    add("--reference_fit", choices=["own", "cut"], default="own", help="own size, or cut to that of the samples")
    add("--save_statistics", metavar="FILE.npz", help="write mean and covariance of the reference, for other packages")
    add("--prompts", help="a prompt a line")
    add("--samples", type=int, default=2000, help="images per seed")
    add("--seed", type=int, nargs="+", default=[0], help="several give medians and ranges")
    add("--repetitions", type=int, default=200, help="of the bootstrap; 0 leaves intervals out")
    add("--output", required=True, help="folder of the page")
    add("--samples_folder", metavar="DIR", help="folder of the samples; None: samples in that of the page")
    add("--run", action="append", default=[], help="run directory whose metrics are plotted; repeatable")
    add("--classifier", default=classifier, help="folder of the digits classifier, for --reference digits")
    add("--batch_size", type=int, default=16, help="images per call")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", choices=DTYPES, help="None: as the weights are stored")
    add("--workers", type=int, default=0, help="processes that read pictures")
    add("--timing_repeats", type=int, default=5, help="timed calls per system; 0 leaves speed out")
    add("--timing_batch", type=int, default=1, help="images per timed call")
    add("--threads", type=int, help="CPU threads of the timed calls; None: as many as torch uses")
    add("--update_card", action="store_true", help="write the figures into the model cards of judged exports")
    return found


def run(options: argparse.Namespace, arguments: Sequence[str]) -> str | None:
    """Evaluate as asked. Returns an error message, or None when all is written.

    Raises nothing for bad input: what is wrong comes back as a sentence, before anything slow where it can.
    """
    try:
        from fewstep.evaluation import curves

        systems = chosen_systems(options)
        metrics = [curve for run_directory in options.run for curve in curves.read_curves(run_directory)]
        judge, sampling = prepared(options, systems)
        from fewstep.evaluation import evaluate, latency, provenance, record, report, table

        timing = None
        if options.timing_repeats:
            timing = latency.TimingPlan(
                options.timing_repeats, batch_size=options.timing_batch, threads=options.threads
            )
        found = evaluate.compare(
            systems, judge=judge, sampling=sampling, timing=timing, baseline=options.baseline, workers=options.workers
        )
    except (ValueError, FileNotFoundError) as error:
        return f"error: {error}"
    if found is None:
        return None
    made = provenance.collect_provenance(provenance.program_name(), arguments=arguments, device=options.device)
    page = report.write_report(options.output, found, provenance=made, curves=metrics).html
    if options.update_card:
        record.record_figures(found)
    print(table.results_table(found).text(), f"report: {page}", sep="\n\n")
    return None


def chosen_systems(options: argparse.Namespace) -> list[System]:
    """Pipelines, and then folders of pictures, each in the order of the command line. Raises ValueError."""
    from fewstep.evaluation import systems

    systems.require_samples(options.samples)
    require_folder(options.output)
    if len(set(options.seed)) < len(options.seed) or not all(0 <= seed < 2**63 for seed in options.seed):
        raise ValueError(f"--seed is {options.seed}; give different ones from 0 on")
    if not options.pipeline and not options.pictures:
        raise ValueError("nothing to judge: give --pipeline DIR, or --pictures DIR")
    found = systems.parse_systems(
        options.pipeline, steps=options.steps, guidance=options.guidance, grids=options.grid
    ) + systems.parse_pictures(options.pictures)
    systems.require_names(found)
    if not 0 <= options.baseline < len(found):
        raise ValueError(f"--baseline is {options.baseline}, and there are {len(found)} systems, counted from 0")
    return found


def prepared(options: argparse.Namespace, systems: Sequence[System]) -> tuple[Judge, Sampling]:
    """The judge with its references read, and how samples are drawn. Raises ValueError."""
    require_device(options.device)
    from fewstep.evaluation.systems import pick_reference

    real = pick_reference(options.reference, systems, prompts=options.prompts, cut=options.reference_fit == "cut")
    choice, scorers = chosen_measures(options)
    if scorers and not isinstance(real, str) and real.prompts is None and not all(map(is_store, options.pictures)):
        raise ValueError(f"{scorers[0].card.name} reads prompts: give --prompts FILE, picture i has prompt i")
    if isinstance(real, str) and options.classifier is None:
        raise ValueError("--reference digits needs --classifier DIR: assets/digits_image/classifier of the repository")
    from fewstep.embedded.digits.reference import judge_of

    judge = judge_of(real, choice, classifier=options.classifier, scorers=scorers)
    if options.save_statistics is not None:
        _save_statistics(judge, options.save_statistics)
    from fewstep.evaluation.samples.pipelines import Sampling

    folder, seeds = Path(options.samples_folder or Path(options.output) / "samples"), tuple(options.seed)
    drawn = {"batch_size": options.batch_size, "device": options.device, "dtype": options.dtype}
    return judge, Sampling(folder, options.samples, seeds, **drawn, **this_process())


def is_store(place: str) -> bool:
    """Whether a folder of pictures is a store of samples, which knows its own prompts."""
    from fewstep.evaluation.samples.store import STORE_FILE
    from fewstep.evaluation.systems import named_place

    return (Path(named_place(place)[1]) / STORE_FILE).is_file()


def require_folder(output: str) -> None:
    """Raises ValueError when something that is no folder is where one is to be written."""
    for place in (Path(output), *Path(output).parents):
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{place} is a file; name a folder for --output")
            return


def require_device(device: str) -> None:
    """Raises ValueError for a device that torch does not know or does not have."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def chosen_measures(options: argparse.Namespace) -> tuple[Choice, tuple[Scorer, ...]]:
    """Metrics and scorers with their weights. Raises ValueError for names and files that are not there."""
    from fewstep.dmd.reward.scorers import SCORERS
    from fewstep.evaluation.choice import WEIGHTS, Choice

    kind = "nothing" if options.reference is None else "pictures"
    if options.reference is not None and options.reference.partition(":")[0] == "digits":
        kind = "digits"
    if options.reference is not None and Path(options.reference).suffix == ".npz":
        kind = "statistics"
    names = [name for name in (options.metrics or DEFAULT_METRICS[kind]).split(",") if name]
    places = dict(_pair(text, "--weights") for text in options.weights)
    # CLIP score is a metric by its short name and a scorer by its long one.
    named = [{"clip": "clip_score"}.get(name, name) for name in names]
    if "clip" in places:
        places["clip_score"] = places.pop("clip")
    asked = [name for name in named if name in SCORERS]
    entries = [scorer_entry(text) for text in options.scorer]
    entries += [{"name": name} for name in asked if name not in {entry["name"] for entry in entries}]
    for entry in entries:
        own = places.pop(entry["name"], None)
        if own is not None:
            entry.setdefault("weights", own)
    twice = [entry["name"] for entry in entries]
    if len(set(twice)) < len(twice) or len(set(named)) < len(named):
        raise ValueError(f"a measure is named twice in {[*named, *twice]}; give each once")
    if not names and not entries:
        raise ValueError("nothing to measure: give --metrics, --scorer, or real pictures: --reference digits, or DIR")
    for name in places:
        if name not in WEIGHTS:
            raise ValueError(f"--weights names {name!r}, which is neither {', '.join(WEIGHTS)} nor a scorer asked for")
    metrics = tuple(name for name in named if name not in SCORERS)
    more = {"device": options.device, "repetitions": options.repetitions, "workers": options.workers}
    choice = Choice(metrics, places, options.protocol, **more)
    return choice, load_scorer_entries(entries, options.device)


def load_scorer_entries(entries: Sequence[dict[str, Any]], device: str) -> tuple[Scorer, ...]:
    """Scorers of such entries, loaded. Raises ValueError for unknown keys and missing weights."""
    import torch

    from fewstep.dmd.reward.scorers import load_scorers
    from fewstep.evaluation.scorers.settings import ScorerConfig

    known = {one.name for one in dataclasses.fields(ScorerConfig)}
    for entry in entries:
        unknown = sorted(entry.keys() - known)
        if unknown:
            raise ValueError(
                f"--scorer {entry['name']} has the key {unknown[0]!r}; known are {', '.join(sorted(known))}"
            )
    return load_scorers([ScorerConfig(**entry) for entry in entries], device=torch.device(device))


def scorer_entry(text: str) -> dict[str, Any]:
    """A scorer from NAME, NAME=WEIGHTS, or a YAML mapping with a name."""
    if text.lstrip().startswith("{"):
        import yaml

        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--scorer {text} is no YAML: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            raise ValueError(f"--scorer {text} has no name, such as {{name: hpsv2, weights: PATH}}")
        return found
    name, _, weights = text.partition("=")
    return {"name": name, "weights": weights} if weights else {"name": name}


def _pair(text: str, option: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise ValueError(f"{option} is NAME=PATH, got {text!r}")
    return name, value


def _save_statistics(judge: Judge, path: str) -> None:
    real = judge.reference.real.get("image")
    if real is None:
        raise ValueError("--save_statistics needs a reference with Inception features: give --metrics fid")
    real.statistics.save(path)


def this_process() -> dict[str, Any]:
    """This process among those of `accelerate launch`."""
    from accelerate import PartialState

    state = PartialState()
    return {"rank": state.process_index, "world_size": state.num_processes, "wait": state.wait_for_everyone}


def evaluate_image(about: str = "", *, classifier: str | None = None) -> None:
    """The command, as it is typed; ends the process."""
    options = image_parser(classifier, about).parse_args()
    sys.exit(run(options, sys.argv[1:]))
