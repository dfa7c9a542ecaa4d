"""The same parameters in two layouts: layers stacked for a scan, or one subtree for each layer."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

STACKED = ("layers", "layer", "h", "block")
"""What checkpoints call a list of layers."""
NUMBERED = re.compile(rf"({'|'.join(STACKED)})_(\d+)")


def scan_to_loop(params: Mapping[str, Any]) -> dict[str, Any]:
    """``layers`` with lead axes [L] becomes ``layers_0`` ... ``layers_{L-1}``, at any depth.

    Leaves may be any pytree whose arrays carry the lead axis, quantized matrices and adapter
    collections included.
    """
    loop: dict[str, Any] = {}
    for name, node in params.items():
        if name in STACKED:
            depth = jax.tree.leaves(node)[0].shape[0]
            for i in range(depth):
                loop[f"{name}_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], node)
        else:
            loop[name] = scan_to_loop(node) if isinstance(node, Mapping) else node
    return loop


def loop_to_scan(params: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`scan_to_loop`; raises ValueError where layer numbers have gaps."""
    numbered: dict[str, dict[int, Any]] = {}
    for name, node in params.items():
        if match := NUMBERED.fullmatch(name):
            numbered.setdefault(match[1], {})[int(match[2])] = node
    scan = {
        name: loop_to_scan(node) if isinstance(node, Mapping) else node
        for name, node in params.items()
        if not NUMBERED.fullmatch(name)
    }
    for name, layers in numbered.items():
        if sorted(layers) != list(range(len(layers))):
            raise ValueError(f"{name} {sorted(layers)} do not count from 0 without gaps")
        nodes = [layers[i] for i in range(len(layers))]
        scan[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nodes)
    return scan
