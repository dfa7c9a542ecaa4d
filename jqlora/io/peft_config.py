"""``adapter_config.json``: a plan of LoRA or AdaLoRA in PEFT's words, with all the fields that
PEFT 0.21.2 writes.
"""

from collections.abc import Sequence
from typing import Any

from jqlora.errors import AdapterFileError
from jqlora.methods import AdaLoRA, LoRA, Placement, Plan
from jqlora.methods.base import items
from jqlora.methods.lora import ranks, scales
from jqlora.methods.targeting import matches

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
"""In front of every name in PEFT's files."""
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
}
"""PEFT's word for a model's task; it has none for masked language models."""

NEUTRAL: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
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

SCHEDULE = {"beta1": 0.85, "beta2": 0.85, "deltaT": 1, "tinit": 0, "tfinal": 0, "total_step": 1}
"""Written as AdaLoRA's schedule, which PEFT demands but which is no part of the result."""


def write_config(
    plan: Plan,
    modules: Sequence[str],
    *,
    task: str,
    base_model_name: str | None,
    tie_saved: bool,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` for a plan of LoRA or AdaLoRA.

    ``modules`` are the dotted names of all the model's modules that could be targeted;
    ``fan_in_fan_out`` says that adapted ones keep their weight (in, out), as Conv1D. PEFT knows
    one spec: several become one with patterns by full module name. Raises
    :class:`AdapterFileError` where they differ in what PEFT keeps once, and for other methods.
    """
    specs = tuple(dict.fromkeys(placement.spec for placement in plan.placements))
    first = specs[0]
    if len({type(spec) for spec in specs}) > 1:
        raise AdapterFileError("PEFT keeps one method, but the plan has LoRA and AdaLoRA")
    if isinstance(first, AdaLoRA):
        if len(specs) > 1:
            raise AdapterFileError(f"PEFT keeps one AdaLoRA spec, but the plan has {len(specs)}")
        fields = _adalora_fields(first, plan.placements, modules)
    elif isinstance(first, LoRA):
        fields = _lora_fields(specs, plan.placements, modules)
    else:
        raise AdapterFileError(f"{type(first).__name__} has no place in a PEFT LoRA adapter")
    saved = dict.fromkeys(end for spec in specs for end in spec.modules_to_save)
    return dict(
        sorted(
            {
                **NEUTRAL,
                "auto_mapping": None,
                "base_model_name_or_path": base_model_name,
                "ensure_weight_tying": tie_saved,
                "fan_in_fan_out": fan_in_fan_out,
                "inference_mode": True,
                "layers_pattern": None,
                "lora_alpha": first.alpha,
                "lora_dropout": first.dropout,
                "megatron_core": "megatron.core",
                "modules_to_save": list(saved) or None,
                "peft_version": "0.21.2",
                "qalora_group_size": 16,
                "revision": None,
                "task_type": TASK_TYPES.get(task),
                **fields,
            }.items()
        )
    )


def _lora_fields(
    specs: Sequence[LoRA], placements: Sequence[Placement], modules: Sequence[str]
) -> dict[str, Any]:
    first = specs[0]
    fields = {
        "init_lora_weights": "gaussian" if first.init == "gaussian" else True,
        "peft_type": "LORA",
        "r": first.rank,
        "use_rslora": first.rank_stabilized,
        "rank_pattern": dict(items(first.rank_pattern)),
        "alpha_pattern": dict(items(first.alpha_pattern)),
        **_targeting(first, placements, modules),
    }
    if len(specs) > 1:
        for field in ("dropout", "rank_stabilized", "init"):
            if len(values := {getattr(spec, field) for spec in specs}) > 1:
                raise AdapterFileError(f"PEFT keeps one {field}, but the plan has {values}")
        fields |= _resolved(first, placements, modules)
    return fields


def _adalora_fields(
    spec: AdaLoRA, placements: Sequence[Placement], modules: Sequence[str]
) -> dict[str, Any]:
    pattern = {f"{name}.lora_E": list(kept) for name, kept in items(spec.rank_pattern)}
    return {
        **SCHEDULE,
        "alpha_pattern": {},
        "init_lora_weights": True,
        "init_r": spec.init_rank,
        "orth_reg_weight": spec.orthogonality_weight if spec.orthogonality == "peft" else 0.0,
        "peft_type": "ADALORA",
        "r": 8,  # PEFT's default, which AdaLoRA ignores and warns of if it is another
        "rank_pattern": pattern or None,
        "target_r": spec.target_rank,
        "use_rslora": False,
        **_targeting(spec, placements, modules),
    }


def _targeting(
    spec: LoRA | AdaLoRA, placements: Sequence[Placement], modules: Sequence[str]
) -> dict[str, Any]:
    """Targeting in the spec's own words where they are names, in resolved names otherwise.

    A regular expression may match containers in torch that are no sites here, and PEFT refuses it
    then.
    """
    if isinstance(spec.targets, str):
        return _targets(placements, modules)
    layers = numbers(spec.layers_to_transform)
    return {
        "target_modules": list(spec.targets),
        "exclude_modules": spec.exclude
        if isinstance(spec.exclude, str)
        else [*spec.exclude] or None,
        "layers_to_transform": None if layers is None else list(layers),
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


def numbers(layers: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """PEFT takes one number, a list, or for all layers null or an empty list."""
    return (layers,) if isinstance(layers, int) else tuple(layers or ()) or None
