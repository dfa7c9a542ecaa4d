"""Making a run fit a device: what is given up first costs least.

Changes are made one after the other until the step fits; then the earlier ones are taken back, the
dearest first, where it fits without them. Every trial compiles the step, or estimates it where it
cannot be compiled.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jqlora.config import QuantizeConfig, RunConfig, dump_config
from jqlora.io.atomic import atomic_write_text
from jqlora.run.estimate import step_memory
from jqlora.run.memory import RESERVED, Device, Memory
from jqlora.train.usage import readable_bytes

Say = Callable[[str], None]
EIGHT_BIT = {
    "adamw": "adamw8bit",
    "adamw16bit": "adamw8bit",
    "lion": "lion8bit",
    "lion16bit": "lion8bit",
}
SHORTEST, SMALLEST_RANK = 128, 4


class Change(NamedTuple):
    """One setting, as an override says it, and its value."""

    key: str
    value: Any
    why: str

    def made_in(self, config: RunConfig) -> RunConfig:
        section, name = self.key.split(".")
        changed = dataclasses.replace(getattr(config, section), **{name: self.value})
        return dataclasses.replace(config, **{section: changed})

    def __str__(self) -> str:
        value = "{scheme: nf4}" if isinstance(self.value, QuantizeConfig) else self.value
        return f"{self.key}={value}: {self.why}"


def changes(config: RunConfig) -> Iterator[Change]:
    """What may make room, the cheapest first; each for the config with all before it made."""
    model, train, length = config.model, config.train, config.data.length
    if model.remat == "none":
        yield Change("model.remat", "dots", "recompute all but products, the same numbers")
    if model.remat in ("none", "dots"):
        yield Change("model.remat", "full", "recompute layers, the same numbers, slower")
    rows = train.batch_size // train.accumulate
    while rows > 1:
        rows = max(r for r in range(1, rows) if train.batch_size % r == 0)
        parts = train.batch_size // rows
        yield Change("train.accumulate", parts, "smaller micro-batches, the same numbers")
    if model.quantize is None:
        yield Change("model.quantize", QuantizeConfig(), "the base in 4 bits: QLoRA")
    if train.offload != "all" and train.optimizer not in ("sgd", "adafactor"):
        yield Change("train.offload", "all", "moments in host memory, the same numbers")
    if config.method.dtype != "bfloat16":
        yield Change("method.dtype", "bfloat16", "adapters in half the bytes, rounded at random")
    if train.optimizer in EIGHT_BIT:
        yield Change("train.optimizer", EIGHT_BIT[train.optimizer], "moments in 8 bits")
    if model.remat != "offload":
        yield Change("model.remat", "offload", "layers' inputs in host memory, the same numbers")
    while length // 2 >= SHORTEST:
        length //= 2
        yield Change("data.length", length, "shorter rows")
    rank = getattr(config.method, "rank", SMALLEST_RANK)
    while rank // 2 >= SMALLEST_RANK:
        rank //= 2
        yield Change("method.rank", rank, "smaller adapters")


def fit_into(config: RunConfig, target: Device, *, say: Say, write: str | None = None) -> int:
    """Says what the config's step needs of the device, and what would make it fit; 0 if it fits
    then, else 1. A config that fits is written to ``write``."""
    found = step_memory(config, target)
    for line in found.lines(target):
        say(line)
    made: list[Change] = []
    if not found.fits(target):
        say(f"  does not fit {room_of(target)}; trying what would")
        made, found = search(config, target, found, say)
        for change in made:
            config = change.made_in(config)
    if not found.fits(target):
        say("  nothing that was tried fits: take a smaller model or a larger device")
        return 1
    if made:
        say("fits with")
        for change in made:
            say(f"  {change}")
        for line in found.lines(target):
            say(line)
    say(f"  fits {room_of(target)}, with {readable_bytes(left(found, target))} to spare")
    advise(config, target, found, say)
    if write is not None:
        atomic_write_text(write, dump_config(config))
        say(f"wrote {write}")
    return 0


def search(
    config: RunConfig, target: Device, found: Memory, say: Say
) -> tuple[list[Change], Memory]:
    """The changes that make the step fit, and what it needs with them; or all changes."""

    def needs(made: list[Change]) -> Memory:
        changed = config
        for change in made:
            changed = change.made_in(changed)
        memory = step_memory(changed, target)
        keys = ", ".join(f"{change.key}={_word(change.value)}" for change in made)
        say(f"  {readable_bytes(memory.peak):>10} with {keys}")
        return memory

    made: dict[str, Change] = {}
    for change in changes(config):
        made.pop(change.key, None)
        made[change.key] = change  # behind all others, which may be taken back
        found = needs([*made.values()])
        if found.fits(target):
            break
    else:
        return [*made.values()], found
    for key in [*made][-2::-1]:
        others = [change for change in made.values() if change.key != key]
        smaller = needs(others)
        if smaller.fits(target):
            made, found = {change.key: change for change in others}, smaller
    return [*made.values()], found


def advise(config: RunConfig, target: Device, found: Memory, say: Say) -> None:
    """Says where 4 bits save nothing.

    They save no more than what they take off the base, and cost a decoded matrix; only where that
    is close is the step compiled whole too.
    """
    quantized = found.codes + found.scales
    if not quantized or quantized > found.temporaries:
        return
    plain = dataclasses.replace(config.model, quantize=None)
    whole = step_memory(dataclasses.replace(config, model=plain), target)
    if whole.peak <= found.peak:
        say(
            f"  without model.quantize the step needs {readable_bytes(whole.peak)}, no more: on "
            "this model and batch QLoRA saves nothing over LoRA"
        )
    else:
        say(f"  without model.quantize it would need {readable_bytes(whole.peak)}")


def room_of(target: Device) -> str:
    """The device's memory in words."""
    return (
        f"{readable_bytes(target.memory)} less {readable_bytes(RESERVED)} for the driver and "
        "libraries"
    )


def left(found: Memory, target: Device) -> int:
    """Bytes that the step leaves."""
    return target.memory - RESERVED - found.peak


def _word(value: Any) -> Any:
    return "nf4" if isinstance(value, QuantizeConfig) else value
