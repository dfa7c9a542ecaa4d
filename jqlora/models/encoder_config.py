"""The configuration of BERT-like encoders, read from and written to Hugging Face's config.json.

One class serves BERT, RoBERTa, XLM-RoBERTa and DeBERTa; ``KINDS`` has what each means by absent
keys. Dropout is kept as it is written, for those who read the file elsewhere, and not applied.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jqlora.errors import CheckpointError
from jqlora.models.disentangled import Disentangled, read_disentangled, write_disentangled
from jqlora.models.hf_keys import Reader, as_written, refuse
from jqlora.models.labels import Labels, read_labels, write_labels

DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "pooler_dropout",
    "cls_dropout",
)


@dataclass(frozen=True, kw_only=True)
class EncoderKind:
    """What one ``model_type`` means where its config.json says nothing.

    ``base`` is the attribute that holds all but the head. ``positions_after_padding``: positions
    count from ``pad_token_id + 1`` and padding tokens have none (fairseq's way).
    """

    name: str
    base: str
    defaults: Mapping[str, Any]
    positions_after_padding: bool = False


_SIZES = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
_ROBERTA = _SIZES | {
    "vocab_size": 50265,
    "type_vocab_size": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
KINDS = {
    kind.name: kind
    for kind in (
        EncoderKind(
            name="bert",
            base="bert",
            defaults=_SIZES | {"vocab_size": 30522, "type_vocab_size": 2, "pad_token_id": 0},
        ),
        EncoderKind(
            name="roberta", base="roberta", defaults=_ROBERTA, positions_after_padding=True
        ),
        EncoderKind(
            name="xlm-roberta",
            base="roberta",
            defaults=_ROBERTA | {"vocab_size": 30522},
            positions_after_padding=True,
        ),
        EncoderKind(
            name="deberta-v2",
            base="deberta",
            defaults=_SIZES
            | {
                "vocab_size": 128100,
                "hidden_size": 1536,
                "num_hidden_layers": 24,
                "num_attention_heads": 24,
                "intermediate_size": 6144,
                "type_vocab_size": 0,
                "layer_norm_eps": 1e-7,
                "pad_token_id": 0,
            },
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Labels):
    """Everything that determines the network; hashable, so it may be static under ``jit``.

    ``disentangled`` is what DeBERTa has beyond BERT,
    None for the others. ``dtype`` is the checkpoint's own, or None.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    initializer_range: float
    hidden_act: str
    tie_word_embeddings: bool
    disentangled: Disentangled | None = None
    dropouts: tuple[tuple[str, float | None], ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str | None = None

    @property
    def kind(self) -> EncoderKind:
        return KINDS[self.model_type]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def longest(self) -> int:
        """The longest row that the positions serve; relative ones alone serve any."""
        if self.disentangled is not None and not self.disentangled.absolute_positions:
            return sys.maxsize
        unused = (self.pad_token_id or 0) + 1 if self.kind.positions_after_padding else 0
        return self.max_position_embeddings - unused

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "EncoderConfig":
        """Parses config.json. Raises CheckpointError naming the key, its value and what is
        accepted."""
        name = hf.get("model_type")
        if name not in KINDS:
            refuse("model_type", name, KINDS)
        read = Reader(hf, KINDS[name].defaults)
        hidden, heads = read.positive("hidden_size"), read.positive("num_attention_heads")
        if hidden % heads:
            raise CheckpointError(
                f"config.json: hidden_size={hidden} is not a multiple of "
                f"num_attention_heads={heads}"
            )
        read.require("is_decoder", False)
        read.require("add_cross_attention", False)
        read.require("position_embedding_type", "absolute")
        return cls(
            model_type=name,
            vocab_size=read.positive("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.positive("intermediate_size"),
            num_hidden_layers=read.positive("num_hidden_layers"),
            num_attention_heads=heads,
            max_position_embeddings=read.positive("max_position_embeddings"),
            type_vocab_size=_count(read, "type_vocab_size"),
            layer_norm_eps=read.number("layer_norm_eps", 1e-12),
            initializer_range=read.number("initializer_range", 0.02),
            hidden_act=read.activation(),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            **read_labels(hf),
            disentangled=read_disentangled(read) if name == "deberta-v2" else None,
            dropouts=tuple((key, hf[key]) for key in DROPOUTS if key in hf),
            bos_token_id=read.token("bos_token_id"),
            eos_token_ids=read.tokens("eos_token_id"),
            pad_token_id=read.token("pad_token_id"),
            dtype=read.dtype(),
        )

    def to_hf(self, spelling: Literal["new", "old"] = "new") -> dict[str, Any]:
        """config.json for transformers: ``from_hf(to_hf(c)) == c`` in both spellings."""
        hf: dict[str, Any] = {
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "type_vocab_size": self.type_vocab_size,
            "layer_norm_eps": self.layer_norm_eps,
            "initializer_range": self.initializer_range,
            "hidden_act": self.hidden_act,
            "tie_word_embeddings": self.tie_word_embeddings,
            **write_labels(self),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": as_written(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            **dict(self.dropouts),
        }
        if self.disentangled is not None:
            hf |= write_disentangled(self.disentangled)
        if self.dtype is not None:
            hf["dtype" if spelling == "new" else "torch_dtype"] = self.dtype
        return hf


def _count(read: Reader, key: str) -> int:
    value = read.get(key)
    return 0 if value == 0 else read.positive(key)
