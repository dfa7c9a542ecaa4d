"""From the words of a config to the objects that they name."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from jqlora import optim
from jqlora.config import (
    AdaLoRAConfig,
    MethodConfig,
    ModelConfig,
    QuantizeConfig,
    RunConfig,
    TrainConfig,
)
from jqlora.data import Template
from jqlora.methods import AdaLoRA, LoRA, Plan
from jqlora.quant import BlockQuant
from jqlora.quant.schemes import SCHEMES
from jqlora.run.keeping import AUTO, OFF


def quantization(config: QuantizeConfig | None) -> BlockQuant | None:
    """The storage spec, None for a base kept whole."""
    if config is None:
        return None
    return SCHEMES[config.scheme](block=config.block, double_quant=config.double_quant)


def compute_dtype(config: ModelConfig) -> str:
    """The dtype's name; ``auto`` is float32 on a CPU, which has no fast bfloat16, else bfloat16."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def adapter_spec(config: MethodConfig) -> LoRA | AdaLoRA:
    """The method's spec, as ``jq.plan`` takes it."""
    kind = AdaLoRA if isinstance(config, AdaLoRAConfig) else LoRA
    known = {field.name for field in dataclasses.fields(kind)}
    given = (field.name for field in dataclasses.fields(config))
    return kind(**{name: getattr(config, name) for name in given if name in known})


def rank_schedule(config: AdaLoRAConfig, total_steps: int) -> dict[str, Any]:
    """The arguments of ``jq.optim.adalora`` and its budget that the config's words mean."""
    initial, final = config.initial_steps, config.final_steps
    return {
        "total_steps": total_steps,
        "initial_steps": total_steps // 5 if initial is None else initial,
        "final_steps": 3 * total_steps // 10 if final is None else final,
        "interval": config.interval,
        "target_total_rank": config.target_total_rank,
    }


def schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """The learning rate at each update."""
    return optim.SCHEDULES[config.schedule](config.lr, steps=total_steps, warmup=config.warmup)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optim.adamw,
    "adamw16bit": functools.partial(optim.adamw, bits=16),
    "adamw8bit": functools.partial(optim.adamw, bits=8),
    "lion": optim.lion,
    "lion16bit": functools.partial(optim.lion, bits=16),
    "lion8bit": functools.partial(optim.lion, bits=8),
    "sgd": optim.sgd,
    "adafactor": optim.adafactor,
}


def optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """The config's optimizer with its schedule, clipping and decay."""
    given: dict[str, Any] = {} if config.betas is None else {"betas": config.betas}
    if config.offload != "none":
        given["offload"] = config.offload
    tx = OPTIMIZERS[config.optimizer](
        schedule(config, total_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        **given,
    )
    if config.freeze_a:
        tx = optim.lora_fa(tx)
    if config.lora_plus_ratio is not None:
        tx = optim.lora_plus(tx, config.lora_plus_ratio)
    return tx


def optimizer_of(config: RunConfig, plan: Plan, total_steps: int) -> optax.GradientTransformation:
    """The optimizer, with AdaLoRA's allocation around it where that is the method.

    As in PEFT, its convention measures importance by the clipped gradients that a trainer leaves.
    """
    train, method = config.train, config.method
    if not isinstance(method, AdaLoRAConfig):
        return optimizer(train, total_steps)
    ranks = rank_schedule(method, total_steps)
    ranks |= {name: getattr(method, name) for name in ("betas", "convention")}
    ranks["offload"] = train.offload
    if method.convention == "paper" or train.max_grad_norm is None:
        return optim.adalora(optimizer(train, total_steps), plan, **ranks)
    unclipped = dataclasses.replace(train, max_grad_norm=None)
    return optax.chain(
        optim.clipped(train.max_grad_norm),
        optim.adalora(optimizer(unclipped, total_steps), plan, **ranks),
    )


def template(config: RunConfig) -> Template:
    """How records become text."""
    return Template.parse(config.data.template)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with local paths made absolute, so that a run can be resumed from anywhere."""
    data = config.data
    names = ("train", "heldout", "general", "validation")
    sources = {name: _absolute(getattr(data, name)) for name in names}
    style = data.template
    if style.endswith((".jinja", ".jinja2", ".j2")):
        style = _absolute(style)
    source, cache = config.model.source, config.model.cache
    if Path(source).expanduser().exists():
        source = _absolute(source)
    if cache not in (AUTO, OFF):
        cache = _absolute(cache)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, source=source, cache=cache),
        data=dataclasses.replace(data, **sources, template=style),
        output=dataclasses.replace(config.output, directory=_absolute(config.output.directory)),
    )


def _absolute(source: Any) -> Any:
    if source is None:
        return None
    if isinstance(source, dict):
        return {name: _absolute(one) for name, one in source.items()}
    if not isinstance(source, str):
        return tuple(map(_absolute, source))
    if source.startswith(("package:", "datasets:")):
        return source
    return str(Path(source).expanduser().absolute())
