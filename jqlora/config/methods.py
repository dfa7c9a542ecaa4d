"""The settings of each method; ``method.name`` says whose are meant, ``lora`` by default."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from jqlora.config.kinds import STRICT, Count, NonNegative, Positive, PositiveFloat, Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The method: every field but ``name`` is one of ``jq.LoRA``."""

    __pydantic_config__ = STRICT

    name: Literal["lora"] = "lora"
    """Which method."""
    rank: Positive = 8
    """Rank r of the adapters."""
    alpha: PositiveFloat = 16
    """The adapters' output is scaled by alpha / r."""
    targets: str | tuple[str, ...] = "all-linear"
    """``all-linear``, a regular expression for the whole module name, or a list of its ends."""
    exclude: str | tuple[str, ...] = ()
    """Modules left out of the targets, written in the same ways."""
    dropout: Share = 0.0
    """Share of the adapters' inputs dropped in training."""
    rank_pattern: dict[str, Positive] = dataclasses.field(default_factory=dict)
    """Other ranks for modules by name or regular expression."""
    alpha_pattern: dict[str, PositiveFloat] = dataclasses.field(default_factory=dict)
    """Other alphas, likewise."""
    layers_to_transform: tuple[Count, ...] | None = None
    """Numbers of the layers to adapt; null is all."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(r) instead."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole, such as a new head."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the adapters are kept; bfloat16 is half the bytes, rounded stochastically."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How the first factor starts; the second starts at zero."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig:
    """LoRA whose rank is allotted to the modules while training (``jq.AdaLoRA`` and
    ``jq.optim.adalora``)."""

    __pydantic_config__ = STRICT

    name: Literal["adalora"] = "adalora"
    """Which method."""
    init_rank: Positive = 12
    """Rank of every adapted matrix at the start."""
    target_rank: Positive = 8
    """Their mean rank at the end."""
    target_total_rank: Positive | None = None
    """Instead of ``target_rank``: the sum of all ranks at the end."""
    alpha: PositiveFloat = 16
    """The adapters' output is scaled by alpha / init_rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """``all-linear``, a regular expression for the whole module name, or a list of its ends."""
    exclude: str | tuple[str, ...] = ()
    """Modules left out of the targets, written in the same ways."""
    dropout: Share = 0.0
    """Share of the adapters' inputs dropped in training."""
    layers_to_transform: tuple[Count, ...] | None = None
    """Numbers of the layers to adapt; null is all."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole, such as a new head."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the adapters are kept; bfloat16 is half the bytes, rounded stochastically."""
    orthogonality: Literal["peft", "paper"] = "peft"
    """Penalty on P and Q: the mean of the norms, or the sum of their squares."""
    orthogonality_weight: NonNegative = 0.5
    """Weight of that penalty beside the loss."""
    initial_steps: Count | None = None
    """Updates at full rank; null is a fifth of the run."""
    final_steps: Count | None = None
    """Updates at the final ranks; null is three tenths of the run."""
    interval: Positive = 10
    """Updates between two choices of what to prune."""
    betas: tuple[Share, Share] = (0.85, 0.85)
    """Decay rates of the importance and of its uncertainty."""
    convention: Literal["peft", "paper"] = "peft"
    """Whose definition of the importance, where the two differ."""
    save_as: Literal["adalora", "lora"] = "adalora"
    """Format of the result; ``lora`` for programs that know no AdaLoRA."""


METHODS: dict[str, type] = {"lora": LoRAConfig, "adalora": AdaLoRAConfig}


def _name_of(value: Any) -> str:
    name = value.get("name", "lora") if isinstance(value, dict) else getattr(value, "name", "lora")
    return str(name)


MethodConfig = Annotated[
    Annotated[LoRAConfig, Tag("lora")] | Annotated[AdaLoRAConfig, Tag("adalora")],
    Discriminator(_name_of),
]
"""The settings of one of the methods."""
