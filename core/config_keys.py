"""The keys of a configuration: their names, what is given of them on the command line and in a file, and what is wrong.

Names are checked here, before any value is parsed, so that a mistake is answered in the words of the configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

SHORTCUTS = ("dry_run", "resume")
HELP_FLAGS = ("-h", "--help")
# Keys of earlier versions, and what takes their place.
RENAMED = {
    "fake_score.updates_per_student_update": (
        "it is fake_score.ratio now, fake-score updates for each update of the student everywhere: the same number in "
        "train_dmd and rewards; beside consistency and in self_forcing, where it was the length of a cycle, one less"
    ),
    "matching.score_shift": "it is matching.score_times.shift now",
    "matching.fake_shift": "it is matching.fake_times.shift now",
    "matching.t_min": "it is min in matching.score_times and in matching.fake_times now",
    "matching.t_max": "it is max in matching.score_times and in matching.fake_times now",
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was given and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One dotted key of a configuration: a value, or a group of keys when it is a dataclass."""

    name: str
    hint: Any
    required: bool
    group: type | None
    optional_group: bool
    parent_optional: str | None


def dataclass_of(hint: Any) -> tuple[type | None, bool]:
    """The dataclass that an annotation stands for, and whether None is allowed in its place."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint, False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if len(options) == 1 and dataclasses.is_dataclass(options[0]) and isinstance(options[0], type):
            return options[0], True
    return None, False


def walk_keys(config_class: type, *, prefix: str = "", parent_optional: str | None = None) -> Iterator[Key]:
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        group, optional = dataclass_of(hints[field.name])
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        name = prefix + field.name
        yield Key(name, hints[field.name], required, group, optional, parent_optional)
        if group is not None:
            yield from walk_keys(group, prefix=f"{name}.", parent_optional=name if optional else parent_optional)


def expand_shortcuts(arguments: list[str], keys: Mapping[str, Key]) -> list[str]:
    """Turn `--dry_run` and `--resume X` into their dotted keys; a bare `--dry_run` is true."""
    targets = {}
    for shortcut in SHORTCUTS:
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


def check_arguments(arguments: Sequence[str], keys: Mapping[str, Key]) -> dict[str, str]:
    """Check the names of all options and of the configuration file; returns the keys that are given, and where."""
    given: dict[str, str] = {}
    files: list[str] = []
    for position, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if argument in HELP_FLAGS:
            continue
        if name == "config":
            files.append(value if equals else following)
        elif name != "print_config" and not (name.endswith(".help") and name[: -len(".help")] in keys):
            where = "on the command line"
            told = value if equals else following
            _check_key(name, told, keys, where=where)
            if keys[name].group is not None and told.lstrip().startswith("{"):
                given |= dict.fromkeys(_check_inline(name, told, keys, where=where), where)
            if not (told == "null" and keys[name].optional_group):
                given[name] = where
    if len(files) > 1:
        raise ConfigError(f"--config: given {len(files)} files {files}, allowed is one; an experiment is one file")
    if files:
        given = {**given, **dict.fromkeys(_check_file(Path(files[0]), keys), f"in {files[0]}")}
    return given


def check_methods(given: Mapping[str, str], methods: Sequence[str], *, lenient: bool) -> str | None:
    """The method whose section is given; None where there are no methods, or for a lenient look none or too many."""
    if not methods:
        return None
    places = {name.partition(".")[0]: (name, where) for name, where in reversed(list(given.items()))}
    there = [name for name in methods if name in places]
    if len(there) == 1:
        return there[0]
    if lenient:
        return None
    of_file = [name for name in there if places[name][1] != "on the command line"]
    if not there or len(of_file) > 1:
        raise ConfigError(method_problem(methods, of_file))
    # The one of the file is meant: what the command line brings beside it belongs elsewhere.
    meant = (of_file or there)[0]
    name, where = next(places[name] for name in there if name != meant)
    raise ConfigError(
        f"{name} {where} belongs to the section {name.partition('.')[0]}, and the method of this run is {meant}: a run "
        "has one method, and what another reads would do nothing here"
    )


def _check_key(name: str, value: Any, keys: Mapping[str, Key], *, where: str) -> None:
    if name not in keys and name in RENAMED:
        raise ConfigError(f"unknown key {name} {where}: {RENAMED[name]}")
    if name not in keys:
        nearest = difflib.get_close_matches(name, list(keys), n=1, cutoff=0.5)
        # Without a near one, the keys of its own section, or the sections: never all keys of all of them.
        section = name.rpartition(".")[0]
        beside = [key for key in keys if key.rpartition(".")[0] == (section if section in keys else "")]
        hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(beside)}"
        raise ConfigError(f"unknown key {name} {where}; {hint}")
    key = keys[name]
    if key.group is None or isinstance(value, Mapping) or (key.optional_group and value in (None, "null")):
        return
    members = ", ".join(other for other in keys if other.startswith(f"{name}."))
    if not (isinstance(value, str) and value.lstrip().startswith("{")):
        raise ConfigError(f"{name}: given {value!r} {where}, but it is a group; give its keys: {members}")


def _check_inline(name: str, text: str, keys: Mapping[str, Key], *, where: str) -> set[str]:
    """The keys inside a group that is given as one mapping, such as --gan '{latents: DIR, weight: 0.1}'."""
    try:
        values = jsonargparse.get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: given {text!r} {where}, which is not valid YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}: given {text!r} {where}, allowed is a mapping of its keys")
    return _check_mapping({f"{name}.{inner}": value for inner, value in values.items()}, keys, where=where)


def _check_file(path: Path, keys: Mapping[str, Key]) -> set[str]:
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
    return _check_mapping({str(name): value for name, value in values.items()}, keys, where=f"in {path}")


def _check_mapping(values: Mapping[str, Any], keys: Mapping[str, Key], *, where: str) -> set[str]:
    """Check the names of nested keys; returns those that are given. A section that is null is not there."""
    given: set[str] = set()
    pending = list(values.items())
    while pending:
        name, value = pending.pop(0)
        _check_key(name, value, keys, where=where)
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


def check_missing(given: set[str], keys: Mapping[str, Key]) -> None:
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


def method_problem(methods: Sequence[str], there: Sequence[str]) -> str:
    if there:
        return f"the sections {' and '.join(there)} are given, and a run has one method: keep one of them"
    return f"no method is given: add one of the sections {', '.join(methods)} ({methods[0]}: {{}} for its defaults)"


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
