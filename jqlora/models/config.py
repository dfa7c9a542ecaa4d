"""The configuration of Llama-like decoders, read from and written to Hugging Face's config.json.

One class serves Llama, Mistral and Qwen2: they differ in biases and sliding windows only, and
``KINDS`` says how each spells them. Absent keys take transformers' defaults for that kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jqlora.errors import CheckpointError
from jqlora.models.hf_keys import KINDS, Reader, read_rope, write_rope
from jqlora.models.rope import Rope

Spelling = Literal["new", "old"]
PLAIN_ROPE = Rope()


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Everything that determines the network; hashable, so it may be static under ``jit``.

    ``windowed`` says for each layer whether it attends through ``sliding_window`` (the number of
    keys that a query sees, itself included), by default all if there is one. ``dtype`` is the
    checkpoint's own, or None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    rope: Rope = PLAIN_ROPE
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    windowed: tuple[bool, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not self.windowed:
            everywhere = (self.sliding_window is not None,) * self.num_hidden_layers
            object.__setattr__(self, "windowed", everywhere)

    @property
    def longest(self) -> int:
        """The longest sequence the positions serve; dynamic NTK stretches it by its factor."""
        factor = self.rope.option("factor") if self.rope.type == "dynamic" else 1
        return int(self.max_position_embeddings * factor)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "LlamaConfig":
        """Parses config.json in the old and the new spelling of transformers.

        Old: ``rope_theta``, ``rope_scaling``, ``torch_dtype``; new: ``rope_parameters``, ``dtype``.
        Raises CheckpointError naming the key, its value and what is accepted.
        """
        read = Reader(hf)
        kind = read.kind()
        layers = read.positive("num_hidden_layers")
        hidden, heads = read.positive("hidden_size"), read.positive("num_attention_heads")
        kv_heads = read.positive("num_key_value_heads", kind.kv_heads or heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: num_key_value_heads={kv_heads} does not divide "
                f"num_attention_heads={heads}"
            )
        if hf.get("head_dim") is None and hidden % heads:
            raise CheckpointError(
                f"config.json: hidden_size={hidden} is not a multiple of "
                f"num_attention_heads={heads}; give head_dim"
            )
        head_dim = read.positive("head_dim", hidden // heads)
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim={head_dim} must be even for rotary pairs")
        positions = read.positive("max_position_embeddings", kind.max_positions)
        window, windowed = kind.read_window(read, layers)
        attention_bias = kind.has_bias_keys and read.flag("attention_bias")
        read.require("attention_dropout", 0.0)
        read.require("rope_interleaved", False)
        read.require("partial_rotary_factor", 1.0)
        return cls(
            model_type=kind.name,
            vocab_size=read.positive("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.positive("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            initializer_range=read.number("initializer_range", 0.02),
            hidden_act=read.activation(),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            rope=read_rope(hf, positions),
            qkv_bias=kind.qkv_bias or attention_bias,
            output_bias=attention_bias,
            mlp_bias=kind.has_bias_keys and read.flag("mlp_bias"),
            sliding_window=window,
            windowed=windowed,
            bos_token_id=read.token("bos_token_id"),
            eos_token_ids=read.tokens("eos_token_id"),
            pad_token_id=read.token("pad_token_id"),
            dtype=read.dtype(),
        )

    def to_hf(self, spelling: Spelling = "new") -> dict[str, Any]:
        """config.json for transformers: ``from_hf(to_hf(c)) == c`` in both spellings.

        "old" is what transformers 4 writes, and what other tools still read most widely.
        """
        kind = KINDS[self.model_type]
        eos = self.eos_token_ids
        hf: dict[str, Any] = {
            "architectures": [kind.architecture],
            "model_type": kind.name,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": self.hidden_act,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "initializer_range": self.initializer_range,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if len(eos) > 1 else (eos[0] if eos else None),
            "pad_token_id": self.pad_token_id,
            "attention_dropout": 0.0,
            "use_cache": True,
            **kind.write_window(self.sliding_window, self.windowed),
            **write_rope(self.rope, spelling),
        }
        if kind.has_bias_keys:
            hf |= {"attention_bias": self.output_bias, "mlp_bias": self.mlp_bias}
        if self.dtype is not None:
            hf["dtype" if spelling == "new" else "torch_dtype"] = self.dtype
        return hf
