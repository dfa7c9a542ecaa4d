"""One comparison from the words of a user to its certificate.

Ours runs first and is dropped before theirs is loaded. Theirs is loaded once more, computing in the
next wider dtype, for the exact result: always beside bf16, and beside fp32 where a fixed budget is
exceeded. What passes between the sides are an adapter in PEFT's format and numpy arrays.
"""

import dataclasses
import datetime
import gc
import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jqlora import processor
from jqlora.attach import plan as make_plan
from jqlora.compare.budgets import BUDGETS
from jqlora.compare.files import adapter_in, round_trip
from jqlora.compare.inputs import Inputs, make_inputs
from jqlora.compare.measure import Measurement, equal_codes, measure, same_files
from jqlora.compare.observation import Observation, Recipe
from jqlora.compare.our_side import OurSide, fresh_adapters, fresh_spec
from jqlora.compare.stored import check_stored
from jqlora.errors import ConfigError, DataError
from jqlora.io import describe, load, load_tokenizer
from jqlora.io.peft import load_adapter, save_adapter
from jqlora.io.save import save_pretrained
from jqlora.io.source import Source, resolve
from jqlora.methods import Plan
from jqlora.models import family_for
from jqlora.quant import BlockQuant
from jqlora.train.usage import host_peak_bytes, versions

Say = Callable[[str], None]
EXTRA = "parity"
PACKAGES = ("torch", "peft", "bitsandbytes")


@dataclasses.dataclass(frozen=True)
class Question:
    """What is compared: a checkpoint, with ``adapter`` or a fresh one of ``rank``, its base dense
    or ``quantized``, computing in ``dtype``.

    ``length`` None is 64 tokens or what the model has positions for. ``texts`` None are built-in
    ones, or random ids for a checkpoint without a tokenizer. ``round_trip`` asks for the files of
    the base as well.
    """

    source: str
    adapter: str | None = None
    quantized: BlockQuant | None = None
    dtype: str = "float32"
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    rows: int = 4
    length: int | None = None
    rank: int = 8
    texts: Sequence[str] | None = None
    seed: int = 0
    round_trip: bool = False


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The answer: all measurements, in the order of computing, and what else a page shows."""

    facts: dict[str, Any]
    measurements: list[Measurement]
    curves: dict[str, list[float]]

    @property
    def passed(self) -> bool:
        return all(one.passed for one in self.measurements)

    @property
    def first_difference(self) -> Measurement | None:
        """The first thing in the order of computing that is not within its budget."""
        return next((one for one in self.measurements if not one.passed), None)

    def worst(self, quantity: str) -> Measurement | None:
        """The measurement of a quantity that is furthest beyond, or nearest to, its budget."""
        found = [one for one in self.measurements if one.quantity == quantity]
        return max(found, key=lambda one: (not one.passed, one.error), default=None)

    def to_json(self) -> dict[str, Any]:
        first = self.first_difference
        return {
            "passed": self.passed,
            "first_difference": None if first is None else first.to_json(),
            **self.facts,
            "losses": self.curves,
            "measurements": [one.to_json() for one in self.measurements],
        }


def compare(question: Question, say: Say = print) -> Certificate:
    """Run both sides and measure.

    Raises ConfigError for a missing package, a dtype without budgets, or steps below one, and what
    loading either side raises.
    """
    torch_side = other_side()
    if question.dtype not in BUDGETS:
        accepted = ", ".join(BUDGETS)
        raise ConfigError(f"dtype={question.dtype!r} has no budgets; accepted: {accepted}")
    if question.recipe.steps < 1:
        raise ConfigError(f"steps={question.recipe.steps}: at least one step is needed")
    budgets = BUDGETS[question.dtype]
    wider = f"theirs in {budgets.wider}"
    source = resolve(question.source)
    model, abstract = describe(source, quantize=question.quantized, dtype=question.dtype)
    check_stored(abstract, question.source)
    inputs = make_inputs(
        model,
        tokenizer_of(source, say),
        texts=question.texts,
        rows=question.rows,
        length=question.length,
        seed=question.seed,
    )
    with tempfile.TemporaryDirectory(prefix="jqlora-compare-") as name:
        scratch = Path(name)
        seconds, clock = {}, time.perf_counter()

        def lap(side: str) -> None:
            nonlocal clock
            gc.collect()
            seconds[side], clock = round(time.perf_counter() - clock, 2), time.perf_counter()

        ours, plan = _ours(question, source, inputs, scratch, say)
        lap("ours")
        base = source if question.quantized is None else resolve(scratch / "base")
        adapter = question.adapter or scratch / "ours"

        def theirs(label: str, *, exactly: bool = False) -> Observation:
            say(f"{label}: loading")
            plain = torch_side.open_base(base, model.task, question.dtype)
            peft = torch_side.adapted(plain, adapter)
            if exactly:
                peft = torch_side.exact(peft, budgets.wider)
            seen = torch_side.observe(peft, inputs.batches, question.recipe, _counter(label, say))
            if not exactly:
                torch_side.save(peft, scratch / "theirs")
            return seen

        seen = theirs("theirs")
        lap("theirs")
        stacks = family_for(model).naming_for(model.task).stacks
        exact, made = None, []
        if not budgets.calibrated:
            made = measure(ours, seen, dtype=question.dtype, stacks=stacks)
        if not all(one.passed for one in made) or budgets.calibrated:
            exact = theirs(wider, exactly=True)
            lap(wider)
            made = measure(ours, seen, dtype=question.dtype, stacks=stacks, exact=exact)
        made.append(same_files("adapter to PEFT", ours.before, seen.before, question.dtype))
        made.append(adapter_in(scratch / "theirs", model, abstract, plan, question.dtype))
        if question.quantized is not None:
            dense = torch_side.open_base(source, model.task, question.dtype)
            made.append(equal_codes(*torch_side.quantized_otherwise(dense, base.path)))
            del dense
            lap("quantizing")
        if question.round_trip:
            made.append(round_trip(source, scratch))
            lap("round trip")
    curves = {"ours": ours.losses, "theirs": seen.losses}
    if exact is not None:
        curves[wider] = exact.losses
    facts = _facts(question, model, inputs, plan) | {"seconds": seconds}
    return Certificate(facts, made, curves)


def other_side() -> Any:
    """The module that runs torch. Raises ConfigError telling what to install where it cannot."""
    try:
        from jqlora.compare import torch_side
    except ImportError as error:
        raise ConfigError(
            f"comparing needs {', '.join(PACKAGES)} ({error}): pip install 'jqlora[{EXTRA}]'"
        ) from error
    return torch_side


def tokenizer_of(source: Source, say: Say) -> Any:
    """The checkpoint's tokenizer, or None, which is said."""
    try:
        return load_tokenizer(source)
    except DataError as error:
        say(f"no tokenizer, so the inputs are random ids ({error})")
        return None


def _ours(
    question: Question, source: Source, inputs: Inputs, scratch: Path, say: Say
) -> tuple[Observation, Plan]:
    """Our observation; what theirs is to start from is left in ``scratch``: a fresh adapter in
    "ours", a base that was quantized in "base"."""
    say("ours: loading")
    model, params = load(source, quantize=question.quantized, dtype=question.dtype)
    if question.quantized is not None:
        save_pretrained(scratch / "base", model, params)
    if question.adapter is not None:
        plan, adapters = load_adapter(question.adapter, model, params)
    else:
        plan = make_plan(model, params, fresh_spec(model.task, params, question.rank))
        adapters = fresh_adapters(plan, params, question.seed)
        save_adapter(scratch / "ours", plan, adapters, model=model, base_model_name=source.label)
    side = OurSide(model, plan, question.recipe)
    say("ours: compiling")
    return side.observe(params, adapters, inputs.batches, say=_counter("ours", say)), plan


def _counter(label: str, say: Say) -> Callable[[int, int], None]:
    def count(done: int, total: int) -> None:
        if done == total or done % max(1, total // 6) == 0:
            say(f"{label}: step {done} of {total}")

    return count


def _facts(question: Question, model: Any, inputs: Inputs, plan: Plan) -> dict[str, Any]:
    budgets = BUDGETS[question.dtype]
    shape = inputs.batches[0].shown.shape
    quantized = question.quantized
    return {
        "model": question.source,
        "model_type": model.config.model_type,
        "task": model.task,
        "dtype": question.dtype,
        "quantized": None if quantized is None else str(quantized),
        "adapter": question.adapter or f"fresh LoRA of rank {question.rank}, seed {question.seed}",
        "trainable_parameters": plan.trainable_count,
        "inputs": {
            "origin": inputs.origin,
            "batches": len(inputs.batches),
            "rows": shape[0],
            "length": shape[1],
            "tokens": int(sum(batch.shown.sum() for batch in inputs.batches)),
        },
        "training": question.recipe._asdict(),
        "budgets": {**budgets.limits, "files": 0.0, "measure": budgets.measure},
        "peak_host_bytes": host_peak_bytes(),
        "versions": _versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return versions() | found | {"processor": processor.name(), "system": platform.system()}
