"""What a reader needs beside the numbers: counts, sources, floors, intervals, and how speed was measured."""

from __future__ import annotations

from fewstep.evaluation.evaluate import Comparison
from fewstep.evaluation.judge import BY_STATISTICS
from fewstep.evaluation.measures.kernel import CMMD_WIDTH
from fewstep.evaluation.measures.neighbours import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS
from fewstep.evaluation.table import MARK

MEANINGS = {
    "kid": "KID: unbiased estimate from all images, so it may be negative.",
    "precision": f"Precision and recall: shares within the distance to the neighbour number {PRECISION_NEIGHBOURS}; "
    "their intervals hold the other set fixed.",
    "density": f"Density and coverage: neighbour number {DENSITY_NEIGHBOURS}; intervals hold the other set fixed.",
    "fid_inf": "FID-infinity: the value of a line through FID over 1 / N at infinitely many generated images.",
    "cmmd": f"CMMD: 1000 times the squared kernel distance of CLIP embeddings, width {CMMD_WIDTH:g}.",
    "accuracy": "Accuracy: share of images that the classifier takes for what the prompt asks for. Diversity: mean "
    "feature distance of two images of one class; that of real images is neither a floor nor a goal to pass.",
}


def table_notes(comparison: Comparison) -> tuple[str, ...]:
    """All notes of a comparison, those that depend on nothing last."""
    rows = comparison.rows
    first = rows[0].results[0]
    keys = [kind.key for kind in comparison.kinds]
    notes = list(comparison.notes)
    compared = [one for one in first.figures.values() if one.references is not None]
    sources = list(dict.fromkeys(one.source for one in first.figures.values() if one.references is not None))
    if compared:
        notes.append(
            f"{first.samples} generated images per seed against {compared[0].references} real images of "
            f"{comparison.reference}; features: {'; '.join(sources)}."
        )
    elif any(key in first.figures for key in BY_STATISTICS):
        notes.append(f"{first.samples} generated images per seed against the statistics {comparison.reference}.")
    notes += _floor_note(comparison)
    notes += [MEANINGS[key] for key in keys if key in MEANINGS]
    if any("kid" in row.results[0].figures for row in rows) and "accuracy" in keys:
        notes.append("KID weighs pairs of one class as independent draws would have them, since classes are balanced.")
    notes += _interval_notes(comparison)
    latency = next((row.latency for row in rows if row.latency is not None), None)
    if latency is not None:
        notes.append(
            f"Speed: plain pipeline calls, batch {latency.batch_size}, {latency.threads} CPU threads, "
            f"{latency.device}; median of {latency.repeats} turns taken in alternation; speed-up against "
            f"{rows[comparison.baseline].label()}."
        )
    warned = dict.fromkeys(text for row in rows for one in row.results[0].figures.values() for text in one.warnings)
    notes += [f"{MARK} {text}." for text in warned]
    return tuple(notes)


def _floor_note(comparison: Comparison) -> list[str]:
    first = comparison.rows[0].results[0].figures.get(comparison.kinds[0].key)
    if first is None or first.floor is None:
        return []
    if comparison.floor_of_halves:
        return [
            "Real images: the two halves of the folder against each other. Half as many images make the figure higher "
            "than that of the whole folder, so a good generator may score below it."
        ]
    return [
        "Real images: as many of the other split (or all of it) in the place of the generated ones. The finite sample "
        "alone gives this much."
    ]


def _interval_notes(comparison: Comparison) -> list[str]:
    notes = []
    several = any(len(row.results) > 1 for row in comparison.rows)
    if any(found for found in comparison.differences):
        base = comparison.rows[comparison.baseline].label()
        text = (
            "Intervals: 95 %, of distances by how much each image and real image moves them, of other figures by "
            "drawing images (or prompts) and real images again; they are for the expected figure at these counts. "
            f"Differences to {base} are taken in pairs"
        )
        training = ", and those of several training runs add the spread of training" if several else ""
        notes.append(f"{text}{training}; nothing is called better whose interval holds 0.")
    if several:
        notes.append("Several runs or seeds: median [smallest, largest].")
    return notes
