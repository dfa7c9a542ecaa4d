"""Which architectures can be loaded: a row for each, of how its config is read, its module built
and its tensors named.

A new architecture is a row here and, if its mathematics is new, one file with its module.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.errors import CheckpointError
from jqlora.models.bart import BartForTask, build_bart
from jqlora.models.bart_config import BartConfig
from jqlora.models.config import LlamaConfig
from jqlora.models.encoder_config import KINDS as ENCODERS
from jqlora.models.encoder_config import EncoderConfig
from jqlora.models.encoder_model import EncoderForTask, build_encoder
from jqlora.models.gpt2 import GPT2LMHeadModel
from jqlora.models.gpt2_config import GPT2Config
from jqlora.models.kinds import KINDS
from jqlora.models.llama import LlamaForCausalLM
from jqlora.models.names import HFName, Naming
from jqlora.models.t5_config import PREFIXES as T5_PREFIXES
from jqlora.models.t5_config import T5Config
from jqlora.models.t5_model import INSIDE, T5ForTask, build_t5
from jqlora.models.tasks import GENERATING


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture and its heads.

    ``heads`` are the classes of transformers and the task of each; ``bare`` are its classes
    without a head. ``parse`` makes a configuration of config.json and
    ``build(config, task=..., dtype=..., **options)`` the module, whose ``config`` and ``task`` are
    those it was built with. ``namings`` are for the tasks whose checkpoints do not follow
    ``naming``.
    """

    name: str
    model_types: tuple[str, ...]
    heads: Mapping[str, str]
    parse: Callable[[Mapping[str, Any]], Any]
    build: Callable[..., nn.Module]
    naming: Naming
    module: type[nn.Module]
    bare: tuple[str, ...] = ()
    namings: Mapping[str, Naming] = field(default_factory=dict)

    def naming_for(self, task: str) -> Naming:
        """How the checkpoints of the class with the head for ``task`` call their tensors."""
        return self.namings.get(task, self.naming)

    def hf_names(self, model: Any) -> list[HFName]:
        """Every tensor of the model's checkpoint, in the order of a file."""
        return self.naming_for(model.task).tensors(abstract_params(model))

    def task(self, hf_config: Mapping[str, Any]) -> str | None:
        """What the checkpoint of a config.json was made for, which is to write where it does not
        say and the family can; None if no head that is known."""
        named = hf_config.get("architectures")
        if not named:
            return next((task for task in self.heads.values() if task in GENERATING), None)
        return next((self.heads[name] for name in named if name in self.heads), None)

    def architecture(self, task: str) -> str:
        """The class of transformers with the head for ``task``."""
        return next(name for name, serves in self.heads.items() if serves == task)


def abstract_params(model: Any) -> dict[str, Any]:
    """Shapes and dtypes of the model's parameters, nothing allocated."""
    return jax.tree.map(lambda leaf: leaf, _traced(model))  # a tree of the caller's own


@functools.lru_cache(maxsize=4)
def _traced(model: Any) -> dict[str, Any]:
    """Names and layout of a checkpoint each ask for the shapes, and a start lays out several."""
    variables = jax.eval_shape(
        lambda inputs: model.init(jax.random.key(0), **inputs), model.example_inputs()
    )
    return variables["params"]


def _one_task(module: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """How a module is built that serves one task only."""

    def build(
        config: Any, task: str | None = None, dtype: Any = jnp.float32, **options: Any
    ) -> nn.Module:
        return module(config, **{"dtype": dtype, "param_dtype": dtype, **options})

    return build


_LLAMA_NAMING = Naming(
    stacks=("model.layers",),
    base="model",
    ties=(("lm_head.weight", "model.embed_tokens.weight"),),
    ignored=(r"rotary_emb\.inv_freq$",),
)


def _llama_family(name: str) -> Family:
    return Family(
        name=name,
        model_types=(name,),
        heads={KINDS[name].architecture: "causal-lm"},
        parse=LlamaConfig.from_hf,
        build=_one_task(LlamaForCausalLM),
        naming=_LLAMA_NAMING,
        module=LlamaForCausalLM,
    )


_GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    heads={"GPT2LMHeadModel": "causal-lm"},
    bare=("GPT2Model",),
    parse=GPT2Config.from_hf,
    build=_one_task(GPT2LMHeadModel),
    naming=Naming(
        stacks=("transformer.h",),
        base="transformer",
        in_out=("c_attn", "c_proj", "c_fc"),
        ties=(("lm_head.weight", "transformer.wte.weight"),),
        ignored=(r"\.attn\.(bias|masked_bias)$",),
    ),
    module=GPT2LMHeadModel,
)


def _encoder_family(model_type: str, prefix: str, head: tuple[str, str], **naming: Any) -> Family:
    """An encoder whose classes in transformers begin with ``prefix``.

    ``head`` is the module of the masked-LM head that has the bias, and that which files may repeat
    the embedding and the bias in.
    """
    base = ENCODERS[model_type].base
    bias, decoder = head
    return Family(
        name=model_type,
        model_types=(model_type,),
        heads={
            f"{prefix}ForMaskedLM": "masked-lm",
            f"{prefix}ForSequenceClassification": "sequence-classification",
            f"{prefix}ForTokenClassification": "token-classification",
            f"{prefix}ForQuestionAnswering": "question-answering",
        },
        bare=(f"{prefix}Model",),
        parse=EncoderConfig.from_hf,
        build=build_encoder,
        naming=Naming(
            stacks=(f"{base}.encoder.layer",),
            base=base,
            optional=(f"{base}.pooler",),
            ties=(
                (f"{decoder}.weight", f"{base}.embeddings.word_embeddings.weight"),
                (f"{decoder}.bias", f"{bias}.bias"),
            ),
            ignored=(r"embeddings\.position_ids$", *naming.get("ignored", ())),
        ),
        module=EncoderForTask,
    )


def _t5_naming(base: str, optional: tuple[str, ...] = (), **naming: Any) -> Naming:
    inside = f"{base}." if base else ""
    table = "SelfAttention.relative_attention_bias.weight"
    shared = f"{inside}shared.weight"
    stacks = tuple(f"{inside}{side}coder" for side in ("en", "de"))
    return Naming(
        base=base,
        stacks=tuple(f"{stack}.block" for stack in stacks),
        optional=optional,
        renames={
            f"{stack}.relative_attention_bias.weight": f"{stack}.block.0.layer.0.{table}"
            for stack in stacks
        },
        ties=(
            ("lm_head.weight", shared),
            *((f"{stack}.embed_tokens.weight", shared) for stack in stacks),
        ),
        ignored=(r"EncDecAttention\.relative_attention_bias\.weight$",),
        **naming,
    )


def _t5_family(model_type: str) -> Family:
    prefix = T5_PREFIXES[model_type]
    return Family(
        name=model_type,
        model_types=(model_type,),
        heads={
            f"{prefix}ForConditionalGeneration": "seq2seq-lm",
            f"{prefix}ForSequenceClassification": "sequence-classification",
            f"{prefix}ForTokenClassification": "token-classification",
            f"{prefix}ForQuestionAnswering": "question-answering",
        },
        bare=(f"{prefix}Model", f"{prefix}EncoderModel"),
        parse=T5Config.from_hf,
        build=build_t5,
        naming=_t5_naming("", ("lm_head", "qa_outputs"), loose_head="lm_head.weight"),
        namings=dict.fromkeys(INSIDE, _t5_naming("transformer")),
        module=T5ForTask,
    )


_BART = Family(
    name="bart",
    model_types=("bart",),
    heads={
        "BartForConditionalGeneration": "seq2seq-lm",
        "BartForSequenceClassification": "sequence-classification",
        "BartForQuestionAnswering": "question-answering",
    },
    bare=("BartModel",),
    parse=BartConfig.from_hf,
    build=build_bart,
    naming=Naming(
        stacks=("model.encoder.layers", "model.decoder.layers"),
        base="model",
        renames={"final_logits_bias.bias": "final_logits_bias"},
        ties=(
            ("lm_head.weight", "model.shared.weight"),
            ("model.encoder.embed_tokens.weight", "model.shared.weight"),
            ("model.decoder.embed_tokens.weight", "model.shared.weight"),
        ),
        ignored=(r"^model\.(en|de)coder\.version$",),
    ),
    module=BartForTask,
)


_BERT_HEAD = ("cls.predictions", "cls.predictions.decoder")
_ROBERTA_HEAD = ("lm_head", "lm_head.decoder")
FAMILIES: tuple[Family, ...] = (
    *(_llama_family(name) for name in KINDS),
    _GPT2,
    _encoder_family("bert", "Bert", _BERT_HEAD, ignored=(r"^cls\.seq_relationship\.",)),
    _encoder_family("roberta", "Roberta", _ROBERTA_HEAD),
    _encoder_family("xlm-roberta", "XLMRoberta", _ROBERTA_HEAD),
    _encoder_family("deberta-v2", "DebertaV2", _BERT_HEAD, ignored=(r"^mask_predictions\.",)),
    *(_t5_family(name) for name in T5_PREFIXES),
    _BART,
)


def _known() -> str:
    return "; ".join(f"{f.model_types[0]} ({', '.join(f.heads)})" for f in FAMILIES)


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family that a config.json belongs to, by its model type or else its architectures.

    Raises CheckpointError listing the known ones if none does.
    """
    model_type, architectures = hf_config.get("model_type"), hf_config.get("architectures") or ()
    for family in FAMILIES:
        classes = {*family.heads, *family.bare}
        if model_type in family.model_types or (
            model_type is None and classes & set(architectures)
        ):
            return family
    raise CheckpointError(f"config.json: {_named(hf_config)} is not supported; known: {_known()}")


def task_of(hf_config: Mapping[str, Any], asked: str | None = None) -> str:
    """The task to build a checkpoint's model for: the one asked for, else the checkpoint's own.

    Raises CheckpointError listing those of the family if it has no such head, or if the
    checkpoint's own head is none of them.
    """
    family = family_of(hf_config)
    task = asked if asked is not None else family.task(hf_config)
    if task is not None and task in family.heads.values():
        return task
    if asked is not None:
        raise CheckpointError(
            f"task={asked!r} is not served by {family.name} models; accepted: "
            f"{', '.join(family.heads.values())}"
        )
    raise CheckpointError(
        f"config.json: {_named(hf_config)} is not supported; known: {_known()}; "
        "give task=... to take the base and put a new head on it"
    )


def _named(hf_config: Mapping[str, Any]) -> str:
    architectures = list(hf_config.get("architectures") or ())
    return f"model_type={hf_config.get('model_type')!r} with architectures={architectures}"


def family_for(model: nn.Module) -> Family:
    """The family of a module that a :class:`Family` built; TypeError for any other module."""
    for family in FAMILIES:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if isinstance(model, family.module) and kind in family.model_types:
            return family
    raise TypeError(f"{type(model).__name__} belongs to no known family; known: {_known()}")
