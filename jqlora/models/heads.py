"""What an encoder's last states become: the heads, as the checkpoints of each kind have them.

A head is one module or two, which the whole model has under the names of the checkpoint; each is
called on what the one before it returned.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jqlora.models.activations import ACTIVATIONS
from jqlora.models.encoder import dense, norm
from jqlora.models.encoder_config import EncoderConfig
from jqlora.models.linear import Dense

Types = tuple[tuple[str, Any], ...]
Attend = Callable[[jax.Array], jax.Array]
"""Holds states against the embeddings of all tokens."""
Head = Callable[[EncoderConfig, Types], dict[str, nn.Module]]
"""The modules in the order of their calls: of states [B, T, D] (or pooled [B, D]), and of an
``Attend`` where the task is masked-lm."""


class Transform(nn.Module):
    """A dense layer, an activation and a norm."""

    config: EncoderConfig
    types: Types
    width: int
    act: str
    norm_name: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(self.types)
        y = ACTIVATIONS[self.act](dense(x, self.width, "dense", self.config, types))
        return norm(self.config, types, self.norm_name)(y)


class OverVocabulary(Transform):
    """The transform, then the token embeddings and a bias; ``below`` is the module, if any, that
    has the transform."""

    below: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, attend: Attend) -> jax.Array:
        fields = (self.config, self.types, self.width, self.act, self.norm_name)
        inside = self.below is None
        x = super().__call__(x) if inside else Transform(*fields, name=self.below)(x)
        shape, types = (self.config.vocab_size,), dict(self.types)
        bias = self.param("bias", nn.initializers.zeros, shape, types["param_dtype"])
        y = attend(x)
        return y + bias.astype(y.dtype)[None, None]


class Holder(nn.Module):
    """A module that only holds another."""

    head: Callable[..., nn.Module]
    child: str

    @nn.compact
    def __call__(self, x: jax.Array, attend: Attend) -> jax.Array:
        return self.head(name=self.child)(x, attend)


def bert_masked(config: EncoderConfig, types: Types) -> dict[str, nn.Module]:
    """[B, T, V]; DeBERTa's embeddings may be narrower than its states."""
    width = config.disentangled.embedding_size if config.disentangled else config.hidden_size

    def head(name: str) -> nn.Module:
        act = config.hidden_act
        return OverVocabulary(config, types, width, act, "LayerNorm", "transform", name=name)

    return {"cls": Holder(head, "predictions")}


def roberta_masked(config: EncoderConfig, types: Types) -> dict[str, nn.Module]:
    """[B, T, V]; the activation is GELU whatever the layers'."""
    return {"lm_head": OverVocabulary(config, types, config.hidden_size, "gelu", "layer_norm")}


def deberta_masked(config: EncoderConfig, types: Types) -> dict[str, nn.Module]:
    """[B, T, V]"""
    assert config.disentangled is not None
    if config.disentangled.legacy:
        return bert_masked(config, types)

    def head(name: str) -> nn.Module:
        width, act = config.hidden_size, config.hidden_act
        return OverVocabulary(config, types, width, act, "LayerNorm", name=name)

    return {"lm_predictions": Holder(head, "lm_head")}


def classifier(config: EncoderConfig, types: Types) -> dict[str, nn.Module]:
    """[..., labels]"""
    return {"classifier": linear(config, types, config.num_labels)}


def qa_outputs(config: EncoderConfig, types: Types) -> dict[str, nn.Module]:
    """[B, T, 2]: how well each token begins and ends the answer."""
    return {"qa_outputs": linear(config, types, 2)}


def linear(config: EncoderConfig, types: Types, features: int) -> Dense:
    init = nn.initializers.normal(config.initializer_range)
    return Dense(features, kernel_init=init, **dict(types))


class FirstToken(nn.Module):
    """The first token's state through a dense layer and an activation; then, where ``labels``, to
    as many logits in the same module."""

    config: EncoderConfig
    types: Types
    act: str
    labels: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, D] or [B, labels]."""
        config, types = self.config, dict(self.types)
        y = ACTIVATIONS[self.act](dense(x[:, 0], config.hidden_size, "dense", config, types))
        return dense(y, self.labels, "out_proj", config, types) if self.labels else y


def roberta_classifier(config: EncoderConfig, types: Types) -> dict[str, nn.Module]:
    """[B, labels]"""
    return {"classifier": FirstToken(config, types, "tanh", config.num_labels)}


def deberta_classifier(config: EncoderConfig, types: Types) -> dict[str, nn.Module]:
    """[B, labels]"""
    assert config.disentangled is not None
    pooler = FirstToken(config, types, config.disentangled.pooler_act)
    return {"pooler": pooler, **classifier(config, types)}


_PER_TOKEN: dict[str, Head] = {
    "token-classification": classifier,
    "question-answering": qa_outputs,
}
HEADS: dict[str, dict[str, Head]] = {
    # BERT's pooler belongs to its base
    "bert": {"masked-lm": bert_masked, "sequence-classification": classifier, **_PER_TOKEN},
    "roberta": {
        "masked-lm": roberta_masked,
        "sequence-classification": roberta_classifier,
        **_PER_TOKEN,
    },
    "deberta": {
        "masked-lm": deberta_masked,
        "sequence-classification": deberta_classifier,
        **_PER_TOKEN,
    },
}
"""Heads by the name of the base and the task."""
