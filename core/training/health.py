"""Run health in words: what drifts in a distillation run, and what to do about it.

Pure: numbers in, sentences out. A statistic that a run does not measure is None and never raises a message.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthStatistics:
    """Measurements of one logged step. Means and deviations are over all elements of a batch of x0 (latents)."""

    student_mean: float | None = None
    """Mean of student samples."""
    student_std: float | None = None
    """Standard deviation of student samples."""
    reference_mean: float | None = None
    """Mean of the teacher's samples, or of data."""
    reference_std: float | None = None
    """Standard deviation of the teacher's samples, or of data."""
    fake_score_loss: float | None = None
    """Velocity error of the fake score on student samples, per element."""
    fake_score_floor: float | None = None
    """The error it cannot go below: that of the teacher on its own samples, per element."""
    direction_rms: float | None = None
    """Root mean square of the fake minus the real x0, before normalisation."""
    student_grad_norm: float | None = None
    """Norm of the student's gradient before clipping."""
    student_grad_over_eps: float | None = None
    """Root mean square of that gradient over the optimizer's eps, which Adam adds to it."""
    fake_grad_norm: float | None = None
    """Norm of the fake score's gradient before clipping."""
    diversity: float | None = None
    """Mean distance between student samples of one prompt and different seeds, in any fixed unit."""
    brightness: float | None = None
    """Mean of the student's pixels, in [0, 1]."""
    reference_brightness: float | None = None
    """Mean of the teacher's pixels, in [0, 1]."""
    saturation: float | None = None
    """Mean over pixels of largest minus smallest channel, in [0, 1]."""
    reference_saturation: float | None = None
    """The same of the teacher."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthThresholds:
    """When a statistic counts as unhealthy. All are compared with medians over a window, except the gradient norms."""

    window: int = 20
    """Records per median; a message is repeated after this many records at the earliest."""
    mean_shift: float = 0.25
    """Largest |student mean - reference mean| in reference deviations."""
    std_low: float = 0.75
    """Smallest student deviation over the reference's."""
    std_high: float = 1.33
    """Largest student deviation over the reference's."""
    fake_score_excess: float = 1.5
    """Largest fake score loss over its floor."""
    direction_growth: float = 3.0
    """Largest direction RMS over that of the first window."""
    grad_norm_spike: float = 20.0
    """Largest gradient norm over the median of the window before it."""
    grad_over_eps: float = 100.0
    """Smallest gradient over the optimizer's eps."""
    diversity_fall: float = 0.6
    """Smallest diversity over that of the first window."""
    brightness_shift: float = 0.08
    """Largest |brightness - reference|, in pixel units of [0, 1]."""
    saturation_shift: float = 0.08
    """Largest |saturation - reference|, in pixel units of [0, 1]."""


@dataclasses.dataclass(frozen=True)
class HealthMessage:
    """One finding. `name` is its stable identifier, `text` says what is seen and what to do."""

    name: str
    text: str


class HealthMonitor:
    """Collects the statistics of logged steps and tells what is wrong, each message at most once per window.

    Raises:
        ValueError: thresholds whose window is below 2.
    """

    def __init__(self, thresholds: HealthThresholds | None = None) -> None:
        self.thresholds = HealthThresholds() if thresholds is None else thresholds
        if self.thresholds.window < 2:
            raise ValueError(f"window: given {self.thresholds.window}, allowed is an integer >= 2")
        self._records = 0
        self._recent: dict[str, deque[float]] = {}
        self._baseline: dict[str, float] = {}
        self._told: dict[str, int] = {}

    def update(self, statistics: HealthStatistics) -> list[HealthMessage]:
        """Take in one record; returns the messages that are due."""
        values = {name: value for name, value in dataclasses.asdict(statistics).items() if value is not None}
        broken = sorted(name for name, value in values.items() if not math.isfinite(value))
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        # A spike is judged against the records before it.
        found = [*self._not_finite(broken), *self._spikes(finite)]
        for name, value in finite.items():
            recent = self._recent.setdefault(name, deque(maxlen=self.thresholds.window))
            recent.append(value)
            if len(recent) == self.thresholds.window and name not in self._baseline:
                self._baseline[name] = median(recent)
        found += [*self._statistics_drift(), *self._training_drift(), *self._picture_drift()]
        self._records += 1
        return [message for message in found if self._is_due(message.name)]

    def state(self) -> dict[str, object]:
        """JSON data from which `load_state` goes on exactly."""
        return {
            "records": self._records,
            "recent": {name: list(values) for name, values in self._recent.items()},
            "baseline": dict(self._baseline),
            "told": dict(self._told),
        }

    def load_state(self, state: Mapping) -> None:
        self._records = state["records"]
        window = self.thresholds.window
        self._recent = {name: deque(values, maxlen=window) for name, values in state["recent"].items()}
        self._baseline = dict(state["baseline"])
        self._told = dict(state["told"])

    def _is_due(self, name: str) -> bool:
        last = self._told.get(name)
        if last is not None and self._records - last < self.thresholds.window:
            return False
        self._told[name] = self._records
        return True

    def _median(self, name: str) -> float | None:
        """Median of a full window, or None before there is one."""
        recent = self._recent.get(name, ())
        return median(recent) if len(recent) == self.thresholds.window else None

    def _pair(self, name: str, other: str) -> tuple[float, float] | None:
        left, right = self._median(name), self._median(other)
        return None if left is None or right is None else (left, right)

    def _not_finite(self, names: Sequence[str]) -> list[HealthMessage]:
        if not names:
            return []
        text = (
            f"{', '.join(names)} not finite: stop, resume from the last checkpoint, and lower the learning rate "
            "or use bf16 instead of fp16"
        )
        return [HealthMessage("not_finite", text)]

    def _spikes(self, values: Mapping[str, float]) -> list[HealthMessage]:
        messages = []
        for name, role in (("student_grad_norm", "student"), ("fake_grad_norm", "fake score")):
            usual = self._median(name)
            if usual is None or name not in values or values[name] <= self.thresholds.grad_norm_spike * usual:
                continue
            text = (
                f"gradient of the {role} jumped to {values[name]:.3g}, usually {usual:.3g}: one batch may be an "
                "outlier; if this repeats, lower its learning rate or its clip"
            )
            messages.append(HealthMessage(f"{name}_spike", text))
        return messages

    def _statistics_drift(self) -> list[HealthMessage]:
        limits, messages = self.thresholds, []
        deviations = self._pair("student_std", "reference_std")
        if deviations is not None and deviations[1] > 0:
            student, reference = deviations
            ratio = student / reference
            seen = f"standard deviation of student samples is {student:.3g}, the teacher's {reference:.3g}"
            if ratio < limits.std_low:
                text = f"{seen}: samples flatten or collapse; update the fake score more often, or lower guidance"
                messages.append(HealthMessage("student_std_low", text))
            elif ratio > limits.std_high:
                text = f"{seen}: contrast grows; lower guidance or the student's learning rate"
                messages.append(HealthMessage("student_std_high", text))
        means = self._pair("student_mean", "reference_mean")
        if means is not None and deviations is not None and deviations[1] > 0:
            shift = abs(means[0] - means[1]) / deviations[1]
            if shift > limits.mean_shift:
                text = (
                    f"mean of student samples is {means[0]:.3g}, the teacher's {means[1]:.3g} "
                    f"({shift:.2g} deviations apart): the student drifts; update the fake score more often "
                    "and check that both use the same latent scaling"
                )
                messages.append(HealthMessage("student_mean", text))
        return messages

    def _training_drift(self) -> list[HealthMessage]:
        limits, messages = self.thresholds, []
        losses = self._pair("fake_score_loss", "fake_score_floor")
        if losses is not None and losses[1] > 0 and losses[0] > limits.fake_score_excess * losses[1]:
            text = (
                f"loss of the fake score is {losses[0]:.3g}, {losses[0] / losses[1]:.2g} times its floor "
                f"{losses[1]:.3g}: it lags behind the student; raise its updates per student update "
                "or its learning rate"
            )
            messages.append(HealthMessage("fake_score_lags", text))
        share = self._median("student_grad_over_eps")
        if share is not None and share < limits.grad_over_eps:
            text = (
                f"gradients of the student are {share:.3g} times the optimizer's eps in the root mean square: an "
                "update is divided by their sum, and so is smaller than the learning rate says; lower "
                "student.optimizer.eps"
            )
            messages.append(HealthMessage("grad_below_eps", text))
        direction, first = self._median("direction_rms"), self._baseline.get("direction_rms")
        if direction is not None and first is not None and direction > limits.direction_growth * first:
            text = (
                f"fake and real x0 differ by {direction:.3g} RMS, {first:.3g} at the start: the student moves away "
                "from the teacher; lower its learning rate or resume from an earlier checkpoint"
            )
            messages.append(HealthMessage("direction_grows", text))
        diversity, first = self._median("diversity"), self._baseline.get("diversity")
        if diversity is not None and first is not None and diversity < limits.diversity_fall * first:
            text = (
                f"diversity between seeds fell to {diversity:.3g} from {first:.3g}: modes are lost; lower guidance, "
                "update the fake score more often, or take an earlier checkpoint"
            )
            messages.append(HealthMessage("diversity_falls", text))
        return messages

    def _picture_drift(self) -> list[HealthMessage]:
        limits, messages = self.thresholds, []
        for name, limit in (("brightness", limits.brightness_shift), ("saturation", limits.saturation_shift)):
            pair = self._pair(name, f"reference_{name}")
            if pair is None or abs(pair[0] - pair[1]) <= limit:
                continue
            direction = "above" if pair[0] > pair[1] else "below"
            cause = "the fake score lags; update it more often" if direction == "below" else "lower guidance"
            text = (
                f"{name} of student samples is {pair[0]:.3g}, {direction} the teacher's {pair[1]:.3g}: {cause}, "
                "and lower the student's learning rate if it swings from grid to grid"
            )
            messages.append(HealthMessage(name, text))
        return messages
