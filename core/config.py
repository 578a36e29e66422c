"""Typed configuration: one complete YAML file per experiment, overridable from the command line.

A configuration is a frozen dataclass, possibly of dataclasses; its annotations are the allowed types and the string
under each field is its help text. This module imports no torch, so that `--help` of a script answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import jsonargparse
import yaml

ConfigT = TypeVar("ConfigT")

_SHORTCUTS = ("dry_run", "resume")
_HELP_FLAGS = ("-h", "--help")


def require_one_method(config: Any) -> str:
    """The name of the one section of `config.METHODS` that is there: the section that is present is the method.

    Raises:
        ValueError: there is none, or more than one.
    """
    there = [name for name in config.METHODS if getattr(config, name) is not None]
    if len(there) != 1:
        raise ValueError(_method_problem(config.METHODS, there))
    return there[0]


def _method_problem(methods: Sequence[str], there: Sequence[str]) -> str:
    if there:
        return f"the sections {' and '.join(there)} are given, and a run has one method: keep one of them"
    return f"no method is given: add one of the sections {', '.join(methods)} ({methods[0]}: {{}} for its defaults)"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was given and what is allowed."""


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
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds: given {self.max_seconds}, allowed is a number > 0 or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW for one trained network, with linear warmup counted in updates of that network."""

    learning_rate: float
    """Learning rate after warmup."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moment; (0, 0.999) is common for distribution matching."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly to its value; 0 is no warmup."""
    decay: Literal["none", "cosine"] = "none"
    """'cosine' lets the rate fall to 0 over the run's updates of this network as half a cosine, after the warmup."""
    clip: float | None = 1.0
    """Largest norm of the gradient over all parameters; empty does not clip."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: given {self.learning_rate}, allowed is a number > 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: given {self.betas}, allowed are two numbers in [0, 1)")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: given {self.weight_decay}, allowed is a number >= 0")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: given {self.warmup_steps}, allowed is an integer >= 0")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: given {self.clip}, allowed is a number > 0 or null")


@dataclasses.dataclass(frozen=True)
class _Key:
    """One dotted key of a configuration: a value, or a group of keys when it is a dataclass."""

    name: str
    hint: Any
    required: bool
    group: type | None
    optional_group: bool
    parent_optional: str | None


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
    keys = {key.name: key for key in _walk(config_class)}
    arguments = _expand_shortcuts(list(argv), keys)
    methods: tuple[str, ...] = getattr(config_class, "METHODS", ())
    for_help = any(argument in _HELP_FLAGS for argument in arguments)
    given = _check_arguments(arguments, keys)
    chosen = _check_methods(given, methods, lenient=for_help)
    if not for_help:
        _check_missing(set(given), keys)
    hidden = set(methods) - {chosen}
    told = description
    if methods and chosen is None:
        told += f" One of the sections {', '.join(methods)} is the method; --config FILE --help shows its settings."
    parser = _build_parser(config_class, prog=prog, description=told, hidden=hidden)
    try:
        values = parser.parse_args(arguments).as_dict()
    except jsonargparse.ArgumentError as error:
        _raise_readable(str(error), keys)
    values.pop("config", None)
    values |= dict.fromkeys(hidden)
    config = _build(config_class, values, prefix="")
    return config, plain_values(config)


def plain_values(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts and lists of JSON types; tuples become lists, sections that are not there go."""
    optional = {name for name, hint in typing.get_type_hints(type(config)).items() if _dataclass_of(hint)[1]}
    values = dataclasses.asdict(config)
    return _plain({name: value for name, value in values.items() if value is not None or name not in optional})


def save_resolved(path: str | Path, config: Any) -> None:
    """Write a configuration as YAML that `load_config` reads back to an equal instance."""
    text = yaml.dump(plain_values(config), Dumper=_ResolvedDumper, sort_keys=False, allow_unicode=False, width=120)
    Path(path).write_text(text, encoding="utf-8")


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


def _dataclass_of(hint: Any) -> tuple[type | None, bool]:
    """The dataclass that an annotation stands for, and whether None is allowed in its place."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint, False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if len(options) == 1 and dataclasses.is_dataclass(options[0]) and isinstance(options[0], type):
            return options[0], True
    return None, False


def _walk(config_class: type, *, prefix: str = "", parent_optional: str | None = None) -> Iterator[_Key]:
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        group, optional = _dataclass_of(hints[field.name])
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        name = prefix + field.name
        yield _Key(name, hints[field.name], required, group, optional, parent_optional)
        if group is not None:
            yield from _walk(group, prefix=f"{name}.", parent_optional=name if optional else parent_optional)


def _expand_shortcuts(arguments: list[str], keys: Mapping[str, _Key]) -> list[str]:
    """Turn `--dry_run` and `--resume X` into their dotted keys; a bare `--dry_run` is true."""
    targets = {}
    for shortcut in _SHORTCUTS:
        matches = [name for name in keys if name.rsplit(".", 1)[-1] == shortcut]
        if len(matches) == 1:
            targets[f"--{shortcut}"] = matches[0]
    expanded: list[str] = []
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        name = targets.get(flag, flag.removeprefix("--") if flag.startswith("--") else None)
        following = arguments[position + 1 : position + 2]
        bare = not equals and (not following or following[0].startswith("--"))
        if bare and name is not None and name in keys and keys[name].hint is bool:
            expanded.append(f"--{name}=true")
        else:
            expanded.append(f"--{targets[flag]}{equals}{value}" if flag in targets else argument)
    return expanded


def _check_arguments(arguments: Sequence[str], keys: Mapping[str, _Key]) -> dict[str, str]:
    """Check the names of all options and of the configuration file; returns the keys that are given, and where."""
    given: dict[str, str] = {}
    files: list[str] = []
    for position, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if argument in _HELP_FLAGS:
            continue
        if name == "config":
            files.append(value if equals else following)
        elif name != "print_config" and not (name.endswith(".help") and name[: -len(".help")] in keys):
            where = "on the command line"
            told = value if equals else following
            _check_key(name, told, keys, where=where)
            if not (told == "null" and keys[name].optional_group):
                given[name] = where
    if len(files) > 1:
        raise ConfigError(f"--config: given {len(files)} files {files}, allowed is one; an experiment is one file")
    if files:
        given = {**given, **dict.fromkeys(_check_file(Path(files[0]), keys), f"in {files[0]}")}
    return given


def _check_methods(given: Mapping[str, str], methods: Sequence[str], *, lenient: bool) -> str | None:
    """The method whose section is given; None where there are no methods, or for a lenient look none or too many."""
    if not methods:
        return None
    places = {name.partition(".")[0]: (name, where) for name, where in reversed(list(given.items()))}
    there = [name for name in methods if name in places]
    if len(there) == 1:
        return there[0]
    if lenient:
        return None
    if not there:
        raise ConfigError(_method_problem(methods, there))
    # The one of the file is meant: what the command line brings beside it belongs elsewhere.
    meant = next((name for name in there if places[name][1] != "on the command line"), there[0])
    name, where = next(places[name] for name in there if name != meant)
    raise ConfigError(
        f"{name} {where} belongs to the section {name.partition('.')[0]}, and the method of this run is {meant}: a run "
        "has one method, and what another reads would do nothing here"
    )


def _check_key(name: str, value: Any, keys: Mapping[str, _Key], *, where: str) -> None:
    if name not in keys:
        nearest = difflib.get_close_matches(name, list(keys), n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(keys)}"
        raise ConfigError(f"unknown key {name} {where}; {hint}")
    key = keys[name]
    if key.group is None or isinstance(value, Mapping) or (key.optional_group and value in (None, "null")):
        return
    members = ", ".join(other for other in keys if other.startswith(f"{name}."))
    if not (isinstance(value, str) and value.lstrip().startswith("{")):
        raise ConfigError(f"{name}: given {value!r} {where}, but it is a group; give its keys: {members}")


def _check_file(path: Path, keys: Mapping[str, _Key]) -> set[str]:
    if not path.is_file():
        raise ConfigError(f"--config: given {str(path)!r}, which is not a file; give the path of a YAML file")
    text = path.read_text(encoding="utf-8")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = jsonargparse.get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode) or not isinstance(values, Mapping):
        raise ConfigError(f"{path}: holds no keys; give 'key: value' lines for {', '.join(keys)}")
    _check_repeats(root, path=path, prefix="")
    given: set[str] = set()
    pending: list[tuple[str, Any]] = [(str(name), value) for name, value in values.items()]
    while pending:
        name, value = pending.pop(0)
        _check_key(name, value, keys, where=f"in {path}")
        if value is None and keys[name].optional_group:
            continue
        given.add(name)
        if keys[name].group is not None and isinstance(value, Mapping):
            pending.extend((f"{name}.{inner}", item) for inner, item in value.items())
    return given


def _check_repeats(node: yaml.MappingNode, *, path: Path, prefix: str) -> None:
    seen: set[str] = set()
    for name_node, value_node in node.value:
        name = prefix + str(name_node.value)
        if name in seen:
            raise ConfigError(f"{path}, line {name_node.start_mark.line + 1}: key {name} is given twice; keep one")
        seen.add(name)
        if isinstance(value_node, yaml.MappingNode):
            _check_repeats(value_node, path=path, prefix=f"{name}.")


def _check_missing(given: set[str], keys: Mapping[str, _Key]) -> None:
    missing = []
    for key in keys.values():
        parent = key.parent_optional
        inside_given_group = parent is None or any(name == parent or name.startswith(f"{parent}.") for name in given)
        if key.required and (key.group is None or key.optional_group) and inside_given_group:
            is_given = key.name in given or any(name.startswith(f"{key.name}.") for name in given)
            if not is_given:
                missing.append(key)
    if missing:
        listed = ", ".join(f"{key.name} ({describe_type(key.hint)})" for key in missing)
        raise ConfigError(f"missing keys: {listed}; give them in the --config file or as --{missing[0].name} VALUE")


def _build_parser(config_class: type, *, prog: str, description: str, hidden: set[str]) -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        description=f"{description} Shortcuts: --dry_run and --resume latest|PATH.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with the whole configuration.")
    parser.add_class_arguments(config_class, skip={*hidden})
    return parser


def _raise_readable(message: str, keys: Mapping[str, _Key]) -> NoReturn:
    """Restate a parser message as key, given, allowed."""
    name = ".".join(re.findall(r'(?:Parser key|Problem with given) "([^"]+)"', message))
    given = re.findall(r"(?:Got value|Given value): ?(.*)", message)
    if name in keys and given:
        allowed = describe_type(keys[name].hint)
        detail = "" if "Expected a" in message or "Union" in message else f" ({' '.join(message.split())})"
        raise ConfigError(f"{name}: given {given[0]}, allowed is {allowed}{detail}")
    raise ConfigError(" ".join(message.split()))


def describe_type(hint: Any) -> str:
    """An annotation in the words of a user: `one of 'sde', 'ode'`, `int or null`, `tuple[float, float]`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and origin is None:
        return hint.__name__
    return str(hint)


def _build(config_class: type[ConfigT], values: Mapping[str, Any], *, prefix: str) -> ConfigT:
    hints = typing.get_type_hints(config_class)
    arguments = {}
    for field in dataclasses.fields(config_class):  # pyright: ignore[reportArgumentType]
        group, _ = _dataclass_of(hints[field.name])
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
