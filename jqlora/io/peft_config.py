"""``adapter_config.json``: a LoRA spec in PEFT's words, both ways.

Written are all fields that PEFT 0.21.2 writes. Read is any file of its LoRA method; a field that
would change the computation in a way that is not supported is refused by name, fields that only
say how training started or where the base came from are passed over.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jqlora.errors import AdapterFileError
from jqlora.methods import LoRA, Placement, Plan
from jqlora.methods.base import items
from jqlora.methods.lora import ranks, scales
from jqlora.methods.targeting import ALL_LINEAR, layer_number, matches, pattern_matches

CONFIG_FILE = "adapter_config.json"

NEUTRAL: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "fan_in_fan_out": False,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
"""Fields of features that are not supported, with the value that leaves them off."""

IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # these three only draw the first weights; see init_lora_weights
    "eva_config",
    "lora_ga_config",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
UNDERSTOOD = {
    "alpha_pattern",
    "ensure_weight_tying",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations after which the base model's own weights still hold; the others change them."""


def write_config(
    plan: Plan, modules: Sequence[str], *, base_model_name: str | None, tie_saved: bool
) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` for a plan of LoRA specs.

    ``modules`` are the dotted names of all the model's modules that could be targeted. PEFT knows
    one spec: several become one with patterns by full module name. Raises
    :class:`AdapterFileError` where they differ in what PEFT keeps once, and for other methods.
    """
    specs = tuple(dict.fromkeys(placement.spec for placement in plan.placements))
    if other := [spec for spec in specs if not isinstance(spec, LoRA)]:
        raise AdapterFileError(f"{type(other[0]).__name__} has no place in a PEFT LoRA adapter")
    first = specs[0]
    fields = _fields(first, plan.placements, modules)
    if len(specs) > 1:
        for field in ("dropout", "rank_stabilized", "init"):
            if len(values := {getattr(spec, field) for spec in specs}) > 1:
                raise AdapterFileError(f"PEFT keeps one {field}, but the plan has {values}")
        fields |= _resolved(first, plan.placements, modules)
    saved = dict.fromkeys(end for spec in specs for end in spec.modules_to_save)
    return dict(
        sorted(
            {
                **NEUTRAL,
                "auto_mapping": None,
                "base_model_name_or_path": base_model_name,
                "ensure_weight_tying": tie_saved,
                "inference_mode": True,
                "init_lora_weights": "gaussian" if first.init == "gaussian" else True,
                "layers_pattern": None,
                "lora_alpha": first.alpha,
                "lora_dropout": first.dropout,
                "megatron_core": "megatron.core",
                "modules_to_save": list(saved) or None,
                "peft_type": "LORA",
                "peft_version": "0.21.2",
                "qalora_group_size": 16,
                "r": first.rank,
                "revision": None,
                "task_type": "CAUSAL_LM",
                "use_rslora": first.rank_stabilized,
                **fields,
            }.items()
        )
    )


def _fields(spec: LoRA, placements: Sequence[Placement], modules: Sequence[str]) -> dict[str, Any]:
    """Targeting in the spec's own words where they are names, in resolved names otherwise.

    A regular expression may match containers in torch that are no sites here, and PEFT refuses it
    then.
    """
    patterns = {
        "rank_pattern": dict(items(spec.rank_pattern)),
        "alpha_pattern": dict(items(spec.alpha_pattern)),
    }
    if isinstance(spec.targets, str):
        return _targets(placements, modules) | patterns
    layers = _numbers(spec.layers_to_transform)
    return {
        "target_modules": list(spec.targets),
        "exclude_modules": spec.exclude
        if isinstance(spec.exclude, str)
        else [*spec.exclude] or None,
        "layers_to_transform": None if layers is None else list(layers),
        **patterns,
    }


def _targets(placements: Sequence[Placement], modules: Sequence[str]) -> dict[str, Any]:
    """The adapted modules by their last names if these say it all, by full names otherwise."""
    adapted = {name for placement in placements for name in placement.names}
    ends = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    exact = {name for name in modules if matches(ends, name)} == adapted
    return {
        "target_modules": ends if exact else sorted(adapted),
        "exclude_modules": None,
        "layers_to_transform": None,
    }


def _resolved(
    first: LoRA, placements: Sequence[Placement], modules: Sequence[str]
) -> dict[str, Any]:
    """Every module by its full name, with its rank and alpha where they are not the first
    spec's."""
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for placement in placements:
        layers = zip(placement.site.names, ranks(placement), scales(placement), strict=True)
        for name, rank, scale in layers:
            alpha = scale * (rank**0.5 if first.rank_stabilized else rank)
            if rank and rank != first.rank:
                rank_pattern[name] = rank
            if rank and alpha != first.alpha:
                alpha_pattern[name] = alpha
    patterns = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    return _targets(placements, modules) | patterns


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``adapter_config.json``, with nothing in it that is not supported.

    Raises :class:`AdapterFileError` naming the field, its value and what is accepted.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise AdapterFileError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise AdapterFileError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"{path} is no JSON object")

    def refuse(field: str, accepted: str) -> None:
        raise AdapterFileError(f"{path}: {field}={config.get(field)!r}; accepted: {accepted}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA'")
    if not config.get("target_modules"):
        refuse("target_modules", "names of modules, or a regular expression")
    for field, value in config.items():
        if field in UNDERSTOOD or field in IGNORED:
            continue
        if value != NEUTRAL.get(field) and value:
            refuse(field, f"{NEUTRAL.get(field)!r} only, as the feature is not supported")
    if config.get("init_lora_weights", True) not in KEEPS_BASE:
        refuse(
            "init_lora_weights",
            f"{KEEPS_BASE}; others change the base weights too: save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion first",
        )
    return config


def read_spec(config: Mapping[str, Any], names: Sequence[str], saved_names: Sequence[str]) -> LoRA:
    """The spec that ``config`` means on a model whose sites have these dotted ``names``.

    PEFT lets names that match nothing pass, so they are left out here; ``saved_names`` are those
    of all modules, for ``modules_to_save``.
    """
    targets = config["target_modules"]
    exclude = config.get("exclude_modules") or ()
    layers = _numbers(config.get("layers_to_transform"))
    if isinstance(targets, str):
        targets = ALL_LINEAR if targets.lower() == ALL_LINEAR else targets
    else:
        targets = [t for t in targets if any(matches((t,), name) for name in names)]
        if config.get("layers_pattern") and layers:
            targets, layers = _by_layers_pattern(config, targets, layers, names), None
    if not targets:
        raise AdapterFileError(
            f"target_modules={config['target_modules']!r} name no module of this model"
        )
    if layers is not None:
        known = {layer_number(name) for name in names}
        layers = tuple(layer for layer in layers if layer in known)
    if not isinstance(exclude, str):
        exclude = [e for e in exclude if any(matches((e,), name) for name in names)]
    elif not any(matches(exclude, name) for name in names):
        exclude = ()
    patterns = {
        field: {
            key: value
            for key, value in (config.get(field) or {}).items()
            if any(pattern_matches(key, name) for name in names)
        }
        for field in ("rank_pattern", "alpha_pattern")
    }
    saved = config.get("modules_to_save") or ()
    return LoRA(
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        targets=targets,
        exclude=exclude,
        dropout=config.get("lora_dropout", 0.0),
        layers_to_transform=layers,
        rank_stabilized=bool(config.get("use_rslora")),
        modules_to_save=[s for s in saved if any(name.endswith(s) for name in saved_names)],
        init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        **patterns,
    )


def _numbers(layers: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """PEFT takes one number, a list, or for all layers null or an empty list."""
    return (layers,) if isinstance(layers, int) else tuple(layers or ()) or None


def _by_layers_pattern(
    config: Mapping[str, Any], targets: Sequence[str], layers: Sequence[int], names: Sequence[str]
) -> list[str]:
    """Full names of the targets in those layers whose number follows ``layers_pattern``."""
    patterns = config["layers_pattern"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    wanted = [f".{pattern}.{layer}." for pattern in patterns for layer in layers]
    return [
        name
        for name in names
        if matches(targets, name) and any(part in f".{name}" for part in wanted)
    ]
