"""From YAML files and overrides to a config, and back.

``read_config(["base.yaml", "rank64.yaml"], ["train.lr=1e-4"])`` lays the files over each other in
order, the overrides on top. Each error names where the value came from, its dotted key, the value,
and what is accepted.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pydantic
import yaml

from jqlora.config import yaml_1_2
from jqlora.config.methods import METHODS
from jqlora.config.schema import RunConfig
from jqlora.errors import ConfigError
from jqlora.tree import nearest

Key = tuple[str, ...]
COMMAND_LINE = "command line"


def read_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """The config that the files and ``dotted.key=value`` overrides describe; values are YAML.

    Raises ConfigError for a file that cannot be read, unknown or missing keys, wrong types, and
    values that contradict each other; all that are found, in one line.
    """
    tree: dict[str, Any] = {}
    origins: dict[Key, str] = {}
    for file in files:
        layer = _read_file(Path(file))
        _overlay(tree, layer)
        origins.update((key, str(file)) for key, _ in _walk(layer))
    for override in overrides:
        key, value = _parse_override(override)
        _overlay(tree, _nested(key, value))
        origins[key] = f"{COMMAND_LINE} ({override})"
    everywhere = " ".join([*map(str, files), *overrides])
    return _validate(tree, origins, default_origin=everywhere)


def dump_config(config: RunConfig) -> str:
    """The config as YAML that :func:`read_config` reads back to an equal one."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def known_keys(section: type = RunConfig, prefix: Key = ()) -> dict[str, str]:
    """Every setting by its dotted key, with the name of its type, in order; of all methods."""
    known: dict[str, str] = {}
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        inner = _sections_of(hints[field.name])
        if not inner:
            known[".".join((*prefix, field.name))] = str(field.type)
        for one in inner:
            known |= known_keys(one, (*prefix, field.name))
    return known


def _read_file(path: Path) -> dict[str, Any]:
    try:
        found = yaml_1_2.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_yaml_reason(error)}") from error
    if not isinstance(found, dict):
        kind = "empty" if found is None else f"a {type(found).__name__}"
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'train:'; it is {kind}")
    return found


def _yaml_reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f":{error.problem_mark.line + 1}: {error.problem}"
    return f": {error}"


def _parse_override(text: str) -> tuple[Key, Any]:
    name, equals, value = text.partition("=")
    if not equals or not all(name.split(".")):
        raise ConfigError(f"{COMMAND_LINE}: {text!r} is not of the form section.key=value")
    try:
        return tuple(name.split(".")), yaml_1_2.parse(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{COMMAND_LINE} ({text}){_yaml_reason(error)}") from error


def _nested(key: Key, value: Any) -> dict[str, Any]:
    for name in reversed(key):
        value = {name: value}
    return value


def _overlay(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Lay ``above`` over ``below``: sections are joined, anything else is replaced, and so is a
    section that ``above`` calls by another name, as the settings of two methods differ."""
    for name, value in above.items():
        joined = isinstance(value, Mapping) and isinstance(below.get(name), dict)
        if joined and value.get("name") in (None, below[name].get("name", "lora")):
            _overlay(below[name], value)
        else:
            below[name] = value


def _walk(tree: Mapping[str, Any], prefix: Key = ()) -> Iterator[tuple[Key, Any]]:
    for name, value in tree.items():
        key = (*prefix, str(name))
        yield key, value
        if isinstance(value, Mapping):
            yield from _walk(value, key)


def _validate(tree: Any, origins: Mapping[Key, str], *, default_origin: str) -> RunConfig:
    adapter = pydantic.TypeAdapter(RunConfig)
    try:
        # through JSON, whose strict mode takes lists for tuples and mappings for dataclasses
        return adapter.validate_json(json.dumps(tree))
    except pydantic.ValidationError as error:
        problems: dict[str, list[str]] = {}
        for item in error.errors(include_url=False):
            location, method = _without_tag(item["loc"])
            key, inside = _split_location(location, method)
            whole = item["type"] == "value_error"  # a section's values contradict each other
            origin = default_origin if whole else _origin(key, origins) or default_origin
            subject, reason = _explain(item, key, inside, _value_at(tree, key), method)
            problems.setdefault(f"{origin}: {subject}", []).append(reason)
        lines = [f"{head}{' or '.join(dict.fromkeys(tails))}" for head, tails in problems.items()]
        raise ConfigError("; ".join(lines)) from error


def _explain(item: Any, key: Key, inside: bool, value: Any, method: type | None) -> tuple[str, str]:
    """What is wrong, and why, of one of pydantic's errors; ``inside`` a value, not a setting.

    ``method`` is the section of the method that the error is in, if it is in one.
    """
    kind, message, dotted = item["type"], item["msg"], ".".join(key)
    if kind == "value_error":
        return "", message.removeprefix("Value error, ")
    if kind == "unexpected_keyword_argument":
        return dotted, f" is not a setting; nearest: {', '.join(_suggest(key, method))}"
    if kind == "union_tag_invalid":
        return (
            f"{dotted}.name={item['ctx']['tag']!r} ",
            f"should be {' or '.join(map(repr, METHODS))}",
        )
    if kind == "dataclass_type":
        return dotted, f" should be a section with its own keys, not {_shown(value)}"
    if kind == "missing" and not inside:
        return dotted, " is missing"
    reason = "has too few items" if kind == "missing" else message.removeprefix("Input ")
    return f"{dotted}={_shown(value)} ", reason[0].lower() + reason[1:]


def _suggest(key: Key, method: type | None) -> list[str]:
    """Names like the one that is unknown: in its section first, then as the end of any key."""
    names = list(known_keys())
    if method is not None:
        names = [n for n in names if not n.startswith("method.")] + list(
            known_keys(method, key[:1])
        )
    if len(key) == 1 and not any(name.endswith(f".{key[0]}") for name in names):
        return list(dict.fromkeys(name.split(".")[0] for name in names))
    section = [name for name in names if name.startswith(".".join(key[:-1]))]
    ends = [name for name in names if name.rsplit(".", 1)[-1] == key[-1]]
    return ends[:2] or nearest(".".join(key), section) or nearest(".".join(key), names) or section


def _split_location(location: tuple[Any, ...], method: type | None) -> tuple[Key, bool]:
    """Pydantic's location as the key of a setting, and whether it goes on inside its value."""
    section: type | None = RunConfig
    for at, part in enumerate(location):
        if section is None:
            return tuple(map(str, location[:at])), True
        inner = _sections_of(get_type_hints(section).get(str(part)))
        section = method if method in inner else next(iter(inner), None)
    return tuple(map(str, location)), False


def _without_tag(location: tuple[Any, ...]) -> tuple[tuple[Any, ...], type | None]:
    """The location without the method's name, which pydantic puts in it, and its section."""
    if len(location) > 1 and location[0] == "method" and location[1] in METHODS:
        return (location[0], *location[2:]), METHODS[location[1]]
    return location, None


def _value_at(tree: Any, key: Key) -> Any:
    for name in key:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _sections_of(annotation: Any) -> list[type]:
    """The dataclasses that an annotation names, alone, or-ed with None or with each other."""
    candidates = (annotation, *get_args(annotation))
    return [c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)]


def _origin(key: Key, origins: Mapping[Key, str]) -> str | None:
    for length in range(len(key), 0, -1):
        if key[:length] in origins:
            return origins[key[:length]]
    return next((origins[longer] for longer in origins if longer[: len(key)] == key), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
