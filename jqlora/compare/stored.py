"""Which stored weights the other side computes with as they are."""

from jqlora.errors import ConfigError
from jqlora.quant import GroupInt, QTensor, RowInt8, Storage
from jqlora.tree import flatten
from jqlora.types import Params

REASONS: dict[type[Storage], str] = {
    RowInt8: "bitsandbytes' 8-bit products round the activations too, which LLM.int8() is named "
    "for, and ours take them as they are",
    GroupInt: "transformers computes with GPTQ's and AWQ's codes by packages for GPUs alone",
}


def check_stored(params: Params, label: str) -> None:
    """Raise ConfigError where (abstract) weights came out of a file as codes that no product of the
    other side's is equal to."""
    for leaf in flatten(params).values():
        reason = REASONS.get(type(leaf.spec)) if isinstance(leaf, QTensor) else None
        if reason is not None:
            raise ConfigError(
                f"{label} holds {leaf.spec.scheme} weights, which cannot be compared: {reason}; "
                "compare its dense original, or one in bitsandbytes' 4 bits"
            )
