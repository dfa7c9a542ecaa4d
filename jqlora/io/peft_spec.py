"""``adapter_config.json`` of PEFT read back as a spec.

Read is any file of PEFT's LoRA and AdaLoRA; a field that would change the computation in a way that
is not supported is refused by name, fields that only say how training started or where the base
came from are passed over.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jqlora.errors import AdapterFileError
from jqlora.io.peft_config import CONFIG_FILE, NEUTRAL, numbers
from jqlora.methods import AdaLoRA, LoRA
from jqlora.methods.targeting import ALL_LINEAR, layer_number, matches, pattern_matches

IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # these three only draw the first weights; see init_lora_weights
    "eva_config",
    "lora_ga_config",
    "fan_in_fan_out",  # follows from the module, as PEFT itself corrects it
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
ADALORA = {
    "beta1",
    "beta2",
    "deltaT",
    "init_r",
    "orth_reg_weight",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
}
"""Fields that only an AdaLoRA file has."""
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations after which the base model's own weights still hold; the others change them."""


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

    if config.get("peft_type") not in ("LORA", "ADALORA"):
        refuse("peft_type", "'LORA' or 'ADALORA'")
    understood = UNDERSTOOD | (ADALORA if config["peft_type"] == "ADALORA" else set())
    if not config.get("target_modules"):
        refuse("target_modules", "names of modules, or a regular expression")
    for field, value in config.items():
        if field in understood or field in IGNORED:
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


def read_spec(
    config: Mapping[str, Any], names: Sequence[str], saved_names: Sequence[str]
) -> LoRA | AdaLoRA:
    """The spec that ``config`` means on a model whose sites have these dotted ``names``.

    PEFT lets names that match nothing pass, so they are left out here; ``saved_names`` are those
    of all modules, for ``modules_to_save``.
    """
    targets = config["target_modules"]
    exclude = config.get("exclude_modules") or ()
    layers = numbers(config.get("layers_to_transform"))
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
    saved = config.get("modules_to_save") or ()
    where: dict[str, Any] = {
        "targets": targets,
        "exclude": exclude,
        "layers_to_transform": layers,
        "dropout": config.get("lora_dropout", 0.0),
        "modules_to_save": [s for s in saved if any(name.endswith(s) for name in saved_names)],
    }
    if config["peft_type"] == "ADALORA":
        return _read_adalora(config, where)
    patterns: dict[str, Any] = {
        field: {
            key: value
            for key, value in (config.get(field) or {}).items()
            if any(pattern_matches(key, name) for name in names)
        }
        for field in ("rank_pattern", "alpha_pattern")
    }
    return LoRA(
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        rank_stabilized=bool(config.get("use_rslora")),
        init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        **where,
        **patterns,
    )


def _read_adalora(config: Mapping[str, Any], where: Mapping[str, Any]) -> AdaLoRA:
    init_rank, alpha = config.get("init_r", 12), config.get("lora_alpha", 8)
    return AdaLoRA(
        init_rank=init_rank,
        # PEFT lets a target exceed the start; it plays no part in what the adapter computes
        target_rank=min(config.get("target_r", 8), init_rank),
        alpha=alpha if alpha > 0 else float(init_rank),
        orthogonality="peft",
        orthogonality_weight=config.get("orth_reg_weight", 0.5),
        rank_pattern={
            key.partition(".lora_E")[0]: kept
            for key, kept in (config.get("rank_pattern") or {}).items()
        },
        **where,
    )


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
