"""What a training loop calls: devices and processes, optimizers and EMA, checkpoints, metrics, and a clean stop.

A toolbox: it never calls the loop and knows no loss. The shape of a loop is

    while not trainer.should_stop():
        for indices in trainer.micro_batches(trainer.local_indices(trainer.step, batch_size)): ...
            trainer.check_finite("loss", loss); trainer.backward(loss)
        grad_norm = trainer.update(student)
        trainer.advance()
        trainer.log({"loss": loss.detach(), "grad_norm": grad_norm})
        if trainer.checkpoint_due:
            trainer.save({})
    exit_code = trainer.finish({})
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fewstep.core.training.ema import EmaSettings, stored_buffers
from fewstep.core.training.interrupt import Interrupt
from fewstep.core.training.metrics import MetricWindow
from fewstep.core.training.optimizers import build_optimizer
from fewstep.core.training.processes import Processes
from fewstep.core.training.progress import Progress
from fewstep.core.training.roles import (
    Role,
    RoleMemory,
    apply_gradients,
    first_non_finite_gradient,
    load_role,
    memory_of_frozen,
    memory_of_role,
    role_to_tensors,
    trainable_parameters,
)
from fewstep.core.training.run_directory import RunDirectory

_MOST_OVERFLOWS = 25


class NonFiniteError(RuntimeError):
    """NaN or infinity in a loss or a gradient; raised before the optimizer has changed any weight."""


class Trainer:
    """State of a run on this process; `step` is the number of finished steps.

    `run` is the configuration of the run, `directory` its folder; a new run (no `directory.resume_path`) starts its
    metrics afresh. Torch's global generators are seeded with `run.seed`.

    Raises:
        ValueError: the launcher asked for something other than one process or data parallelism (DDP).
    """

    def __init__(self, run: RunConfig, directory: RunDirectory, *, cpu: bool = False) -> None:
        self.run, self.directory = run, directory
        # Buffers are equal from the start and change alike on every process; broadcasting them in each forward would
        # write into tensors that an earlier forward of the same step still needs for its backward.
        wrapper = DistributedDataParallelKwargs(broadcast_buffers=False)
        self.accelerator = Accelerator(cpu=cpu, mixed_precision=run.mixed_precision, kwargs_handlers=[wrapper])
        kind = self.accelerator.distributed_type
        if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise ValueError(
                f"launcher: given {kind.value}, allowed are one process and data parallelism; see configs/"
            )
        self.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main = self.rank == 0
        self.step = 0
        self.roles: dict[str, Role] = {}
        self.last_checkpoint: Path | None = None
        self._window = MetricWindow()
        self._progress: Progress | None = None
        self._overflows = 0
        self._stop_signal = 0
        self._timed_out = False
        self._started = self._last_log = time.monotonic()
        self._last_logged_step = 0
        self._processes = Processes(self.rank, self.world_size)
        self._interrupt = Interrupt()
        self._interrupt.install()
        torch.manual_seed(run.seed)
        if self.is_main:
            directory.write_environment(self.device, processes=self.world_size)
            if directory.resume_path is None:
                directory.begin(0)

    def add_role(
        self,
        name: str,
        module: nn.Module,
        optimizer: OptimizerConfig,
        *,
        ema: EmaSettings | None = None,
        every: int = 1,
    ) -> Role:
        """Take a network into training: it moves to the device and gets the weights of process 0 on all processes.

        Parameters with requires_grad are trained. With `ema` an average is kept. `every` says in which steps the role
        is updated, for a decaying rate.

        Raises:
            ValueError: the name is taken, no parameter can be trained, or the average would take in no update.
        """
        if name in self.roles:
            raise ValueError(f"role {name} exists already; give each network its own name")
        updates = -(-self.run.steps // every)
        if ema is not None and ema.every > max(1, updates):
            raise ValueError(f"{name}.ema_every is {ema.every}, and the run makes {updates} updates: lower it")
        module.to(self.device)
        if optimizer.weights == "bfloat16":
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        parameters = trainable_parameters(name, module, half=optimizer.weights == "bfloat16")
        # DDP would copy parameters alone, as it is told not to broadcast buffers.
        self._processes.copy_from_first(module)
        wrapped = self.accelerator.prepare_model(module)
        self.roles[name] = Role(
            name=name,
            module=module,
            wrapped=wrapped,
            optimizer=build_optimizer(parameters, optimizer),
            parameters=parameters,
            buffers=stored_buffers(module),
            settings=optimizer,
            ema=None if ema is None else ema.of(module),
            total_updates=updates,
        )
        return self.roles[name]

    def local_indices(self, step: int, batch_size: int) -> list[int]:
        """Numbers of this process's samples in the whole run: a contiguous part of step * batch_size + [0, batch_size).

        Raises:
            ValueError: batch_size is not divisible by processes * gradient_accumulation.
        """
        parts = self.world_size * self.run.gradient_accumulation
        if batch_size < 1 or batch_size % parts:
            raise ValueError(
                f"batch_size: given {batch_size}, allowed are multiples of {parts} "
                f"({self.world_size} processes * gradient_accumulation {self.run.gradient_accumulation})"
            )
        local = batch_size // self.world_size
        first = step * batch_size + self.rank * local
        return list(range(first, first + local))

    def micro_batches(self, indices: Sequence[int]) -> list[list[int]]:
        """This process's samples of a step in `gradient_accumulation` equal slices."""
        size = len(indices) // self.run.gradient_accumulation
        return [list(indices[start : start + size]) for start in range(0, len(indices), size)]

    def sync(self, role: Role, enabled: bool) -> AbstractContextManager[None]:
        """Around forward and backward: with `enabled=False` gradients stay on this process (all but the last slice)."""
        return nullcontext() if enabled else self.accelerator.no_sync(role.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a slice's mean loss, divided by `gradient_accumulation`.

        In fp16 all backward calls of a role come directly before its `update`, because that changes the loss scale.
        """
        self.accelerator.backward(loss / self.run.gradient_accumulation)

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Raise `NonFiniteError` if a tensor holds NaN or infinity; costs one device synchronisation."""
        if not bool(torch.isfinite(tensor.detach()).all()):
            raise self._non_finite(name)

    def update(self, role: Role) -> float:
        """Clip and apply the gradients of a role, clear them, update its EMA; once per step after all backward calls.

        Returns the norm of the gradient before clipping. In fp16 a step that overflowed is skipped and gives a norm
        that is not finite.

        Raises:
            NonFiniteError: a gradient is not finite (in fp16: 25 times in a row); no weight has changed.
            ValueError: there is no gradient.
        """
        gradients = [parameter.grad for _, parameter in role.parameters if parameter.grad is not None]
        if not gradients:
            raise ValueError(f"role {role.name}: no gradient; call backward on a loss of this network before update")
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(role.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        value = norm.item()
        if not math.isfinite(value):
            self._overflows += 1
            if scaler is None or self._overflows >= _MOST_OVERFLOWS:
                offender = first_non_finite_gradient(role.parameters) or "all parameters together"
                raise self._non_finite(f"gradient of {role.name}: {offender}")
        if apply_gradients(role, norm, scaler=scaler):
            self._overflows = 0
        return value

    def advance(self) -> None:
        """Count a finished step."""
        self._bar().advance()
        self.step += 1

    @property
    def log_due(self) -> bool:
        return self.step % self.run.log_every == 0 or self.step >= self.run.steps

    @property
    def checkpoint_due(self) -> bool:
        return self.step % self.run.checkpoint_every == 0

    @property
    def sample_due(self) -> bool:
        return self.step % self.run.sample_every == 0

    def log(self, metrics: Mapping[str, float | Tensor]) -> dict[str, float] | None:
        """Add the metrics of the step just counted; every `log_every` steps write and return their means.

        The mean is over the steps since the last record in which a metric was given, and over processes; every process
        gives the same names in the same step. Tensors are read only when a record is written (one synchronisation).
        """
        self._window.add(metrics)
        if not self.log_due:
            return None
        means = {name: total / count for name, (total, count) in self._reduced_window().items()}
        self._window.clear()
        now = time.monotonic()
        seconds = (now - self._last_log) / max(1, self.step - self._last_logged_step)
        self._last_log, self._last_logged_step = now, self.step
        if self.is_main:
            self.directory.append({"step": self.step, **means, "seconds_per_step": round(seconds, 6)})
            self.directory.scalars(self.step, {**means, "seconds_per_step": seconds})
            self._bar().show(means)
        return means

    def note(self, text: str) -> None:
        """Print a line on process 0 and keep it in metrics.jsonl."""
        if self.is_main:
            self._bar().note(text)
            self.directory.append({"step": self.step, "note": text})

    def save(self, extra_state: Mapping[str, Any]) -> Path:
        """Write a checkpoint of all roles, generators and metrics, and `extra_state` (JSON); all processes call it.

        Raises:
            OSError: the disk is full, on all processes alike; the previous checkpoint is intact.
            ValueError: `extra_state` is not JSON.
        """
        window, generators = self._reduced_window(), self._gather_generators()
        failure: OSError | ValueError | None = None
        if self.is_main:
            try:
                self._write_checkpoint(window, generators, extra_state)
            except (OSError, ValueError) as error:
                failure = error
        # The others must not wait for a process that has left.
        if self._processes.from_first(int(failure is not None)):
            raise failure or OSError(f"process 0 could not write the checkpoint of step {self.step}; see its message")
        self.last_checkpoint = self.directory.path / f"checkpoint-{self.step}"
        return self.last_checkpoint

    def resume(self, path: str | Path) -> dict[str, Any]:
        """Continue exactly after a checkpoint, with all roles already added; returns its `extra_state`.

        The number of processes may differ. Metrics after the checkpoint are dropped; later checkpoints are set aside.

        Raises:
            ValueError: the checkpoint is damaged, or its seed, batch size, roles, weights or optimizers differ.
        """
        checkpoint = load_checkpoint(path)
        state = checkpoint.state
        for name, here in (("seed", self.run.seed), ("batch_size", self.run.batch_size)):
            if state[name] != here:
                raise ValueError(f"run.{name}: given {here}, but {path} has {state[name]}; resume with the same value")
        if state["roles"].keys() != self.roles.keys():
            raise ValueError(f"{path} holds roles {sorted(state['roles'])}, this run has {sorted(self.roles)}")
        for name, role in self.roles.items():
            load_role(role, checkpoint.tensors, state["roles"][name])
        self._load_generators(checkpoint)
        self._window.load({name: (total, count) for name, (total, count) in state["metrics"].items()})
        if self.accelerator.scaler is not None and state["loss_scale"] is not None:
            self.accelerator.scaler.load_state_dict(state["loss_scale"])
        self.step = self._last_logged_step = checkpoint.step
        self.last_checkpoint = Path(path)
        self.accelerator.wait_for_everyone()
        if self.is_main:
            for moved in self.directory.begin(self.step):
                self.note(f"set aside {moved.name}, which is later than the checkpoint this run goes on from")
        return state["extra"]

    def should_stop(self) -> bool:
        """Whether all steps are done, a SIGTERM or SIGINT came to any process, or `max_seconds` are over."""
        limit = self.run.max_seconds
        timed_out = limit is not None and time.monotonic() - self._started >= limit
        signum, over = self._processes.maximum([self._interrupt.signum, int(timed_out)])
        if signum and not self._stop_signal:
            self.note(f"signal {signum}: stopping after step {self.step}")
        if over and not self._timed_out:
            self.note(f"max_seconds {limit:g} are over: stopping after step {self.step}")
        self._stop_signal, self._timed_out = signum, bool(over)
        return self.step >= self.run.steps or signum > 0 or self._timed_out

    def finish(self, extra_state: Mapping[str, Any]) -> int:
        """Save unless the last step is saved, close everything, and return the exit code: 0, or 128 + signal."""
        if self.last_checkpoint != self.directory.path / f"checkpoint-{self.step}":
            self.save(extra_state)
        self.close()
        return 128 + self._stop_signal if self._stop_signal else 0

    def close(self) -> None:
        """Give back terminal, files, signal handlers and process group, without saving; `finish` does it, too.

        Calling it again does nothing.
        """
        if self._progress is not None:
            self._progress.close()
        if self.is_main:
            self.directory.close()
        self._interrupt.restore()
        self.accelerator.end_training()

    def broadcast_int(self, value: int) -> int:
        """The value of process 0."""
        return self._processes.from_first(value)

    def mean_over_ranks(self, tensor: Tensor) -> Tensor:
        """Mean of a tensor over processes; a copy without gradient."""
        return self._processes.mean(tensor)

    def memory_report(self, frozen: Mapping[str, nn.Module] | None = None) -> list[RoleMemory]:
        """Parameters and bytes per role, and of networks that are only evaluated; what they share counts once."""
        counted: set[int] = set()
        rows = [memory_of_frozen(name, module, counted) for name, module in (frozen or {}).items()]
        return [*rows, *(memory_of_role(role, counted) for role in self.roles.values())]

    def _bar(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(start=self.step, total=self.run.steps, enabled=self.is_main, device=self.device)
        return self._progress

    def _non_finite(self, name: str) -> NonFiniteError:
        advice = "no checkpoint was written yet: start again"
        if self.last_checkpoint is not None:
            advice = f"continue with --resume {self.last_checkpoint}"
        return NonFiniteError(
            f"step {self.step}: {name} is not finite; no weight was changed by it; {advice} "
            "and lower the learning rate, or look at this step's inputs"
        )

    def _reduced_window(self) -> dict[str, tuple[float, int]]:
        names, sums = self._window.sums(self.device)
        totals = self.mean_over_ranks(sums).tolist()
        return {name: (total, self._window.count(name)) for name, total in zip(names, totals, strict=True)}

    def _write_checkpoint(
        self, window: Mapping[str, tuple[float, int]], generators: dict[str, Tensor], extra_state: Mapping[str, Any]
    ) -> None:
        tensors: dict[str, Mapping[str, Tensor]] = {"generators": generators}
        roles = {}
        for name, role in self.roles.items():
            files, roles[name] = role_to_tensors(role)
            tensors.update(files)
        scaler = self.accelerator.scaler
        state = {
            "seed": self.run.seed,
            "batch_size": self.run.batch_size,
            "samples": self.step * self.run.batch_size,
            "roles": roles,
            "metrics": {name: list(entry) for name, entry in window.items()},
            "loss_scale": None if scaler is None else scaler.state_dict(),
            "extra": dict(extra_state),
        }
        keep = self.run.keep_checkpoints
        save_checkpoint(self.directory.path, self.step, tensors=tensors, state=state, keep=keep)

    def _gather_generators(self) -> dict[str, Tensor]:
        """States of torch's generators, one row per process: uint8 [processes, bytes]."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return {name: self._processes.rows(state) for name, state in states.items()}

    def _load_generators(self, checkpoint: Checkpoint) -> None:
        states = checkpoint.tensors["generators"]
        row = self.rank if len(states["cpu"]) == self.world_size else 0
        torch.set_rng_state(states["cpu"][row])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"][row], self.device)
