"""The frame of a training run, the same for every method: dry run, resume, notes, samples, checkpoints, a clean stop.

    with open_run(config) as run:
        config, trainer = run.config, run.trainer
        setup = build_setup(config, data, trainer)
        for _ in run.steps(Watch(setup, trainer), partial(describe_run, config, setup, trainer)):
            run.finish_step(train_step(config, setup, trainer))
    return run.exit_code

The loop stays in the method's own file, in sight; what stands around it is here once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from fewstep.core.config import RunConfig
from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trainer import Trainer


class Configured(Protocol):
    """Settings of a run of any method: a frozen dataclass with the section `run`."""

    @property
    def run(self) -> RunConfig: ...


C = TypeVar("C", bound=Configured)


class RunWatch(Protocol):
    """What looks at a run while it goes on. Its state goes into every checkpoint."""

    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: Mapping[str, Any]) -> None: ...
    def begin(self) -> None:
        """Before the first step of a new run."""
        ...

    def measure(self) -> Mapping[str, float]:
        """After a step was counted: more metrics for its record, none where nothing is due."""
        ...

    def look_at(self, means: Mapping[str, float] | None) -> None:
        """After the record of a step: means since the last one where one is due, else None."""
        ...

    def save_samples(self) -> None: ...


class Unwatched:
    """Sees nothing, for runs without samples."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        del state

    def begin(self) -> None: ...

    def measure(self) -> Mapping[str, float]:
        return {}

    def look_at(self, means: Mapping[str, float] | None) -> None:
        del means

    def save_samples(self) -> None: ...


class Run(Generic[C]):
    """An open run. `exit_code` is 0, or 128 + signal once `steps` was stopped by one."""

    def __init__(self, config: C, trainer: Trainer, directory: RunDirectory, *, dry: bool, stack: ExitStack) -> None:
        self.config, self.trainer, self.directory = config, trainer, directory
        self.exit_code = 0
        self._dry, self._stack = dry, stack
        self._watch: RunWatch = Unwatched()
        self._step_finished = False

    def on_close(self, close: Callable[[], object]) -> None:
        """Call this when the run ends, however it ends."""
        self._stack.callback(close)

    def steps(
        self, watch: RunWatch, *notes: Callable[[], str | None], beside: Callable[[Path], object] | None = None
    ) -> Iterator[int]:
        """The numbers of the steps that are to be made; each ends with one call of `finish_step`.

        A run that resumes goes on exactly. Notes are made of the weights that the run begins with; None is no note.
        `beside` writes into the run directory beside the settings. A dry run makes one step and keeps nothing.

        Raises:
            RuntimeError: a step was not finished, or finished twice.
            ValueError: the checkpoint does not fit, as `Trainer.resume`.
        """
        trainer, self._watch = self.trainer, watch
        if self.directory.resume_path is not None:
            watch.load_state(trainer.resume(self.directory.resume_path))
        for make in notes:
            text = make()
            if text is not None:
                trainer.note(text)
        if self._dry:
            yield trainer.step
            trainer.note("dry run: one step was made, nothing is kept")
            return
        if trainer.is_main:
            # Without the resume of this start: the file is to begin the run again.
            self.directory.write_config(replace(self.config, run=replace(self.config.run, resume=None)))  # pyright: ignore
            if beside is not None:
                beside(self.directory.path)
        # The start is looked at before any step, so that a wrong teacher or prompt is seen at once.
        if trainer.step == 0:
            watch.begin()
            self._show_samples()
        while not trainer.should_stop():
            self._step_finished = False
            yield trainer.step
            if not self._step_finished:
                raise RuntimeError(f"step {trainer.step} was not finished; call finish_step once in each step")
            if trainer.sample_due:
                watch.save_samples()
                self._show_samples()
            if trainer.checkpoint_due:
                trainer.save(watch.state())
        self.exit_code = trainer.finish(watch.state())

    def _show_samples(self) -> None:
        if self.trainer.is_main:
            self.directory.show_samples(self.trainer.step)

    def finish_step(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Count the step and record its metrics."""
        if self._dry:
            return
        if self._step_finished:
            raise RuntimeError(f"step {self.trainer.step - 1} was finished already; call finish_step once in each step")
        self._step_finished = True
        self.trainer.advance()
        # After the count, for a measurement belongs to the weights of the step that it is logged with.
        more = self._watch.measure()
        self._watch.look_at(self.trainer.log({**metrics, **more}))

    def save_unfinished(self) -> Path | None:
        """Save the start of a step that failed before anything had changed; gives the checkpoint to go on from.

        None where nothing was ever saved, which a dry run never does.
        """
        trainer = self.trainer
        if self._dry:
            return None
        path, saved = self.directory.path / f"checkpoint-{trainer.step}", trainer.last_checkpoint
        if saved is None or saved.resolve() != path.resolve():
            trainer.save(self._watch.state())
        return trainer.last_checkpoint


@contextmanager
def open_run(config: C) -> Iterator[Run[C]]:
    """A run with its directory and trainer, closed at the end; a dry run is given a folder that goes with it.

    Raises:
        ValueError: the run directory or the checkpoint to resume from does not fit.
    """
    with ExitStack() as stack:
        dry = config.run.dry_run
        if dry:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            # A protocol cannot say that these are dataclasses.
            config = replace(config, run=replace(config.run, directory=folder, resume=None))  # pyright: ignore[reportArgumentType]
        run = config.run
        directory = RunDirectory(Path(run.directory), resume=run.resume, trackers=run.shown_by)
        trainer = Trainer(config.run, directory)
        stack.callback(trainer.close)
        yield Run(config, trainer, directory, dry=dry, stack=stack)
