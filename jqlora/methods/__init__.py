"""Methods of fine-tuning: what each adds to a module, and the plan of where it goes."""

from jqlora.methods.adalora import AdaLoRA
from jqlora.methods.base import Method, Placement
from jqlora.methods.lora import LoRA
from jqlora.methods.plan import FULL, Plan, assemble
from jqlora.methods.table import COLLECTIONS, METHODS, method_of

__all__ = [
    "COLLECTIONS",
    "FULL",
    "METHODS",
    "AdaLoRA",
    "LoRA",
    "Method",
    "Placement",
    "Plan",
    "assemble",
    "method_of",
]
