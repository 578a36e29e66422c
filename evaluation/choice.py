"""What a user asks of an evaluation, checked before anything slow: metrics by name, and where their weights are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fewstep.evaluation.judge import FEATURES, KINDS, Judge
from fewstep.evaluation.measures.embeddings import load_clip_vision, load_dinov2
from fewstep.evaluation.measures.features import Extractor
from fewstep.evaluation.measures.inception import PROTOCOLS, WEIGHTS_NAME, load_inception_features
from fewstep.evaluation.references import own_reference
from fewstep.evaluation.scorers.scorer import Scorer, require_prompts
from fewstep.evaluation.systems import OwnReference

# Names of --weights beside those of scorers, and what each is for.
WEIGHTS = {
    "inception": f"{WEIGHTS_NAME} of torch-fidelity (v0.2.0), or its tensors as .safetensors",
    "dinov2": "a folder of DINOv2 such as facebook/dinov2-large",
    "clip_vision": "a folder of CLIP such as openai/clip-vit-large-patch14-336",
}
WEIGHTS_OF = {"image": "inception", "dinov2": "dinov2", "clip_vision": "clip_vision"}


@dataclass(frozen=True)
class Choice:
    """Metrics by name, weights by their names in `WEIGHTS`, and how features and intervals are made.

    Raises ValueError for unknown names, and for a protocol that is none.
    """

    metrics: tuple[str, ...]
    weights: dict[str, str] = field(default_factory=dict)
    protocol: str = "clean"
    device: str = "cpu"
    repetitions: int = 200
    workers: int = 0

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if metric not in KINDS:
                raise ValueError(f"metric {metric!r} is unknown; known are {', '.join(KINDS)}, and names of scorers")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {self.protocol!r}; use one of {', '.join(PROTOCOLS)}")
        for name, place in self.weights.items():
            if name not in WEIGHTS:
                raise ValueError(f"--weights names {name!r}; known are {', '.join(WEIGHTS)}")
            if not Path(place).exists():
                raise ValueError(f"--weights {name}={place}: there is no such file or folder; it is {WEIGHTS[name]}")

    def feature_keys(self) -> tuple[str, ...]:
        """The features that the metrics compare."""
        return tuple(dict.fromkeys(FEATURES[metric] for metric in self.metrics if metric in FEATURES))


def load_extractors(choice: Choice, *, keys: Sequence[str] | None = None) -> dict[str, Extractor]:
    """The networks whose features the metrics need, on the device. Raises ValueError that names missing weights."""
    found: dict[str, Extractor] = {}
    for key in choice.feature_keys() if keys is None else keys:
        name = WEIGHTS_OF[key]
        place = choice.weights.get(name)
        if place is None:
            users = ", ".join(metric for metric in choice.metrics if FEATURES.get(metric) == key)
            raise ValueError(f"{users} of your own pictures needs --weights {name}=PATH: {WEIGHTS[name]}")
        if key == "image":
            found[key] = load_inception_features(place, protocol=choice.protocol, device=choice.device)
        elif key == "dinov2":
            found[key] = load_dinov2(place, device=choice.device)
        else:
            found[key] = load_clip_vision(place, device=choice.device)
    return found


def own_judge(own: OwnReference, choice: Choice, *, scorers: tuple[Scorer, ...] = ()) -> Judge:
    """A judge whose reference is the user's own prompts and pictures.

    Raises ValueError for missing weights, prompts or pictures, and for metrics that need what is not given.
    """
    compared = [metric for metric in choice.metrics if metric in FEATURES]
    if own.images is None and compared:
        raise ValueError(f"{', '.join(compared)} compares with real pictures; give --reference FOLDER or FILE.npz")
    if own.images is not None and not compared:
        raise ValueError(f"--reference {own.images} is given, and no metric compares with it; leave it out")
    reference = own_reference(own, extractors=load_extractors(choice), workers=choice.workers)
    require_prompts(scorers, reference.prompts)
    return Judge(reference, choice.metrics, scorers, choice.repetitions)
