"""What several commands have in common."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jqlora.errors import ConfigError

if TYPE_CHECKING:
    from jqlora.config import RunConfig
    from jqlora.quant import BlockQuant
    from jqlora.run import Outcome

FILE_SCHEMES = ("nf4", "nf4-dq", "fp4", "fp4-dq")
SCHEMES = (*FILE_SCHEMES, "int8", "int8-dq")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG files and ``key=value`` overrides, in any order; :func:`config_of` reads them."""
    parser.add_argument(
        "config",
        nargs="+",
        metavar="CONFIG|key=value",
        help="YAML files, and settings such as train.lr=1e-4 (values are YAML)",
    )


def config_of(words: Sequence[str]) -> "RunConfig":
    """The config that a command line's files and ``key=value`` words describe."""
    from jqlora.config import read_config

    return read_config(*words_of(words))


def words_of(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files and the ``key=value`` overrides among a command line's words."""
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    files = [word for word in words if word not in overrides]
    if not files:
        raise ConfigError(f"no config file among {' '.join(words)!r}: name one, then overrides")
    return files, overrides


def finish(outcome: "Outcome") -> int:
    """Say how a run ended; returns the exit status."""
    if outcome.signal is not None:
        say(f"stopped by {outcome.signal}; go on with: jqlora resume {outcome.directory}")
        return 128 + signal.Signals[outcome.signal]
    summary = outcome.summary or {}
    if "members" in summary:
        from jqlora.run.comparison import lines_of

        print(*lines_of(summary), sep="\n")
        say(f"best     {summary['best']}, by the loss on {summary['ranked_by']}")
        say(f"adapters {outcome.directory / 'members'}")
        say(f"report   {outcome.directory / 'report.html'}")
        return 0
    for name, label in (("heldout", "held-out loss"), ("general", "general answers' loss")):
        if name in summary:
            before, after = summary[name]["before"]["loss"], summary[name]["after"]["loss"]
            say(f"{label} {before:.4f} -> {after:.4f}")
    for name, found in summary.items():
        for metric, before in _metrics(found, "before").items():
            say(f"{name} {metric} {before:.4f} -> {_metrics(found, 'after')[metric]:.4f}")
    if "general_answers" in summary:
        counts = summary["general_answers"]
        say(
            f"general questions answered rightly {counts['right_before']} -> "
            f"{counts['right_after']} of {counts['asked']}"
        )
    say(f"adapter  {outcome.directory / 'adapter'}")
    say(f"report   {outcome.directory / 'report.html'}")
    return 0


def _metrics(found: Any, when: str) -> dict[str, float]:
    """The scores of one of a summary's evaluations; nothing of its other entries."""
    measured = found.get(when) if isinstance(found, dict) else None
    return measured.get("metrics", {}) if isinstance(measured, dict) else {}


def add_model_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """MODEL, ``--adapter`` (a list where ``several``), ``--quantize``, ``--dtype``, ``--cache``."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hub id, Hugging Face directory (a quantized one too: bitsandbytes, GPTQ, AWQ), "
        ".gguf file, or package:NAME",
    )
    if several:
        parser.add_argument(
            "--adapter",
            action="append",
            default=[],
            metavar="[NAME=]DIR",
            help="an adapter in PEFT's format; repeat it for several on one base",
        )
    else:
        parser.add_argument("--adapter", metavar="DIR", help="an adapter in PEFT's format")
    parser.add_argument(
        "--quantize",
        choices=SCHEMES,
        help="store the base in 4 or 8 bits (dq: double quantization)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the computation; auto is float32 on CPUs, else bfloat16",
    )
    parser.add_argument(
        "--cache",
        default="auto",
        metavar="DIR",
        help="where 4-bit codes and programs are kept for the next start: a directory, auto, off",
    )


def quantization(name: str | None, block: int = 64) -> "BlockQuant | None":
    """The storage spec that ``--quantize`` names."""
    from jqlora.config import QuantizeConfig
    from jqlora.run import choices

    if name is None:
        return None
    scheme, _, nested = name.partition("-")
    config = QuantizeConfig(scheme=scheme, block=block, double_quant=bool(nested))  # type: ignore[arg-type]
    return choices.quantization(config)


def open_model(args: argparse.Namespace, **head: Any) -> tuple[Any, Any, dict[str, Any], Any]:
    """``(model, apply, variables, tokenizer)`` for :func:`add_model_arguments`; ``head`` may ask
    for a ``task`` and ``num_labels``, which checkpoint or adapter must have."""
    from jqlora.attach import bind
    from jqlora.io.peft import load_adapter
    from jqlora.run.head import fresh_modules

    if args.adapter is None and (fresh := fresh_modules(args.model, head)):
        raise ConfigError(
            f"{args.model} has no head for {head['task']} ({', '.join(fresh)}): name an --adapter "
            "that has one"
        )
    model, params, tokenizer = open_base(args, **head)
    if args.adapter is None:
        return model, bind(model), {"params": params}, tokenizer
    plan, adapters = load_adapter(args.adapter, model, params)
    return model, bind(model, plan), {"params": params, **adapters}, tokenizer


def open_base(args: argparse.Namespace, **head: Any) -> tuple[Any, Any, Any]:
    """``(model, params, tokenizer)``, without adapters."""
    from jqlora.config import ModelConfig
    from jqlora.io import load, load_tokenizer
    from jqlora.run import choices
    from jqlora.run.head import with_skip
    from jqlora.run.keeping import keep
    from jqlora.run.loading import LoadingBar

    dtype = choices.compute_dtype(ModelConfig(source=args.model, dtype=args.dtype))
    tokenizer = load_tokenizer(args.model)
    with LoadingBar(args.model, say) as bar:
        model, params = load(
            args.model,
            quantize=quantization(args.quantize),
            dtype=dtype,
            cache=keep(args.cache, say),
            progress=bar,
            **with_skip(args.model, head),
        )
    return model, params, tokenizer


def say(text: str) -> None:
    """Print on stderr: stdout is for what a command was asked for."""
    print(text, file=sys.stderr, flush=True)
