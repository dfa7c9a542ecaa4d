"""Reading single keys of config.json, strictly: what transformers would treat differently raises.

Keys that do not change the network (``use_cache``, ``transformers_version``, ...) are ignored.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from jqlora.errors import CheckpointError
from jqlora.models.activations import ACTIVATIONS
from jqlora.models.rope import SCALINGS, Rope

DTYPES = ("float32", "bfloat16", "float16")
Window = tuple[int | None, tuple[bool, ...]]


def refuse(key: str, value: Any, accepted: Iterable[Any] | str) -> NoReturn:
    """Raises CheckpointError naming the key, its value and what is accepted."""
    accepted = accepted if isinstance(accepted, str) else ", ".join(map(str, accepted))
    raise CheckpointError(f"config.json: {key}={value!r} is not supported; accepted: {accepted}")


@dataclass(frozen=True)
class Reader:
    """Typed access to a parsed config.json; null counts as absent."""

    hf: Mapping[str, Any]

    def kind(self) -> "Kind":
        name = self.hf.get("model_type")
        if name not in KINDS:
            refuse("model_type", name, KINDS)
        return KINDS[name]

    def positive(self, key: str, default: int | None = None) -> int:
        value = default if self.hf.get(key) is None else self.hf[key]
        if value is None:
            raise CheckpointError(f"config.json: {key} is missing; expected a positive integer")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            refuse(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = default if self.hf.get(key) is None else self.hf[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            refuse(key, value, "a number not below 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.hf.get(key)
        if value not in (None, False, True):
            refuse(key, value, (True, False))
        return bool(value)

    def require(self, key: str, only: Any) -> None:
        value = self.hf.get(key)
        if value is not None and value != only:
            refuse(key, value, (only,))

    def activation(self) -> str:
        value = self.hf.get("hidden_act") or "silu"
        if value not in ACTIVATIONS:
            refuse("hidden_act", value, ACTIVATIONS)
        return value

    def tokens(self, key: str) -> tuple[int, ...]:
        value = self.hf.get(key)
        ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            refuse(key, value, "a token id or a list of them")
        return tuple(ids)

    def token(self, key: str) -> int | None:
        ids = self.tokens(key)
        if len(ids) > 1:
            refuse(key, self.hf[key], "one token id")
        return ids[0] if ids else None

    def dtype(self) -> str | None:
        key = "dtype" if self.hf.get("dtype") is not None else "torch_dtype"
        value = self.hf.get(key)
        if value is None:
            return None
        name = str(value).removeprefix("torch.")
        if name not in DTYPES:
            refuse(key, value, DTYPES)
        return name


def _no_window(read: Reader, layers: int) -> Window:
    return None, (False,) * layers


def _window_everywhere(read: Reader, layers: int) -> Window:
    # transformers' default is 4096 where the key is absent; null means none
    if "sliding_window" in read.hf and read.hf["sliding_window"] is None:
        return _no_window(read, layers)
    kinds = read.hf.get("layer_types")
    if kinds is not None and set(kinds) != {"sliding_attention"}:
        refuse("layer_types", kinds, "sliding_attention in every layer of a mistral model")
    return read.positive("sliding_window", 4096), (True,) * layers


def _window_by_layer(read: Reader, layers: int) -> Window:
    window = read.positive("sliding_window", 4096) if read.flag("use_sliding_window") else None
    kinds = read.hf.get("layer_types")
    if kinds is None:
        first = read.hf.get("max_window_layers")
        first = 28 if first is None else first
        windowed = tuple(window is not None and i >= first for i in range(layers))
    else:
        accepted = ("full_attention", "sliding_attention")
        if len(kinds) != layers or not set(kinds) <= set(accepted):
            refuse("layer_types", kinds, f"one of {' | '.join(accepted)} for each of {layers}")
        windowed = tuple(kind == "sliding_attention" for kind in kinds)
        if any(windowed) and window is None:
            refuse("layer_types", kinds, "full_attention only, as use_sliding_window is off")
    return (window, windowed) if any(windowed) else _no_window(read, layers)


def _write_window_by_layer(window: int | None, windowed: tuple[bool, ...]) -> dict[str, Any]:
    names = ["sliding_attention" if inside else "full_attention" for inside in windowed]
    first = windowed.index(True) if any(windowed) else len(windowed)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": names,
    }


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one ``model_type`` spells what is common to all, and its defaults in transformers."""

    name: str
    architecture: str
    max_positions: int
    kv_heads: int | None = None
    qkv_bias: bool = False
    has_bias_keys: bool = False
    read_window: Callable[[Reader, int], Window] = _no_window
    write_window: Callable[[int | None, tuple[bool, ...]], dict[str, Any]] = lambda *_: {}


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="llama",
            architecture="LlamaForCausalLM",
            max_positions=2048,
            has_bias_keys=True,
        ),
        Kind(
            name="mistral",
            architecture="MistralForCausalLM",
            max_positions=4096 * 32,
            kv_heads=8,
            read_window=_window_everywhere,
            write_window=lambda window, _: {"sliding_window": window},
        ),
        Kind(
            name="qwen2",
            architecture="Qwen2ForCausalLM",
            max_positions=32768,
            kv_heads=32,
            qkv_bias=True,
            read_window=_window_by_layer,
            write_window=_write_window_by_layer,
        ),
    )
}


def read_rope(hf: Mapping[str, Any], max_positions: int) -> Rope:
    """Rotary parameters of a config in either spelling, with transformers' precedence."""
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    given = dict(hf.get(key) or {})
    if any(isinstance(value, Mapping) for value in given.values()):
        refuse(key, given, "one set of rotary parameters for all layers")
    old_name = given.pop("type", "default")
    name = given.pop("rope_type", None) or old_name
    if name not in SCALINGS:
        refuse(f"{key}['rope_type']", name, SCALINGS)
    scaling = SCALINGS[name]
    theta = given.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    if given.pop("partial_rotary_factor", None) not in (None, 1.0):
        refuse(f"{key}['partial_rotary_factor']", (hf[key])["partial_rotary_factor"], (1.0,))
    given = {option: value for option, value in given.items() if value is not None}
    known = (*scaling.required, *scaling.optional)
    for option, value in given.items():
        if option not in known:
            refuse(f"{key}['{option}']", value, known or f"no option for rope_type {name!r}")
    for option in scaling.required:
        if option not in given:
            raise CheckpointError(f"config.json: {key} of rope_type {name!r} lacks {option!r}")
    if "original_max_position_embeddings" in known:
        outside = hf.get("original_max_position_embeddings")
        given.setdefault("original_max_position_embeddings", max_positions)
        if outside is not None:
            given["original_max_position_embeddings"] = outside
    return Rope(type=name, theta=float(theta), options=tuple(sorted(given.items())))


def write_rope(rope: Rope, spelling: str) -> dict[str, Any]:
    """Inverse of :func:`read_rope`."""
    options = dict(rope.options)
    if spelling == "new":
        return {"rope_parameters": {"rope_theta": rope.theta, "rope_type": rope.type, **options}}
    scaling = None if rope.type == "default" else {"rope_type": rope.type, **options}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
