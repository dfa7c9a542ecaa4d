"""The configuration of T5 and mT5, read from and written to Hugging Face's config.json.

What transformers calls T5 v1.1 and FLAN is a T5 with gated units whose logits are not scaled.
Rates of dropout are kept to be written again, and not applied.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jqlora.models.activations import ACTIVATIONS
from jqlora.models.hf_keys import Reader, as_written, refuse, under_own_names
from jqlora.models.labels import Labels, read_labels, write_labels
from jqlora.models.multi_head import Heads

# what config.json may say instead, as transformers accepts it
ALIASES = {
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "d_kv": "head_dim",
}
_COMMON = {
    "d_model": 512,
    "d_kv": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "t5": _COMMON
    | {
        "vocab_size": 32128,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "feed_forward_proj": "relu",
    },
    "mt5": _COMMON
    | {
        "vocab_size": 250112,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
    },
}
PREFIXES = {"t5": "T5", "mt5": "MT5"}
"""What the classes of transformers begin with."""
ENCODER_ALONE = ("EncoderModel", "ForTokenClassification")
"""Ends of the names of classes without a decoder, whose files say that there is none."""
RATES = ("dropout_rate", "classifier_dropout")


@dataclass(frozen=True, kw_only=True)
class T5Config(Labels):
    """Everything that determines the network; hashable, so it may be static under ``jit``.

    ``feed_forward`` is as config.json spells it: an activation, with "gated-" before it for gated
    units. ``scaled_logits`` divides the states by sqrt(hidden_size) before the head.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    head_dim: int
    intermediate_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_attention_heads: int
    buckets: int = 32
    longest_distance: int = 128
    feed_forward: str = "relu"
    layer_norm_eps: float = 1e-6
    initializer_factor: float = 1.0
    scaled_logits: bool = True
    tie_word_embeddings: bool = True
    rates: tuple[tuple[str, float], ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    dtype: str | None = None

    @property
    def gated(self) -> bool:
        return self.feed_forward.startswith("gated-")

    @property
    def activation(self) -> str:
        name = self.feed_forward.removeprefix("gated-")
        return "gelu_new" if self.gated and name == "gelu" else name

    @property
    def heads(self) -> Heads:
        width, factor = self.hidden_size, self.initializer_factor
        inner = self.num_attention_heads * self.head_dim
        return Heads(
            names=("q", "k", "v", "o"),
            spreads=(
                factor * (width * self.head_dim) ** -0.5,
                factor * width**-0.5,
                factor * width**-0.5,
                factor * inner**-0.5,
            ),
            count=self.num_attention_heads,
            head_dim=self.head_dim,
            scale=1.0,
            use_bias=False,
        )

    @property
    def longest(self) -> int:
        """Positions are relative, and serve sequences of every length."""
        return sys.maxsize

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "T5Config":
        """Parses config.json. Raises CheckpointError naming the key, its value and what is
        accepted.

        ``tie_word_embeddings`` says two things there, whose second has a key of its own since
        transformers 5: that the head is the embedding, and that logits are scaled.
        """
        name = hf.get("model_type")
        if name not in KINDS:
            refuse("model_type", name, KINDS)
        read = Reader(under_own_names(hf, ALIASES), KINDS[name])
        if not any(name.endswith(ENCODER_ALONE) for name in hf.get("architectures") or ()):
            read.require("is_encoder_decoder", True)
        layers = read.positive("num_layers")
        tied = hf.get("tie_word_embeddings") is not False
        scaled = hf.get("scale_decoder_outputs")
        return cls(
            model_type=name,
            vocab_size=read.positive("vocab_size"),
            hidden_size=read.positive("d_model"),
            head_dim=read.positive("d_kv"),
            intermediate_size=read.positive("d_ff"),
            num_encoder_layers=layers,
            num_decoder_layers=read.positive("num_decoder_layers", layers),
            num_attention_heads=read.positive("num_heads"),
            buckets=read.positive("relative_attention_num_buckets"),
            longest_distance=read.positive("relative_attention_max_distance"),
            feed_forward=_feed_forward(read.get("feed_forward_proj")),
            layer_norm_eps=read.number("layer_norm_epsilon", 1e-6),
            initializer_factor=read.number("initializer_factor", 1.0),
            scaled_logits=name == "t5" and (tied if scaled is None else bool(scaled)),
            tie_word_embeddings=tied,
            rates=tuple((key, read.number(key, 0.0)) for key in RATES if key in hf),
            bos_token_id=read.token("bos_token_id"),
            eos_token_ids=read.tokens("eos_token_id"),
            pad_token_id=read.token("pad_token_id"),
            decoder_start_token_id=read.token("decoder_start_token_id"),
            forced_bos_token_id=read.token("forced_bos_token_id"),
            forced_eos_token_id=read.token("forced_eos_token_id"),
            **read_labels(hf),
            dtype=read.dtype(),
        )

    def to_hf(self, spelling: str = "new") -> dict[str, Any]:
        """config.json for transformers; ``spelling`` "old" is that of transformers 4."""
        hf: dict[str, Any] = {
            "architectures": [f"{PREFIXES[self.model_type]}ForConditionalGeneration"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "d_model": self.hidden_size,
            "d_kv": self.head_dim,
            "d_ff": self.intermediate_size,
            "num_layers": self.num_encoder_layers,
            "num_decoder_layers": self.num_decoder_layers,
            "num_heads": self.num_attention_heads,
            "relative_attention_num_buckets": self.buckets,
            "relative_attention_max_distance": self.longest_distance,
            "feed_forward_proj": self.feed_forward,
            "layer_norm_epsilon": self.layer_norm_eps,
            "initializer_factor": self.initializer_factor,
            "scale_decoder_outputs": self.scaled_logits,
            "tie_word_embeddings": self.tie_word_embeddings,
            "is_encoder_decoder": True,
            **dict(self.rates),
            **write_labels(self),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": as_written(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "decoder_start_token_id": self.decoder_start_token_id,
            "use_cache": True,
        }
        for key in ("forced_bos_token_id", "forced_eos_token_id"):
            if getattr(self, key) is not None:
                hf[key] = getattr(self, key)
        if self.dtype is not None:
            hf["dtype" if spelling == "new" else "torch_dtype"] = self.dtype
        return hf


def _feed_forward(value: Any) -> str:
    name = str(value)
    if name.removeprefix("gated-") not in ACTIVATIONS:
        refuse("feed_forward_proj", value, f"{', '.join(ACTIVATIONS)}, or gated- and one of these")
    return name
