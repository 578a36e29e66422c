"""What the export of a causal video student says about itself: `distillation.json` and README.md."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from fewstep.causal_video.settings import FILE_NAME, CausalSettings, StreamDefaults
from fewstep.core.export.model_card import CARD_FILE
from fewstep.core.export.record import RECORD_FILE, Figure, Verification


@dataclass(frozen=True)
class CausalRecord:
    """The content of `distillation.json`.

    Attributes:
        name: title of the model card.
        method: the stage of the last training.
        base_model: the bidirectional teacher, as it may be published.
        settings: layout, policy and schedule; the schedule may be another one than that of the training.
        trained_times: times of each chunk in the training.
        defaults: size, rate and actions.
        training_guidance: scale of the teacher's guidance.
        training_step: of the weights.
        ema: whether they are the moving average.
        dtype: of the files.
        verification: chunks of the loaded export against the training's rollout.
        stock_difference: the transformer as stock diffusers loads and calls it, against the student when every frame
            sees every frame, or, of two times, on clean context with all of the past; of the largest number.
        versions: (library, version).
        figures: measured numbers.
    """

    name: str
    method: str
    base_model: str
    settings: CausalSettings
    trained_times: tuple[tuple[float, ...], ...]
    defaults: StreamDefaults
    training_guidance: float
    training_step: int
    ema: bool
    dtype: str
    verification: Verification
    stock_difference: float
    versions: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...] = ()


def write_causal_record(record: CausalRecord, directory: Path) -> None:
    """Write `distillation.json`."""
    content = asdict(record) | {"versions": dict(record.versions)}
    (directory / RECORD_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_causal_card(record: CausalRecord, directory: Path, *, license_fields: dict[str, str]) -> None:
    """Write README.md into `directory`."""
    (directory / CARD_FILE).write_text(causal_card(record, license_fields=license_fields), encoding="utf-8")


def causal_card(record: CausalRecord, *, license_fields: dict[str, str]) -> str:
    """Markdown with YAML front matter as the Hugging Face hub reads it."""
    front: dict[str, Any] = {
        "library_name": "diffusers",
        "base_model": record.base_model,
        "tags": ["diffusers", "text-to-video", "streaming", "few-step", "distillation", record.method],
    }
    front.update(license_fields)
    weights = "moving average of the weights" if record.ema else "live weights"
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {record.name}\n",
        f"A causal video student of {record.base_model}: it makes a video chunk by chunk, each in a few network calls, "
        f"for as long as is wanted (last stage: {record.method}, teacher guidance {record.training_guidance:g}, step "
        f"{record.training_step}, {weights}).\n",
        f"## Use\n\n```python\n{streaming_snippet(record, record.name)}```\n",
        stock_text(record),
        f"## Chunks\n\n{chunk_table(record)}",
        f"## Figures\n\n{figure_table(record)}",
        f"## Check of the files\n\n{verification_text(record)}",
    ]
    return "\n".join(sections)


def stock_text(record: CausalRecord) -> str:
    """What stock diffusers makes of the directory."""
    if record.settings.second_time == "none":
        return (
            f"Stock diffusers opens the same directory as a WanPipeline. `{FILE_NAME}`, which it does not read, holds "
            "what makes the transformer causal; without it the network is a bidirectional one that was trained for "
            "something else.\n"
        )
    return (
        "The student is a flow map: it is told where a step ends, and can take any number of them. Stock diffusers "
        "opens the same directory as an AnyFlowFARPipeline, which makes the listed chunks with all of the past in view "
        f"and the same steps for each (`num_inference_steps`); `{FILE_NAME}`, which it does not read, holds the window "
        "and the steps of each chunk. It fills chunks up to a multiple of 128 tokens with zeros that its attention "
        "sees: videos of other sizes differ there.\n"
    )


def streaming_snippet(record: CausalRecord, directory: str) -> str:
    """Python that streams from the export in `directory`."""
    dtype = "" if record.dtype == "float32" else f", dtype=torch.{record.dtype}"
    lines = ["import torch", ""] if dtype else []
    lines += [
        "from fewstep.causal_video.stream.pipeline import CausalVideoPipeline",
        "",
        f'pipe = CausalVideoPipeline.from_pretrained("{directory}"{dtype})',
    ]
    if record.defaults.actions:
        lines += [
            'session = pipe.open("a prompt")',
            f'frames = session.step(action="{record.defaults.actions[0]}").images()  # uint8 [T, H, W, 3]',
        ]
    else:
        lines += [
            'for chunk in pipe.stream("a prompt", chunks=20):',
            "    frames = chunk.images()  # uint8 [T, H, W, 3], as soon as they are made",
        ]
    return "\n".join(lines) + "\n"


def chunk_table(record: CausalRecord) -> str:
    """Latent frames, pixel frames and times of each chunk, and what it sees."""
    settings, policy = record.settings, record.settings.policy
    rows = ["| chunk | latent frames | pixel frames | times t |", "|---|---|---|---|"]
    for chunk in range(max(settings.layout.chunks, len(settings.schedule.times))):
        times = ", ".join(f"{t:.6g}" for t in settings.schedule.of(chunk))
        rows.append(f"| {chunk} | {settings.layout.length(chunk)} | {settings.layout.pixel_frames(chunk)} | {times} |")
    window = "all of the past" if policy.window_frames is None else f"the latest {policy.window_frames} latent frames"
    sink = "" if policy.sink == "none" else f" and a sink of the first {policy.sink_frames} ({policy.sink})"
    noisy = "" if policy.noisy_from is None else f", noisy from chunk {policy.noisy_from} on"
    rows += ["", f"Later chunks repeat the last row. A chunk sees {window}{sink}; context is clean{noisy}."]
    if record.trained_times != settings.schedule.times:
        trained = "; ".join(", ".join(f"{t:.6g}" for t in times) for times in record.trained_times)
        rows.append(f"It was trained at other times: {trained}.")
    return "\n".join(rows) + "\n"


def figure_table(record: CausalRecord) -> str:
    """The measured figures."""
    if not record.figures:
        return "None were measured for this export.\n"
    rows = ["| figure | value | setting |", "|---|---|---|"]
    rows += [f"| {figure.name} | {figure.value:.5g} | {figure.setting} |" for figure in record.figures]
    return "\n".join(rows) + "\n"


def verification_text(record: CausalRecord) -> str:
    """What was compared, and how near it was."""
    check = record.verification
    versions = ", ".join(f"{library} {version}" for library, version in record.versions)
    return (
        "After writing, the files were loaded again and streamed beside the rollout of the training, from the same "
        f"noise: largest difference {check.sampler_difference:.1e} of the largest latent (allowed "
        f"{check.sampler_tolerance:.0e}). Storing the weights as {record.dtype} moves the latents by "
        f"{check.rounding_difference:.1e} (allowed {check.rounding_tolerance:.0e}). The stock transformer differs by "
        f"{record.stock_difference:.1e} from the student that sees what it does. Written with {versions}.\n"
    )
