"""Reading single keys of config.json, strictly: what transformers would treat differently raises.

Keys that do not change the network (``use_cache``, ``transformers_version``, ...) are ignored.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from jqlora.errors import CheckpointError
from jqlora.models.activations import ACTIVATIONS

DTYPES = ("float32", "bfloat16", "float16")


def refuse(key: str, value: Any, accepted: Iterable[Any] | str) -> NoReturn:
    """Raises CheckpointError naming the key, its value and what is accepted."""
    accepted = accepted if isinstance(accepted, str) else ", ".join(map(str, accepted))
    raise CheckpointError(f"config.json: {key}={value!r} is not supported; accepted: {accepted}")


@dataclass(frozen=True)
class Reader:
    """Typed access to a parsed config.json.

    ``defaults`` are transformers' own for keys that are absent; a key that is null is none of them.
    """

    hf: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        return self.hf[key] if key in self.hf else self.defaults.get(key)

    def positive(self, key: str, default: int | None = None) -> int:
        value = default if self.get(key) is None else self.get(key)
        if value is None:
            raise CheckpointError(f"config.json: {key} is missing; expected a positive integer")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            refuse(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = default if self.get(key) is None else self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            refuse(key, value, "a number not below 0")
        return float(value)

    def above_zero(self, key: str) -> float | None:
        """A number above 0, or None where the key is null or absent without default."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            refuse(key, value, "a number above 0, or null")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value not in (None, False, True):
            refuse(key, value, (True, False))
        return bool(value)

    def require(self, key: str, only: Any) -> None:
        value = self.hf.get(key)
        if value is not None and value != only:
            refuse(key, value, (only,))

    def activation(self, key: str = "hidden_act") -> str:
        value = self.get(key) or "silu"
        if value not in ACTIVATIONS:
            refuse(key, value, ACTIVATIONS)
        return value

    def tokens(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
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


def under_own_names(hf: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The config with what only an alias says under its key as well, as transformers reads it."""
    named = {key: hf[alias] for key, alias in aliases.items() if alias in hf and key not in hf}
    return {**hf, **named}


def as_written(tokens: Sequence[int]) -> int | list[int] | None:
    """Token ids as config.json has them: one alone, several in a list, null for none."""
    return list(tokens) if len(tokens) > 1 else (tokens[0] if tokens else None)
