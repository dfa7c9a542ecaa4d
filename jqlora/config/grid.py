"""Grids of runs: every combination of the values that some settings take.

``expand(["demo.yaml"], [], ["train.lr=1e-4,2e-4", "method.rank=8,16"])`` gives four configs. They
are for one program, that trains all of them at once, so that only what belongs to an adapter and
its optimizer may vary: the base, the batches and the number of steps are shared.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jqlora.config import yaml_1_2
from jqlora.config.reading import known_keys, read_config
from jqlora.config.schema import RunConfig
from jqlora.errors import ConfigError
from jqlora.tree import nearest

OF_THE_OPTIMIZER = (
    "lr",
    "schedule",
    "warmup",
    "optimizer",
    "betas",
    "lora_plus_ratio",
    "freeze_a",
    "weight_decay",
    "max_grad_norm",
    "seed",
)
SHARED_OF_METHODS = ("method.modules_to_save", "method.dtype")


@dataclasses.dataclass(frozen=True)
class Grid:
    """What varies, the members by name, and the first of them, which has all that they share."""

    vary: dict[str, list[Any]]
    base: RunConfig
    members: dict[str, RunConfig]
    values: dict[str, dict[str, Any]]
    """Of each member, the settings in which it differs."""


def expand(files: Sequence[str | Path], overrides: Sequence[str], vary: Sequence[str]) -> Grid:
    """All combinations of ``KEY=VALUE,VALUE,...`` words, the last key's values changing fastest.

    Values are YAML: ``train.betas=[0.9,0.99],[0.9,0.999]`` are two. Raises ConfigError for what
    :func:`~jqlora.config.read_config` refuses, and for what cannot differ between members.
    """
    varied: dict[str, list[Any]] = {}
    for word in vary:
        key, values = _parse(word)
        if key in varied:
            raise ConfigError(f"--vary {word}: {key} is varied twice; give all its values at once")
        varied[key] = values
    if not varied:
        raise ConfigError("nothing varies: give --vary KEY=VALUE,VALUE,...")
    names = _short(varied)
    members: dict[str, RunConfig] = {}
    settings: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*varied.values()):
        own = dict(zip(varied, values, strict=True))
        name = "_".join(f"{names[key]}-{_word(value)}" for key, value in own.items())
        if name in members:
            raise ConfigError(f"--vary {' '.join(vary)}: {name} is there twice")
        words = [f"{key}={json.dumps(value)}" for key, value in own.items()]
        members[name], settings[name] = read_config(files, [*overrides, *words]), own
    base = next(iter(members.values()))
    _check(varied, base)
    return Grid(varied, base, members, settings)


def can_vary() -> tuple[str, ...]:
    """The keys of which members may have different values."""
    keys = {f"train.{name}" for name in OF_THE_OPTIMIZER}
    of_methods = {key for key in known_keys() if key.startswith("method.")}
    return tuple(key for key in known_keys() if key in keys | of_methods - {*SHARED_OF_METHODS})


def _parse(word: str) -> tuple[str, list[Any]]:
    key, equals, text = word.partition("=")
    if not equals or not text.strip():
        raise ConfigError(f"--vary {word}: give KEY=VALUE,VALUE,... such as train.lr=1e-4,2e-4")
    if key not in known_keys():
        close = ", ".join(nearest(key, can_vary()))
        raise ConfigError(f"--vary {word}: {key} is not a setting; nearest: {close}")
    if key not in can_vary():
        raise ConfigError(
            f"--vary {word}: {key} cannot differ within a sweep, whose members share the base, the "
            f"batches and the steps of one program; {', '.join(can_vary())} can. Make a sweep for "
            f"each {key}"
        )
    try:
        values = yaml_1_2.parse(f"[{text}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"--vary {word}: the values are not YAML: {error}") from error
    return key, values


def _check(varied: dict[str, list[Any]], config: RunConfig) -> None:
    """Raise ConfigError for configs that do not go together though each is sound."""
    if "train.seed" not in varied or config.data.seed is not None:
        return
    why = None
    if config.data.heldout_share is not None:
        why = "data.heldout_share holds out other records for each, whose losses do not compare"
    if config.data.task is not None:
        why = (
            f"data.task={config.data.task!r} draws a head and pads its batches by the seed, and "
            "members share both"
        )
    if why is not None:
        raise ConfigError(f"--vary train.seed: {why}; give all one data.seed, such as data.seed=0")


def _short(keys: Sequence[str] | dict[str, Any]) -> dict[str, str]:
    """The last part of each key, or all of it where two end alike."""
    ends = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _word(value: Any) -> str:
    """A value in the name of a directory."""
    if isinstance(value, list | tuple):
        return "+".join(map(_word, value))
    text = f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-") or "none"
