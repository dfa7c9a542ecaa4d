"""The configuration of GPT-2, read from and written to Hugging Face's config.json.

Rates of dropout are kept to be written again, but nothing here drops: while adapters are trained
the frozen base computes what it computes when it is used, and adapters have a dropout of their own.
So is ``reorder_and_upcast_attn``: scores and softmax are float32 here in any case.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jqlora.errors import CheckpointError
from jqlora.models.hf_keys import Reader, as_written, under_own_names

# keys of config.json, and the names that transformers accepts for them too
ALIASES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Everything that determines the network; hashable, so it may be static under ``jit``.

    ``scale_by_layer`` divides the scores of layer i, counted from 1, by i. ``dropout`` holds the
    rates of ``RATES``, ``upcast_attention`` is for transformers alone.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 1024
    model_type: str = "gpt2"
    activation: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    scale_scores: bool = True
    scale_by_layer: bool = False
    upcast_attention: bool = False
    tie_word_embeddings: bool = True
    dropout: tuple[float, float, float] = (0.1, 0.1, 0.1)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def longest(self) -> int:
        """The longest sequence the positions serve."""
        return self.max_position_embeddings

    @property
    def switch(self) -> None:
        """Learned positions are the same at every length."""
        return None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "GPT2Config":
        """Parses config.json. Raises CheckpointError naming the key, its value and what is
        accepted."""
        read = Reader(under_own_names(hf, ALIASES), DEFAULTS)
        hidden, heads = read.positive("n_embd"), read.positive("n_head")
        if hidden % heads:
            raise CheckpointError(
                f"config.json: n_embd={hidden} is not a multiple of n_head={heads}"
            )
        read.require("add_cross_attention", False)
        return cls(
            vocab_size=read.positive("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.positive("n_inner", 4 * hidden),
            num_hidden_layers=read.positive("n_layer"),
            num_attention_heads=heads,
            max_position_embeddings=read.positive("n_positions"),
            activation=read.activation("activation_function"),
            layer_norm_eps=read.number("layer_norm_epsilon", 1e-5),
            initializer_range=read.number("initializer_range", 0.02),
            scale_scores=read.flag("scale_attn_weights"),
            scale_by_layer=read.flag("scale_attn_by_inverse_layer_idx"),
            upcast_attention=read.flag("reorder_and_upcast_attn"),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            dropout=tuple(read.number(rate, 0.1) for rate in RATES),  # pyright: ignore[reportArgumentType]
            bos_token_id=read.token("bos_token_id"),
            eos_token_ids=read.tokens("eos_token_id"),
            pad_token_id=read.token("pad_token_id"),
            dtype=read.dtype(),
        )

    def to_hf(self, spelling: str = "new") -> dict[str, Any]:
        """config.json for transformers; ``spelling`` "old" is that of transformers 4."""
        hf: dict[str, Any] = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_embd": self.hidden_size,
            "n_inner": self.intermediate_size,
            "n_layer": self.num_hidden_layers,
            "n_head": self.num_attention_heads,
            "n_positions": self.max_position_embeddings,
            "activation_function": self.activation,
            "layer_norm_epsilon": self.layer_norm_eps,
            "initializer_range": self.initializer_range,
            "scale_attn_weights": self.scale_scores,
            "scale_attn_by_inverse_layer_idx": self.scale_by_layer,
            "reorder_and_upcast_attn": self.upcast_attention,
            "tie_word_embeddings": self.tie_word_embeddings,
            **dict(zip(RATES, self.dropout, strict=True)),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": as_written(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
        }
        if self.dtype is not None:
            hf["dtype" if spelling == "new" else "torch_dtype"] = self.dtype
        return hf
