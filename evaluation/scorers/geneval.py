"""GenEval (arXiv:2310.11513): whether a picture holds the objects, counts, colours and places that its prompt asks for.

`geneval_correct` is the benchmark's own verdict, 0 or 1. `geneval` is the score with partial credit that flow_grpo, NFT
and RTDMD train on. A prompt is looked up in the benchmark's list of tasks. Both run without mmdet: see `Detector`.

Not differentiable. Shapes: pixels [B, 3, H, W] in [0, 1], scores [B].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.evaluation.clip_score import ClipScorer, load_clip_scorer
from fewstep.evaluation.scorers.clip import preprocess_of
from fewstep.evaluation.scorers.geneval_detector import CLASSES, Detector, FoundObject, Objects, load_detector
from fewstep.evaluation.scorers.scorer import ScorerCard
from fewstep.evaluation.scorers.weights import require_files

TASKS_FILE, DETECTOR_FOLDER, CLIP_FOLDER = "tasks.jsonl", "detector", "clip"
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# Counting asks for surer objects.
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
# Of the sum of both sizes: how far two objects may be apart without being beside each other.
POSITION_SLACK = 0.1
GREY = 0x99 / 255


@dataclass(frozen=True)
class Wanted:
    """`count` objects of a class, in a `colour`, or placed by a relation to the objects of an earlier entry."""

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int | None = None


@dataclass(frozen=True)
class Task:
    """What a prompt asks for: objects to be there, and numbers of objects that must not be reached."""

    prompt: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()
    counting: bool = False

    @property
    def threshold(self) -> float:
        """How sure the detector must be of an object."""
        return COUNTING_THRESHOLD if self.counting else THRESHOLD


class GenEval:
    """The scorer of a list of tasks.

    Args:
        detector: finds objects.
        clip: names the colour of an object; GenEval's is OpenAI's ViT-L/14.
        tasks: by prompt.
        kind: "score" with partial credit, or "correct", 0 or 1.
        weights: where it was loaded from.
    """

    def __init__(
        self,
        detector: Detector,
        clip: ClipScorer,
        tasks: dict[str, Task],
        *,
        kind: Literal["score", "correct"] = "score",
        weights: str | None = None,
    ) -> None:
        self.detector, self.clip, self.tasks, self.kind = detector, clip, tasks, kind
        self.preprocess = preprocess_of(clip, fit="shortest")
        # 1 - |16 - 1| / 1 for sixteen objects in place of one.
        low, name = (-15.0, "geneval") if kind == "score" else (0.0, "geneval_correct")
        self.card = ScorerCard(name, low, 1.0, weights=weights)
        self._colour_texts: dict[str, Tensor] = {}

    def require_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt that is no task."""
        unknown = [prompt for prompt in prompts if prompt not in self.tasks]
        if unknown:
            raise ValueError(
                f"GenEval has no task for the prompt {unknown[0]!r}: data.prompts must be those of its tasks"
            )

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]. Raises ValueError for a prompt that is no task."""
        self.require_prompts(prompts)
        # It reads files of 8 bits.
        pixels = (pixels.float() * 255).round() / 255
        scores = [self.judge(picture, self.tasks[prompt]) for picture, prompt in zip(pixels, prompts, strict=True)]
        return torch.tensor(scores, device=pixels.device)

    def judge(self, picture: Tensor, task: Task) -> float:
        """The score of one picture [3, H, W]."""
        objects = self.detector(picture, task.threshold)

        def colours(found: list[FoundObject], name: str) -> list[str]:
            return [self.colour_of(picture, each, name) for each in found]

        return score_of(objects, task, colours) if self.kind == "score" else float(is_correct(objects, task, colours))

    def colour_of(self, picture: Tensor, found: FoundObject, name: str) -> str:
        """The colour whose texts are nearest to the object before grey."""
        left, top, right, bottom = (int(side) for side in found.box)
        alone = torch.where(found.mask, picture, torch.full_like(picture, GREY))[:, top:bottom, left:right]
        image = self.clip.model.encode_image(self.preprocess(alone[None]), normalize=True)
        return COLOURS[int((image @ self.colour_texts(name).T)[0].argmax())]

    def colour_texts(self, name: str) -> Tensor:
        """[10, D], of unit length: each colour of a class in three texts."""
        if name not in self._colour_texts:
            device, rows = next(self.clip.model.parameters()).device, []
            for colour in COLOURS:
                texts = [f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}"]
                tokens = self.clip.tokenizer([*texts, f"a photo of a {colour} object"]).to(device)
                rows.append(F.normalize(self.clip.model.encode_text(tokens, normalize=True).mean(dim=0), dim=0))
            self._colour_texts[name] = torch.stack(rows)
        return self._colour_texts[name]


def is_correct(objects: Objects, task: Task, colours: Any) -> bool:
    """The benchmark's verdict: everything wanted is there, and nothing reaches a number that is excluded.

    `colours` gives the colours of objects of a class. More objects than wanted do not hurt; the surest ones count.
    """
    correct, groups = True, []
    for wanted in task.include:
        found = list(objects.get(wanted.name, []))[: wanted.count]
        fits = len(found) == wanted.count
        if fits and wanted.colour is not None:
            fits = colours(found, wanted.name).count(wanted.colour) == wanted.count
        if fits and wanted.relation is not None:
            assert wanted.target is not None
            fits = stands(found, groups[wanted.target], wanted.relation)
        groups.append(found if fits else None)
        correct = correct and fits
    return correct and all(len(objects.get(each.name, [])) < each.count for each in task.exclude)


def score_of(objects: Objects, task: Task, colours: Any) -> float:
    """The mean over requirements, each 1 where it is met (flow_grpo, used by DiffusionNFT and RTDMD).

    A number n of objects in place of c gives 1 - |n - c| / c, a number of them in the colour likewise. As the released
    code has it, colour and place count 0 where the number is wrong, a wrong place adds a 0 to its 1, and a place whose
    target is missing is 0.
    """
    parts: list[float] = []
    groups: list[list[FoundObject] | None] = []
    for wanted in task.include:
        found = list(objects.get(wanted.name, []))
        parts.append(1 - abs(wanted.count - len(found)) / wanted.count)
        fits = len(found) == wanted.count
        if not fits and (wanted.colour is not None or wanted.relation is not None):
            parts.append(0.0)
        if fits and wanted.colour is not None:
            painted = colours(found, wanted.name).count(wanted.colour)
            parts.append(1 - abs(wanted.count - painted) / wanted.count)
            fits = painted == wanted.count
        if fits and wanted.relation is not None:
            assert wanted.target is not None
            targets = groups[wanted.target]
            fits = stands(found, targets, wanted.relation)
            parts += [1.0] if fits else [0.0] if targets is None else [0.0, 1.0]
        groups.append(found if fits else None)
    return sum(parts) / len(parts)


def stands(found: list[FoundObject], targets: list[FoundObject] | None, relation: str) -> bool:
    """Whether each object stands so to each target; never where the targets are not there."""
    if targets is None:
        return False
    return all(relation in relations_of(one, other) for one in found for other in targets)


def relations_of(one: FoundObject, other: FoundObject) -> set[str]:
    """How an object stands to another: their centres' offset, less a slack of a tenth of both sizes, in each direction.

    A direction counts where it is more than half of the offset's length.
    """
    offsets = []
    for low, high in ((0, 2), (1, 3)):
        offset = (one.box[low] + one.box[high] - other.box[low] - other.box[high]) / 2
        slack = POSITION_SLACK * (one.box[high] - one.box[low] + other.box[high] - other.box[low])
        offsets.append((offset, max(abs(offset) - slack, 0.0) * (1 if offset > 0 else -1)))
    length = (offsets[0][0] ** 2 + offsets[1][0] ** 2) ** 0.5
    if all(abs(beyond) < 1e-3 for _, beyond in offsets):
        return set()
    right, down = (beyond / length for _, beyond in offsets)
    met = (right < -0.5, right > 0.5, down < -0.5, down > 0.5)
    return {name for name, holds in zip(RELATIONS, met, strict=True) if holds}


def read_tasks(file: str | Path) -> dict[str, Task]:
    """The benchmark's list, one JSON object in a line: tag, prompt, include and exclude.

    Raises:
        ValueError: a line is no task, names an unknown class, colour or relation, or a prompt asks for two things.
    """
    tasks: dict[str, Task] = {}
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            include, exclude = (tuple(map(_wanted, values.get(key, []))) for key in ("include", "exclude"))
            # Prompts of a run are read without blanks around them, too.
            task = Task(values["prompt"].strip(), include, exclude, counting=values["tag"] == "counting")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"line {number} of {file} is no task of GenEval ({error!r}); take its own file") from error
        late = [each for place, each in enumerate(include) if each.target is not None and not 0 <= each.target < place]
        if not include or late:
            raise ValueError(f"line {number} of {file} asks for nothing, or places an object beside a later one")
        if tasks.setdefault(task.prompt, task) != task:
            raise ValueError(f"line {number} of {file}: the prompt {task.prompt!r} asks for two different things")
    if not tasks:
        raise ValueError(f"{file} holds no task; take GenEval's own file")
    return tasks


def _wanted(values: dict[str, Any]) -> Wanted:
    relation, target = values.get("position", (None, None))
    found = Wanted(values["class"], int(values["count"]), values.get("color"), relation, target)
    for value, known in ((found.name, CLASSES), (found.colour, COLOURS), (relation, RELATIONS)):
        if value is not None and value not in known:
            raise ValueError(f"{value!r} is not known")
    if found.count < 1:
        raise ValueError(f"count is {found.count}")
    return found


def load_geneval(folder: str | Path, *, kind: Literal["score", "correct"] = "score", device: str = "cpu") -> GenEval:
    """From a folder with `detector` (transformers), `clip` (open_clip) and `tasks.jsonl` (the benchmark's metadata).

    Raises:
        ValueError: a part is missing or another model.
    """
    place = Path(folder)
    require_files(place, (TASKS_FILE,), scorer="GenEval")
    tasks = read_tasks(place / TASKS_FILE)
    clip = load_clip_scorer(place / CLIP_FOLDER, device=device)
    detector = load_detector(place / DETECTOR_FOLDER, device=device)
    return GenEval(detector, clip, tasks, kind=kind, weights=str(folder))
