"""The configuration of Llama-like decoders, read from and written to Hugging Face's config.json.

One class serves Llama, Mistral, Qwen, Gemma and Phi-3: its switches say what each computes, and
``KINDS`` how each spells it. Absent keys take transformers' defaults for that kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jqlora.errors import CheckpointError
from jqlora.models.hf_keys import Reader, as_written
from jqlora.models.hf_rope import read_rope, write_rope
from jqlora.models.kinds import KINDS, kind_of
from jqlora.models.rope import Rope

Spelling = Literal["new", "old"]
PLAIN_ROPE = Rope()


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Everything that determines the network; hashable, so it may be static under ``jit``.

    ``windowed`` says for each layer whether it attends through ``sliding_window`` (the number of
    keys that a query sees, itself included), by default all if there is one; ``local_rope`` is the
    rotary embedding of those layers where it is not ``rope``. ``dtype`` is the checkpoint's own, or
    None.

    ``fused_projections`` keeps queries, keys and values in one matrix, gate and up in another;
    ``qk_norm`` normalizes each head's queries and keys; ``unit_offset_norms`` scales norms by
    1 + their weight; ``sandwich_norms`` has norms behind attention and MLP too;
    ``scaled_embedding`` multiplies the embedding by sqrt(hidden_size). Scores are divided by
    sqrt(``query_scalar``), by default head_dim. A soft cap c turns scores or logits x into
    c·tanh(x/c).
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
    local_rope: Rope | None = None
    fused_projections: bool = False
    qk_norm: bool = False
    unit_offset_norms: bool = False
    sandwich_norms: bool = False
    scaled_embedding: bool = False
    query_scalar: int | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
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

    @property
    def switch(self) -> int | None:
        """The length beyond which LongRoPE turns everything by other frequencies, or None."""
        if self.rope.type != "longrope":
            return None
        return self.rope.option("original_max_position_embeddings", self.max_position_embeddings)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "LlamaConfig":
        """Parses config.json in the old and the new spelling of transformers.

        Old: ``rope_theta``, ``rope_scaling``, ``torch_dtype``; new: ``rope_parameters``, ``dtype``.
        Raises CheckpointError naming the key, its value and what is accepted.
        """
        kind = kind_of(hf)
        read = Reader(hf, kind.defaults)
        layers = read.positive("num_hidden_layers")
        hidden, heads = read.positive("hidden_size"), read.positive("num_attention_heads")
        kv_heads = read.positive("num_key_value_heads", heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: num_key_value_heads={kv_heads} does not divide "
                f"num_attention_heads={heads}"
            )
        if read.get("head_dim") is None and hidden % heads:
            raise CheckpointError(
                f"config.json: hidden_size={hidden} is not a multiple of "
                f"num_attention_heads={heads}; give head_dim"
            )
        head_dim = read.positive("head_dim", hidden // heads)
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim={head_dim} must be even for rotary pairs")
        positions = read.positive("max_position_embeddings", 2048)
        rope, local_rope = read_rope(read, kind.rope, head_dim=head_dim, max_positions=positions)
        window, windowed = kind.read_window(read, layers)
        biased = kind.attention_bias and read.flag("attention_bias")
        activation = read.activation(kind.activation_keys[0])
        if kind.tanh_gelu and activation == "gelu":
            activation = "gelu_pytorch_tanh"
        logit_softcap = read.above_zero("final_logit_softcapping") if kind.query_scalar else None
        for key in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
            read.require(key, 0.0)
        for key in ("rope_interleaved", "use_bidirectional_attention"):
            read.require(key, False)
        if not kind.capped_scores:
            read.require("attn_logit_softcapping", None)
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
            hidden_act=activation,
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            rope=rope,
            local_rope=local_rope,
            query_scalar=read.positive("query_pre_attn_scalar") if kind.query_scalar else None,
            attention_softcap=read.above_zero("attn_logit_softcapping"),
            logit_softcap=logit_softcap,
            output_bias=biased,
            mlp_bias=kind.mlp_bias and read.flag("mlp_bias"),
            sliding_window=window,
            windowed=windowed,
            bos_token_id=read.token("bos_token_id"),
            eos_token_ids=read.tokens("eos_token_id"),
            pad_token_id=read.token("pad_token_id"),
            dtype=read.dtype(),
            **{"qkv_bias": biased, **kind.switches},
        )

    def to_hf(self, spelling: Spelling = "new") -> dict[str, Any]:
        """config.json for transformers: ``from_hf(to_hf(c)) == c`` in both spellings.

        "old" is what transformers 4 writes, and what other tools still read most widely.
        """
        kind = KINDS[self.model_type]
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
            **dict.fromkeys(kind.activation_keys, self.hidden_act),
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "initializer_range": self.initializer_range,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": as_written(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "attention_dropout": 0.0,
            "use_cache": True,
            **kind.write_window(self.sliding_window, self.windowed),
            **write_rope(self.rope, self.local_rope, spelling),
        }
        if kind.attention_bias:
            hf["attention_bias"] = self.output_bias
        if kind.mlp_bias:
            hf["mlp_bias"] = self.mlp_bias
        if kind.query_scalar:
            hf["query_pre_attn_scalar"] = self.query_scalar
            hf["final_logit_softcapping"] = self.logit_softcap
        if kind.capped_scores:
            hf["attn_logit_softcapping"] = self.attention_softcap
        if self.dtype is not None:
            hf["dtype" if spelling == "new" else "torch_dtype"] = self.dtype
        return hf
