"""From the words of a config to the objects that they name."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax

from jqlora import optim
from jqlora.config import LoRAConfig, ModelConfig, QuantizeConfig, RunConfig, TrainConfig
from jqlora.data import Template
from jqlora.methods import LoRA
from jqlora.quant import BlockQuant
from jqlora.quant.schemes import SCHEMES


def quantization(config: QuantizeConfig | None) -> BlockQuant | None:
    """The storage spec, None for a base kept whole."""
    if config is None:
        return None
    return SCHEMES[config.scheme].spec(block=config.block, double_quant=config.double_quant)


def compute_dtype(config: ModelConfig) -> str:
    """The dtype's name; ``auto`` is float32 on a CPU, which has no fast bfloat16, else bfloat16."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def adapter_spec(config: LoRAConfig) -> LoRA:
    """The method's spec, as ``jq.plan`` takes it."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del fields["name"]
    return LoRA(**fields)


def schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """The learning rate at each update."""
    return optim.SCHEDULES[config.schedule](config.lr, steps=total_steps, warmup=config.warmup)


def optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW with the config's schedule, clipping and decay."""
    return optim.adamw(
        schedule(config, total_steps),
        betas=config.betas,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def template(config: RunConfig) -> Template:
    """How records become text."""
    return Template.parse(config.data.template)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with local paths made absolute, so that a run can be resumed from anywhere."""
    data = config.data
    sources = {name: _absolute(getattr(data, name)) for name in ("train", "heldout", "general")}
    style = data.template
    if style.endswith((".jinja", ".jinja2", ".j2")):
        style = _absolute(style)
    source = config.model.source
    if Path(source).expanduser().exists():
        source = _absolute(source)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, source=source),
        data=dataclasses.replace(data, **sources, template=style),
        output=dataclasses.replace(config.output, directory=_absolute(config.output.directory)),
    )


def _absolute(source: Any) -> Any:
    if source is None:
        return None
    if not isinstance(source, str):
        return tuple(map(_absolute, source))
    if source.startswith(("package:", "datasets:")):
        return source
    return str(Path(source).expanduser().absolute())
