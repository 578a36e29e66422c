"""What it takes to build and sample the student of a run again, whichever the method; a file in the run directory.

Methods say these things of themselves when a run begins (`RunSettings.save`), so that exports, later stages and studies
read them without knowing any method.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, TypeAlias

from fewstep.core.settings import ModelSource

SETTINGS_FILE = "student.json"
Sampler: TypeAlias = Literal["sde", "ode", "flow_map"]
SecondTime: TypeAlias = Literal["none", "gate", "sum", "decoupled"]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The student of a run.

    Attributes:
        method: name of the method, for people.
        teacher_path, teacher_variant, teacher_revision, teacher_subfolder, teacher_lora, teacher_lora_scale: of the
            pipeline that was distilled.
        teacher_pipeline: its class, where that is not what its files say.
        teacher_embedded_guidance: what its network is told; None is the stock pipeline's own.
        teacher_told_picture: whether its network is told a picture by choice.
        guidance: that is in the student's weights, or that it is told.
        student_path: of the pipeline whose network the student started from; None is the teacher's.
        negative_prompt: what the guidance led away from; None is the stock pipeline's own.
        steps: network calls of a sample.
        shift: of the grid of steps.
        times: of the calls in place of that grid, or None.
        timesteps: the same in the network's units, or None.
        sampler: as of `Student`.
        teacher_dtype: in which the teacher was kept, and with it the weights that adapters sat on.
        teacher_quantise: in how many bits the layers of its blocks were kept.
        lora_rank: rank of the adapters, 0 for none.
        lora_alpha: their scale.
        lora_targets: as of `StudentConfig`.
        height: in pixels; None is the teacher's own size.
        width: the same.
        frames: pixel frames of videos; None is the teacher's own number, and for pictures.
        second_time: how the network is told a second time.
        any_steps: whether the student is trained at all times, so that it samples in any number of steps.
        time_smoothing: standard deviation in time over which the sinusoids of its time were averaged.
        guidance_embedded: whether it has an embedding of the guidance and steps where SanaSprintPipeline can, at
            TrigFlow's angles.
    """

    method: str
    teacher_path: str
    guidance: float
    steps: int
    shift: float
    sampler: Sampler
    teacher_variant: str | None = None
    teacher_revision: str | None = None
    teacher_subfolder: str | None = None
    teacher_lora: str | None = None
    teacher_lora_scale: float = 1.0
    teacher_pipeline: str | None = None
    teacher_embedded_guidance: float | None = None
    teacher_told_picture: bool = False
    student_path: str | None = None
    negative_prompt: str | None = None
    times: tuple[float, ...] | None = None
    timesteps: tuple[float, ...] | None = None
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    teacher_quantise: Literal["none", "int8", "float8"] = "none"
    lora_rank: int = 0
    lora_alpha: float = 64.0
    lora_targets: tuple[str, ...] = ()
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    second_time: SecondTime = "none"
    any_steps: bool = False
    guidance_embedded: bool = False
    time_smoothing: float = 0.0

    @property
    def base(self) -> ModelSource:
        """Where the pipeline is that the student's network is of."""
        if self.student_path is None:
            return self.teacher
        return ModelSource(
            path=self.student_path,
            pipeline=self.teacher_pipeline,
            embedded_guidance=self.teacher_embedded_guidance,
            told_picture=self.teacher_told_picture,
        )

    @property
    def teacher(self) -> ModelSource:
        """Where the pipeline is that was distilled."""
        return ModelSource(
            path=self.teacher_path,
            variant=self.teacher_variant,
            revision=self.teacher_revision,
            subfolder=self.teacher_subfolder,
            lora=self.teacher_lora,
            lora_scale=self.teacher_lora_scale,
            pipeline=self.teacher_pipeline,
            embedded_guidance=self.teacher_embedded_guidance,
            told_picture=self.teacher_told_picture,
        )

    def save(self, run: str | Path) -> Path:
        """Write `student.json` into the run directory; gives its path."""
        path = Path(run) / SETTINGS_FILE
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path


def read_settings(run: str | Path) -> RunSettings:
    """The settings of a run directory. Raises ValueError naming the file or key that is missing."""
    file = Path(run) / SETTINGS_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give the directory of a training run of a student")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {field.name for field in fields(RunSettings)}
        # Older runs do not say what was not a choice then, and the defaults are what they did.
        if not set(content) <= names:
            raise ValueError(f"its keys {sorted(set(content) - names)} are unknown")
        lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
        return RunSettings(**content | lists)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} does not describe a student: {error}") from error
