"""What llama.cpp calls the tensors of each architecture, and how it stores them differently.

Three differences beyond names: for llama it reorders the rows of the query and key projections, so
that the two halves that a rotary embedding pairs lie next to each other; for Gemma it adds 1 to the
weights of norms; for GPT-2 it stores ``Conv1D`` weights (out, in), as all others.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_LLAMA_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LLAMA_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How one architecture's tensors are called and stored.

    ``top`` and ``block`` map llama.cpp's modules to Hugging Face's, those of ``block`` below
    ``layers``. ``interleaved``: rotary halves are row by row; ``norm_offset``: what is added to
    norms; ``in_out``: modules whose weight Hugging Face keeps (in, out).
    """

    top: Mapping[str, str]
    block: Mapping[str, str]
    layers: str = "model.layers"
    interleaved: bool = False
    norm_offset: int = 0
    in_out: tuple[str, ...] = ()

    def hf_name(self, name: str) -> str:
        """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``.

        A name without a counterpart is returned as it is, to be reported as an extra tensor.
        """
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if match and match[2] in self.block:
            return f"{self.layers}.{match[1]}.{self.block[match[2]]}.{match[3]}"
        stem, _, kind = name.rpartition(".")
        return f"{self.top[stem]}.{kind}" if stem in self.top else name


ARCHITECTURES = {
    "llama": Stored(top=_LLAMA_TOP, block=_LLAMA_BLOCK, interleaved=True),
    "qwen2": Stored(top=_LLAMA_TOP, block=_LLAMA_BLOCK),
    "qwen3": Stored(top=_LLAMA_TOP, block=_LLAMA_BLOCK | _QK_NORM),
    "gemma": Stored(top=_LLAMA_TOP, block=_LLAMA_BLOCK, norm_offset=1),
    "gemma2": Stored(top=_LLAMA_TOP, block=_LLAMA_BLOCK | _SANDWICH, norm_offset=1),
    "gemma3": Stored(top=_LLAMA_TOP, block=_LLAMA_BLOCK | _SANDWICH | _QK_NORM, norm_offset=1),
    "phi3": Stored(
        top=_LLAMA_TOP,
        block=_LLAMA_BLOCK | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "gpt2": Stored(
        top={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        block={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        layers="transformer.h",
        in_out=("c_attn", "c_proj", "c_fc"),
    ),
}
"""By ``general.architecture``."""
