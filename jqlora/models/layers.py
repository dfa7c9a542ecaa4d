"""The same parameters in two layouts: layers stacked for a scan, or one subtree for each layer."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

STACKED = "layers"
NUMBERED = re.compile(r"layers_(\d+)")


def scan_to_loop(params: Mapping[str, Any]) -> dict[str, Any]:
    """``layers`` with lead axes [L] becomes ``layers_0`` ... ``layers_{L-1}``, at any depth.

    Leaves may be any pytree whose arrays carry the lead axis, quantized matrices and adapter
    collections included.
    """
    loop: dict[str, Any] = {}
    for name, node in params.items():
        if name == STACKED:
            depth = jax.tree.leaves(node)[0].shape[0]
            for i in range(depth):
                loop[f"{STACKED}_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], node)
        else:
            loop[name] = scan_to_loop(node) if isinstance(node, Mapping) else node
    return loop


def loop_to_scan(params: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`scan_to_loop`; raises ValueError where layer numbers have gaps."""
    numbered = {int(m[1]): n for name, n in params.items() if (m := NUMBERED.fullmatch(name))}
    scan = {
        name: loop_to_scan(node) if isinstance(node, Mapping) else node
        for name, node in params.items()
        if not NUMBERED.fullmatch(name)
    }
    if numbered:
        if sorted(numbered) != list(range(len(numbered))):
            raise ValueError(f"layers {sorted(numbered)} do not count from 0 without gaps")
        nodes = [numbered[i] for i in range(len(numbered))]
        scan[STACKED] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nodes)
    return scan
