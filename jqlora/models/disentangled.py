"""What DeBERTa's configuration says beyond BERT's, in transformers' words."""

from dataclasses import dataclass
from typing import Any

from jqlora.models.activations import ACTIVATIONS
from jqlora.models.hf_keys import Reader, refuse

TERMS = ("c2p", "p2c")


@dataclass(frozen=True, kw_only=True)
class Disentangled:
    """Relative positions, the convolution beside the first layer, and the heads' variants.

    ``terms`` are those of c2p and p2c that scores have (none without relative attention);
    ``buckets`` is the number of position buckets on one side, or 0; distances beyond ``longest``
    count as it. ``conv_kernel`` is 0 where there is no convolution. ``legacy``: the masked-LM head
    is BERT's rather than DeBERTa's own.
    """

    relative: bool = False
    terms: tuple[str, ...] = ()
    longest: int = 512
    buckets: int = 0
    shared_projections: bool = False
    normed_positions: bool = False
    absolute_positions: bool = True
    conv_kernel: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"
    embedding_size: int = 0
    pooler_act: str = "gelu"
    legacy: bool = True

    @property
    def span(self) -> int:
        """Half the number of relative positions that have an embedding."""
        return self.buckets or self.longest


def read_disentangled(read: Reader) -> Disentangled:
    """Raises CheckpointError for values that cannot be honoured."""
    hf = read.hf
    terms = hf.get("pos_att_type") or ()
    terms = terms.lower().split("|") if isinstance(terms, str) else terms
    terms = tuple(term.strip() for term in terms)
    if not set(terms) <= set(TERMS):
        refuse("pos_att_type", hf["pos_att_type"], TERMS)
    relative = read.flag("relative_attention")
    if terms and not relative:
        refuse("pos_att_type", hf["pos_att_type"], "null without relative_attention")
    norm = str(hf.get("norm_rel_ebd") or "none").lower().split("|")
    longest = hf.get("max_relative_positions") or -1
    hidden = read.positive("hidden_size")
    read.require("pooler_hidden_size", hidden)
    read.require("attention_head_size", hidden // read.positive("num_attention_heads"))
    conv_kernel = hf.get("conv_kernel_size") or 0
    if conv_kernel and conv_kernel % 2 == 0:
        refuse("conv_kernel_size", conv_kernel, "an odd number, which keeps the length")
    pooler, conv = hf.get("pooler_hidden_act") or "gelu", hf.get("conv_act") or "tanh"
    for key, act in (("pooler_hidden_act", pooler), ("conv_act", conv)):
        if act not in ACTIVATIONS:
            refuse(key, act, ACTIVATIONS)
    return Disentangled(
        relative=relative,
        terms=tuple(term for term in TERMS if term in terms),
        longest=longest if longest > 0 else read.positive("max_position_embeddings"),
        buckets=max(hf.get("position_buckets") or 0, 0),
        shared_projections=read.flag("share_att_key"),
        normed_positions=relative and "layer_norm" in [name.strip() for name in norm],
        absolute_positions=hf.get("position_biased_input") is not False,
        conv_kernel=conv_kernel,
        conv_groups=read.positive("conv_groups", 1),
        conv_act=conv,
        embedding_size=read.positive("embedding_size", hidden),
        pooler_act=pooler,
        legacy=hf.get("legacy") is not False,
    )


def write_disentangled(config: Disentangled) -> dict[str, Any]:
    """Inverse of :func:`read_disentangled`."""
    hf: dict[str, Any] = {
        "relative_attention": config.relative,
        "pos_att_type": list(config.terms) or None,
        "max_relative_positions": config.longest,
        "position_buckets": config.buckets or -1,
        "share_att_key": config.shared_projections,
        "norm_rel_ebd": "layer_norm" if config.normed_positions else "none",
        "position_biased_input": config.absolute_positions,
        "embedding_size": config.embedding_size,
        "pooler_hidden_act": config.pooler_act,
        "legacy": config.legacy,
    }
    if config.conv_kernel:
        hf |= {
            "conv_kernel_size": config.conv_kernel,
            "conv_groups": config.conv_groups,
            "conv_act": config.conv_act,
        }
    return hf
