"""Judge one or several exported pipelines and write a report: report.html, report.md and report.json."""

import argparse
import sys


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--pipeline", action="append", required=True, metavar="[NAME=]DIR", help="diffusers folder; repeat to compare")
    add("--steps", type=int, nargs="+", help="one for all pipelines or one each; None: distillation.json")
    add("--guidance", type=float, nargs="+", help="one for all pipelines or one each; None: distillation.json")
    add("--samples", type=int, default=500, help="images per seed")
    add("--seed", type=int, nargs="+", default=[0], help="several give medians and ranges")
    add("--reference", default="test", choices=["test", "train"], help="split of the real images")
    add("--prompts", help="your own prompts, one a line; needs --reference_images and --inception")
    add("--reference_images", dest="images", metavar="DIR", help="your own real pictures, for FID and KID")
    add("--output", required=True, help="folder of the report")
    add("--run", action="append", default=[], help="run directory whose metrics are plotted; repeat for several")
    add("--classifier", default="assets/digits_image/classifier", help="folder of the digits classifier")
    add("--inception", help="local Inception weights; FID and KID then use their features")
    add("--clip", help="local open_clip folder or .safetensors file; adds the CLIP score")
    add("--clip_model", help="architecture of a CLIP .safetensors file, such as ViT-B-32")
    add("--batch_size", type=int, default=64, help="images per call; samples do not depend on it")
    add("--device", default="cpu", help="cpu or cuda")
    add("--timing_repeats", type=int, default=5, help="timed calls per system; 0 leaves speed out")
    add("--timing_batch", type=int, default=1, help="images per timed call")
    add("--threads", type=int, help="CPU threads of the timed calls; None: as many as torch uses")
    return parser.parse_args()


def main() -> None:
    options = parse()
    weights = {name: getattr(options, name) for name in ("classifier", "inception", "clip", "clip_model")}
    sampling = {"samples": options.samples, "seeds": options.seed, "batch_size": options.batch_size}
    try:
        from fewstep.evaluation import curves, systems

        systems.require_samples(options.samples)
        chosen = systems.parse_systems(options.pipeline, steps=options.steps, guidance=options.guidance)
        real = systems.pick_reference(options.reference, chosen, prompts=options.prompts, images=options.images)
        metrics = [curve for run in options.run for curve in curves.read_curves(run)]
        from fewstep.embedded.digits.reference import judge_of
        from fewstep.evaluation import evaluate, latency, provenance, record, report, table

        plan = {"batch_size": options.timing_batch, "threads": options.threads}
        timing = latency.TimingPlan(options.timing_repeats, **plan) if options.timing_repeats else None
        judge = judge_of(real, **weights)
        found = evaluate.compare(chosen, judge=judge, timing=timing, device=options.device, **sampling)
    except ValueError as error:
        sys.exit(f"error: {error}")
    made = provenance.collect_provenance("scripts/evaluate_pipeline.py", arguments=sys.argv[1:], device=options.device)
    page = report.write_report(options.output, found, provenance=made, curves=metrics).html
    record.record_figures(found)
    print(table.results_table(found).text(), f"report: {page}", sep="\n\n")


if __name__ == "__main__":
    main()
