"""The configuration of BART, read from and written to Hugging Face's config.json.

Rates of dropout are kept to be written again, and not applied.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jqlora.errors import CheckpointError
from jqlora.models.hf_keys import Reader, as_written, under_own_names
from jqlora.models.labels import Labels, read_labels, write_labels
from jqlora.models.multi_head import Heads

DEFAULTS = {
    "vocab_size": 50265,
    "d_model": 1024,
    "encoder_layers": 12,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_layers": 12,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
    "max_position_embeddings": 1024,
    "activation_function": "gelu",
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
ALIASES = {
    "d_model": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
}
RATES = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "classifier_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
)


@dataclass(frozen=True, kw_only=True)
class BartSide:
    """The encoder or the decoder."""

    num_layers: int
    num_heads: int
    intermediate_size: int


@dataclass(frozen=True, kw_only=True)
class BartConfig(Labels):
    """Everything that determines the network; hashable, so it may be static under ``jit``.

    ``scaled_embedding`` multiplies the token embedding by sqrt(hidden_size).
    """

    vocab_size: int
    hidden_size: int
    encoder: BartSide
    decoder: BartSide
    max_position_embeddings: int = 1024
    model_type: str = "bart"
    activation: str = "gelu"
    initializer_range: float = 0.02
    scaled_embedding: bool = False
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
    def num_decoder_layers(self) -> int:
        return self.decoder.num_layers

    @property
    def heads(self) -> Heads:
        """Of the decoder."""
        return self.heads_of(self.decoder)

    def heads_of(self, side: BartSide) -> Heads:
        head_dim = self.hidden_size // side.num_heads
        spread = self.initializer_range
        return Heads(
            names=("q_proj", "k_proj", "v_proj", "out_proj"),
            spreads=(spread, spread, spread, spread),
            count=side.num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            use_bias=True,
        )

    @property
    def longest(self) -> int:
        """The longest sequence that the positions of either side serve."""
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "BartConfig":
        """Parses config.json. Raises CheckpointError naming the key, its value and what is
        accepted."""
        read = Reader(under_own_names(hf, ALIASES), DEFAULTS)
        read.require("is_encoder_decoder", True)
        read.require("tie_word_embeddings", True)
        # what some files of 2020 say of layers that have no place here
        read.require("normalize_before", False)
        read.require("add_final_layer_norm", False)
        read.require("static_position_embeddings", False)
        hidden = read.positive("d_model")
        for side in ("encoder", "decoder"):
            if hidden % read.positive(f"{side}_attention_heads"):
                raise CheckpointError(
                    f"config.json: d_model={hidden} is not a multiple of "
                    f"{side}_attention_heads={read.get(f'{side}_attention_heads')}"
                )
        return cls(
            vocab_size=read.positive("vocab_size"),
            hidden_size=hidden,
            encoder=_read_side(read, "encoder"),
            decoder=_read_side(read, "decoder"),
            max_position_embeddings=read.positive("max_position_embeddings"),
            activation=read.activation("activation_function"),
            initializer_range=read.number("init_std", 0.02),
            scaled_embedding=read.flag("scale_embedding"),
            rates=tuple((key, read.number(key, 0.0)) for key in RATES if key in hf),
            bos_token_id=read.token("bos_token_id"),
            eos_token_ids=read.tokens("eos_token_id"),
            pad_token_id=read.token("pad_token_id"),
            decoder_start_token_id=read.token("decoder_start_token_id"),
            forced_bos_token_id=read.token("forced_bos_token_id"),
            forced_eos_token_id=read.token("forced_eos_token_id"),
            **read_labels(hf, absent=3),
            dtype=read.dtype(),
        )

    def to_hf(self, spelling: str = "new") -> dict[str, Any]:
        """config.json for transformers; ``spelling`` "old" is that of transformers 4."""
        hf: dict[str, Any] = {
            "architectures": ["BartForConditionalGeneration"],
            "model_type": "bart",
            "vocab_size": self.vocab_size,
            "d_model": self.hidden_size,
            **_write_side(self.encoder, "encoder"),
            **_write_side(self.decoder, "decoder"),
            "num_hidden_layers": self.encoder.num_layers,
            "max_position_embeddings": self.max_position_embeddings,
            "activation_function": self.activation,
            "init_std": self.initializer_range,
            "scale_embedding": self.scaled_embedding,
            "tie_word_embeddings": True,
            "is_encoder_decoder": True,
            **dict(self.rates),
            **write_labels(self),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": as_written(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "decoder_start_token_id": self.decoder_start_token_id,
            "forced_bos_token_id": self.forced_bos_token_id,
            "forced_eos_token_id": self.forced_eos_token_id,
            "use_cache": True,
        }
        if self.dtype is not None:
            hf["dtype" if spelling == "new" else "torch_dtype"] = self.dtype
        return hf


def _read_side(read: Reader, side: str) -> BartSide:
    return BartSide(
        num_layers=read.positive(f"{side}_layers"),
        num_heads=read.positive(f"{side}_attention_heads"),
        intermediate_size=read.positive(f"{side}_ffn_dim"),
    )


def _write_side(side: BartSide, name: str) -> dict[str, int]:
    return {
        f"{name}_layers": side.num_layers,
        f"{name}_attention_heads": side.num_heads,
        f"{name}_ffn_dim": side.intermediate_size,
    }
