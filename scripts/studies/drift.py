"""Long streams of a causal student of the embedded videos: what its frames are after many times the training length.

    python scripts/studies/drift.py --run RUN --output assets/benchmarks/digits_drift

The same prompts and noise under several policies and remedies, side by side. Frames are judged as they come (none is
kept): the share whose digit is the prompt's, and the Frechet distance of frame features to real frames, for equal
parts of the stream; with the memory of the process and of the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from studies.causal import JUDGES, StudyStudent, load_student, real_reference, study_prompts, teacher_shape
from torch import Tensor

from fewstep.causal_video.denoise import ChunkNoise
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stream.session import StreamSession
from fewstep.causal_video.stream.state import state_bytes
from fewstep.embedded.digits.images import label_of_prompt
from fewstep.embedded.moving_digits.judges import VideoJudges, load_judges
from fewstep.embedded.moving_digits.measures import VideoReference
from fewstep.evaluation.measures.statistics import feature_distance
from fewstep.evaluation.provenance import collect_provenance

STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Remedy:
    """A policy, and after how many chunks stored keys and values are computed again; 0 is never."""

    policy: CachePolicy
    recache_every: int = 0


def remedies(policy: CachePolicy, less: int = 0) -> dict[str, Remedy]:
    """A window of as many frames as the student was trained to see, or so many less; sinks in place of one of them; a
    wider window; computed again. With none less one of the first two is as trained."""
    assert policy.window_frames is not None
    window = policy.window_frames + policy.sink_frames - less
    plain = replace(policy, sink="none", sink_frames=0, window_frames=window)
    narrow = {"window_frames": window - 1, "sink_frames": 1}
    return {
        "window": Remedy(plain),
        "static sink": Remedy(replace(plain, sink="static", **narrow)),
        "EMA sink": Remedy(replace(plain, sink="ema", **narrow)),
        "window of 7": Remedy(replace(plain, window_frames=7)),
        "recache every 4": Remedy(plain, 4),
    }


def resident_bytes() -> int | None:
    """Memory of this process, where the system tells."""
    if not STATM.is_file():
        return None
    return int(STATM.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def follow(
    student: StudyStudent, remedy: Remedy, prompts: list[str], *, chunks: int, judge: Callable[[Tensor], Any]
) -> list[dict[str, Any]]:
    """Stream, and give every chunk's frames [N, 3, T, H, W] to the judge; memory at each tenth."""
    schedule = StepSchedule.steps((4, 2), shift=student.config.student.shift)
    settings = CausalSettings(student.settings.layout, remedy.policy, schedule)
    channels, _, height, width = teacher_shape(student.teacher)
    text = student.teacher.encode(prompts).text
    assert isinstance(text, Tensor)
    noise = ChunkNoise(0, tuple(range(len(prompts))), (channels, height, width), stream="drift")
    vae = student.teacher.pipeline.components["vae"]
    session, memory = StreamSession(student.network, text, noise, settings, vae=vae), []
    for number in range(chunks):
        if remedy.recache_every and number and number % remedy.recache_every == 0:
            session.set_prompt(text, "recache")
        output = session.step()
        assert output.frames is not None
        judge(output.frames)
        if (number + 1) % max(1, chunks // 10) == 0:
            state = state_bytes([session.snapshot()])
            memory.append({"chunk": number + 1, "resident_bytes": resident_bytes(), "state_bytes": state})
    return memory


class PartsJudge:
    """Judges frames as they come, in so many parts of the stream."""

    def __init__(self, judges: VideoJudges, reference: VideoReference, prompts: list[str], frames: int, parts: int):
        self.judges, self.reference, self.per_part = judges, reference, -(-frames // parts)
        self.digits = torch.tensor([label_of_prompt(prompt) for prompt in prompts])
        self.seen, self.right, self.features, self.rows = 0, [], [], []

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> None:
        """Take the next frames [N, 3, T, H, W]."""
        for frame in frames.unbind(2):
            features = self.judges.frame.features(frame)
            self.right.append((self.judges.frame.head(features).argmax(dim=1) == self.digits).double().mean().item())
            self.features.append(features.double())
            self.seen += 1
            if self.seen % self.per_part == 0:
                self.close()

    def close(self) -> list[dict[str, float]]:
        """End the part that is open; all parts."""
        if self.right:
            distance = feature_distance(torch.cat(self.features), self.reference.frame_features)
            accuracy = sum(self.right) / len(self.right)
            self.rows.append({"frame": self.seen, "accuracy": accuracy, "distance": distance})
            self.right, self.features = [], []
        return self.rows


def main() -> None:
    """Write the record and the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run directory of a causal student")
    parser.add_argument("--chunks", type=int, default=2000, help="of each stream")
    parser.add_argument("--videos", type=int, default=8, help="streams at once, of different prompts")
    parser.add_argument("--frames_less", type=int, default=0, help="than the student was trained to see")
    parser.add_argument("--parts", type=int, default=20, help="in which frames are judged")
    parser.add_argument("--output", required=True, help="folder of the records")
    options = parser.parse_args()
    torch.set_num_threads(1)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    student, judges = load_student(Path(options.run)), load_judges(JUDGES)
    reference, prompts = real_reference(judges, "test", 500), study_prompts(options.videos)
    rows = []
    for name, remedy in remedies(student.settings.policy, options.frames_less).items():
        judge = PartsJudge(judges, reference, prompts, 4 * options.chunks - 3, options.parts)
        memory = follow(student, remedy, prompts, chunks=options.chunks, judge=judge)
        policy = asdict(remedy.policy)
        rows.append({"name": name, "policy": policy, "parts": judge.close(), "memory": memory})
        print(name, rows[-1]["parts"][0], rows[-1]["parts"][-1], memory[0], memory[-1], flush=True)
    record = {
        "provenance": asdict(collect_provenance(sys.argv[0], arguments=sys.argv[1:])),
        "method": student.config.method,
        "training_frames": student.settings.layout.frames,
        "rows": rows,
    }
    (output / "drift.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(rows, output / "drift.png")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy and distance over the stream, a line a remedy."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for row in rows:
        for panel, key in zip(panels, ("accuracy", "distance"), strict=True):
            panel.plot(
                [part["frame"] for part in row["parts"]], [part[key] for part in row["parts"]], label=row["name"]
            )
    for panel, title in zip(panels, ("frames whose digit is the prompt's", "distance to real frames"), strict=True):
        panel.set(title=title, xlabel="frame of the stream")
        panel.grid(visible=True, alpha=0.3)
    panels[1].set_yscale("log")
    panels[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
