"""Typed configuration: one complete YAML file per experiment, overridable from the command line.

A configuration is a frozen dataclass, possibly of dataclasses; its annotations are the allowed types and the string
under each field is its help text. This module imports no torch, so that `--help` of a script answers at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import jsonargparse
import yaml

from fewstep.core.config_keys import (
    HELP_FLAGS,
    ConfigError,
    Key,
    check_arguments,
    check_methods,
    check_missing,
    dataclass_of,
    describe_type,
    expand_shortcuts,
    method_problem,
    walk_keys,
)

ConfigT = TypeVar("ConfigT")


def require_one_method(config: Any) -> str:
    """The name of the one section of `config.METHODS` that is there: the section that is present is the method.

    Raises:
        ValueError: there is none, or more than one.
    """
    there = [name for name in config.METHODS if getattr(config, name) is not None]
    if len(there) != 1:
        raise ValueError(method_problem(config.METHODS, there))
    return there[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has, whichever the method."""

    directory: str
    """Run directory: resolved configuration, metrics, samples and checkpoints are written here."""
    seed: int
    """Seed of the run; the noise of a step is a function of (seed, step, stream, sample index)."""
    steps: int
    """Training steps of the whole run, counted from the first start."""
    batch_size: int
    """Samples per step over all processes; divisible by processes * gradient_accumulation."""
    gradient_accumulation: int = 1
    """Number of slices in which each process computes its part of a batch."""
    checkpoint_every: int
    """Write a checkpoint every so many steps (one is always written at the end)."""
    keep_checkpoints: int
    """How many checkpoints stay on disk; older ones are deleted once a newer one is complete."""
    sample_every: int
    """Write a grid of samples every so many steps."""
    log_every: int
    """Write metrics every so many steps (each is the mean since the last record)."""
    resume: str | None = None
    """'latest', or the path of a checkpoint, to continue a run exactly; empty starts a new one."""
    dry_run: bool = False
    """Print the resolved configuration, step grid, parameters and memory, make one step on fake data and exit."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the trained networks; weights, losses and EMA stay in fp32."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow", "none"], ...] = ("tensorboard",)
    """What shows metrics and sample grids beside metrics.jsonl: a list, or [none]. Prompts are not sent as text."""
    max_seconds: float | None = None
    """Save and stop cleanly after this many seconds of this start; empty is no limit."""

    def __post_init__(self) -> None:
        counts = "steps batch_size gradient_accumulation checkpoint_every keep_checkpoints sample_every log_every"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: given {getattr(self, name)}, allowed is an integer >= 1")
        if self.seed < 0:
            raise ValueError(f"seed: given {self.seed}, allowed is an integer >= 0")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size: given {self.batch_size}, which is not divisible by gradient_accumulation "
                f"{self.gradient_accumulation}; change one of them"
            )
        if not self.trackers or len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers: given {list(self.trackers)}, allowed is a list of different ones, or [none]")
        if "none" in self.trackers and len(self.trackers) > 1:
            raise ValueError(f"trackers: given {list(self.trackers)}, and none stands alone")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds: given {self.max_seconds}, allowed is a number > 0 or null")

    @property
    def shown_by(self) -> tuple[str, ...]:
        """The trackers, without the word for no tracker."""
        return tuple(name for name in self.trackers if name != "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer of one trained network, with linear warmup counted in updates of that network."""

    kind: Literal["adamw", "adam", "radam", "adamw_8bit", "adam_8bit", "came"] = "adamw"
    """AdamW, Adam or RAdam of torch; those with moments of 8 bits (bitsandbytes), or CAME (came-pytorch): pip install
    'fewstep[optimizers]'."""
    learning_rate: float
    """Learning rate after warmup."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Decay of the first and second moment; (0, 0.999) is common for distribution matching. CAME has a third."""
    eps: float | None = None
    """Added to the root of the second moment; empty is 1e-8, and CAME's own pair."""
    weight_decay: float = 0.01
    """Weight decay: decoupled in adamw, its 8-bit form and came, part of the gradient in adam, adam_8bit and radam."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly to its value; 0 is no warmup."""
    decay: Literal["none", "cosine", "linear", "inverse_sqrt"] = "none"
    """'cosine' lets the rate fall over the run's updates of this network as half a cosine, after the warmup, 'linear'
    as a line; 'inverse_sqrt' with one over the root of the updates, from decay_start on."""
    decay_floor: float = 0.0
    """Share of the rate that is left at the end of a cosine or line."""
    decay_start: int = 0
    """Updates before the rate falls with inverse_sqrt."""
    clip: float | None = 1.0
    """Largest norm of the gradient over all parameters; empty does not clip."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """What the trained weights and their moments are kept in. In bfloat16 they take half the memory, and an update
    smaller than 1/256 of its weight is lost: some published runs are so, and fp32 weights under run.mixed_precision are
    better."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: given {self.learning_rate}, allowed is a number > 0")
        count = 3 if self.kind == "came" else 2
        if len(self.betas) != count or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: given {self.betas}, allowed are {count} numbers in [0, 1) for {self.kind}")
        if self.eps is not None and not 0 < self.eps < 1:
            raise ValueError(f"eps: given {self.eps}, allowed is a number between 0 and 1, or null")
        if self.eps is not None and self.kind == "came":
            raise ValueError(f"eps: given {self.eps}, and came has a pair of its own: leave it out")
        if not 0 <= self.decay_floor < 1:
            raise ValueError(f"decay_floor: given {self.decay_floor}, allowed is a number in [0, 1)")
        if self.decay_floor > 0 and self.decay not in ("cosine", "linear"):
            raise ValueError(f"decay_floor: given {self.decay_floor} with decay {self.decay!r}, which has none")
        if (self.decay_start > 0) != (self.decay == "inverse_sqrt"):
            raise ValueError(
                f"decay_start: given {self.decay_start} with decay {self.decay!r}; inverse_sqrt needs a number of "
                "updates > 0, the others none"
            )
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: given {self.weight_decay}, allowed is a number >= 0")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: given {self.warmup_steps}, allowed is an integer >= 0")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: given {self.clip}, allowed is a number > 0 or null")


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str], *, prog: str, description: str
) -> tuple[ConfigT, dict[str, Any]]:
    """`load_config` for a script: an unusable configuration prints one message on stderr and exits with code 2."""
    try:
        return load_config(config_class, argv, prog=prog, description=description)
    except ConfigError as error:
        sys.stderr.write(f"{prog}: error: {error}\n")
        sys.exit(2)


def load_config(
    config_class: type[ConfigT], argv: Sequence[str], *, prog: str, description: str
) -> tuple[ConfigT, dict[str, Any]]:
    """Configuration from `--config FILE` and overrides such as `--student.steps 2`.

    `--dry_run` and `--resume latest|PATH` reach the one field of that name, at whatever depth. Returns the instance
    and the same values as nested plain data (JSON and YAML types only). Raises `ConfigError` (a `ValueError`) for
    unknown, missing, repeated or wrongly typed keys. `--help` and `--print_config` print and exit with code 0.
    """
    keys = {key.name: key for key in walk_keys(config_class)}
    arguments = expand_shortcuts(list(argv), keys)
    methods: tuple[str, ...] = getattr(config_class, "METHODS", ())
    for_help = any(argument in HELP_FLAGS for argument in arguments)
    show = "--print_config" in arguments
    arguments = [argument for argument in arguments if argument != "--print_config"]
    given = check_arguments(arguments, keys)
    chosen = check_methods(given, methods, lenient=for_help)
    if not for_help:
        check_missing(set(given), keys)
    # Names were checked above, of all sections.
    arguments = [*_without_empty_sections(arguments, config_class, methods)]
    hidden = set(methods) - {chosen}
    section = None if chosen is None else (chosen, dataclass_of(typing.get_type_hints(config_class)[chosen])[0])
    told = description
    if methods and chosen is None:
        told += f" One of the sections {', '.join(methods)} is the method; --config FILE --help shows its settings."
    # --gan.help and the like show one section.
    explained = for_help or any(argument.endswith(".help") for argument in arguments)
    parser = _build_parser(
        config_class, prog=prog, description=told, hidden=hidden, section=section, explained=explained
    )
    try:
        values = parser.parse_args(arguments).as_dict()
    except jsonargparse.ArgumentError as error:
        _raise_readable(str(error), keys)
    values.pop("config", None)
    values |= dict.fromkeys(hidden)
    if chosen is not None:
        # A section without settings has nothing that the parser could give.
        values.setdefault(chosen, {})
    config = _build(config_class, values, prefix="")
    if show:
        sys.stdout.write(resolved_text(config))
        sys.exit(0)
    return config, plain_values(config)


def plain_values(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts and lists of JSON types; tuples become lists, sections that are not there go."""
    optional = {name for name, hint in typing.get_type_hints(type(config)).items() if dataclass_of(hint)[1]}
    values = dataclasses.asdict(config)
    return _plain({name: value for name, value in values.items() if value is not None or name not in optional})


def save_resolved(path: str | Path, config: Any) -> None:
    """Write a configuration as YAML that `load_config` reads back to an equal instance."""
    Path(path).write_text(resolved_text(config), encoding="utf-8")


def resolved_text(config: Any) -> str:
    """The configuration as YAML that can be given as --config."""
    return yaml.dump(plain_values(config), Dumper=_ResolvedDumper, sort_keys=False, allow_unicode=False, width=120)


class _ResolvedDumper(yaml.SafeDumper):
    """Quotes each string that the reader would otherwise take for a number, a boolean or null."""


def _represent_string(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    read_back = True
    try:
        read_back = jsonargparse.get_loader("yaml")(value) == value
    except yaml.YAMLError:
        read_back = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if read_back else '"')


_ResolvedDumper.add_representer(str, _represent_string)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _without_empty_sections(arguments: Sequence[str], config_class: type, methods: Sequence[str]) -> Iterator[str]:
    """The arguments without `--dmd {}` of sections that have no settings, which the parser does not know.

    Raises ConfigError for a method's section that is given as null: another one cannot take its place from there.
    """
    hints = typing.get_type_hints(config_class)
    skip = False
    for position, argument in enumerate(arguments):
        name, equals, value = argument.removeprefix("--").partition("=")
        if skip or not argument.startswith("--") or name not in methods:
            if not skip:
                yield argument
            skip = False
            continue
        value = value if equals else "".join(arguments[position + 1 : position + 2])
        if value == "null":
            raise ConfigError(f"{name}: given null on the command line; change the section of the method in the file")
        section = dataclass_of(hints[name])[0]
        if section is not None and not dataclasses.fields(section):
            skip = not equals
        else:
            yield argument


def _build_parser(
    config_class: type,
    *,
    prog: str,
    description: str,
    hidden: set[str],
    section: tuple[str, type | None] | None,
    explained: bool,
) -> jsonargparse.ArgumentParser:
    """A parser without the hidden sections; `section` is the method's, name and class, `explained` with their texts."""
    # What settings mean is read off the sources of their classes, which takes as long as all the rest.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=explained)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        description=f"{description} Shortcuts: --dry_run and --resume latest|PATH.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with the whole configuration.")
    skipped: set[str | int] = {*hidden}
    if section is not None and section[1] is not None:
        # As an optional group it would stand in --help as one line.
        skipped.add(section[0])
        parser.add_class_arguments(section[1], section[0])
    parser.add_class_arguments(config_class, skip=skipped)
    return parser


def _raise_readable(message: str, keys: Mapping[str, Key]) -> NoReturn:
    """Restate a parser message as key, given, allowed."""
    name = ".".join(re.findall(r'(?:Parser key|Problem with given) "([^"]+)"', message))
    given = re.findall(r"(?:Got value|Given value): ?(.*)", message)
    if name in keys and given:
        allowed = describe_type(keys[name].hint)
        detail = "" if "Expected a" in message or "Union" in message else f" ({' '.join(message.split())})"
        raise ConfigError(f"{name}: given {given[0]}, allowed is {allowed}{detail}")
    raise ConfigError(" ".join(message.split()))


def _build(config_class: type[ConfigT], values: Mapping[str, Any], *, prefix: str) -> ConfigT:
    hints = typing.get_type_hints(config_class)
    arguments = {}
    for field in dataclasses.fields(config_class):  # pyright: ignore[reportArgumentType]
        group, _ = dataclass_of(hints[field.name])
        if field.name not in values:
            # A section that is null in the file and has a key on the command line comes without its defaults.
            continue
        value = values[field.name]
        if group is not None and value is not None:
            value = value if isinstance(value, group) else _build(group, value, prefix=f"{prefix}{field.name}.")
        elif typing.get_origin(hints[field.name]) is tuple and isinstance(value, list):
            value = tuple(value)
        arguments[field.name] = value
    try:
        return config_class(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error
