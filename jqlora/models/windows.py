"""Which layers attend through a sliding window, as each kind of config.json says it.

A ``Window`` is the number of keys that a query sees, itself included, and for each layer whether
it has one.
"""

from collections.abc import Callable
from typing import Any

from jqlora.models.hf_keys import Reader, refuse

Window = tuple[int | None, tuple[bool, ...]]
ReadWindow = Callable[[Reader, int], Window]
WriteWindow = Callable[[int | None, tuple[bool, ...]], dict[str, Any]]
KINDS_OF_LAYER = ("full_attention", "sliding_attention")


def no_window(read: Reader, layers: int) -> Window:
    return None, (False,) * layers


def window_everywhere(read: Reader, layers: int) -> Window:
    """Mistral and Phi-3: one window for all layers, or null for none."""
    if read.get("sliding_window") is None:
        return no_window(read, layers)
    kinds = read.hf.get("layer_types")
    if kinds is not None and set(kinds) != {"sliding_attention"}:
        refuse("layer_types", kinds, "sliding_attention in every layer of this kind of model")
    return read.positive("sliding_window"), (True,) * layers


def window_above(read: Reader, layers: int) -> Window:
    """Qwen: switched on by ``use_sliding_window``, from layer ``max_window_layers`` upwards."""
    window = read.positive("sliding_window", 4096) if read.flag("use_sliding_window") else None
    first = read.hf.get("max_window_layers")
    first = 28 if first is None else first
    windowed = _layer_types(read, layers, lambda i: window is not None and i >= first)
    if any(windowed) and window is None:
        refuse(
            "layer_types",
            read.hf["layer_types"],
            "full_attention only, as use_sliding_window is off",
        )
    return (window, windowed) if any(windowed) else no_window(read, layers)


def window_alternating(read: Reader, layers: int) -> Window:
    """Gemma 2: every second layer is full, the others have windows."""
    return _window_pattern(read, layers, 2)


def window_five_of_six(read: Reader, layers: int) -> Window:
    """Gemma 3: every sixth layer is full, unless ``sliding_window_pattern`` says which."""
    return _window_pattern(read, layers, read.positive("sliding_window_pattern", 6))


def _window_pattern(read: Reader, layers: int, pattern: int) -> Window:
    windowed = _layer_types(read, layers, lambda i: bool((i + 1) % pattern))
    return read.positive("sliding_window"), windowed


def _layer_types(read: Reader, layers: int, absent: Callable[[int], bool]) -> tuple[bool, ...]:
    kinds = read.hf.get("layer_types")
    if kinds is None:
        return tuple(absent(i) for i in range(layers))
    if len(kinds) != layers or not set(kinds) <= set(KINDS_OF_LAYER):
        refuse("layer_types", kinds, f"one of {' | '.join(KINDS_OF_LAYER)} for each of {layers}")
    return tuple(kind == "sliding_attention" for kind in kinds)


def write_nothing(window: int | None, windowed: tuple[bool, ...]) -> dict[str, Any]:
    return {}


def write_everywhere(window: int | None, windowed: tuple[bool, ...]) -> dict[str, Any]:
    return {"sliding_window": window}


def write_pattern(window: int | None, windowed: tuple[bool, ...]) -> dict[str, Any]:
    names = ["sliding_attention" if inside else "full_attention" for inside in windowed]
    return {"sliding_window": window, "layer_types": names}


def write_above(window: int | None, windowed: tuple[bool, ...]) -> dict[str, Any]:
    first = windowed.index(True) if any(windowed) else len(windowed)
    switches = {"use_sliding_window": window is not None, "max_window_layers": first}
    return switches | write_pattern(window, windowed)
