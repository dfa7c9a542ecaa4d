"""The command ``jqlora``.

Each command is a module with ``HELP``, ``EXAMPLES``, ``add_arguments(parser)`` and ``run(args)``.
They import what they need inside ``run``, so that ``--help`` does not wait for JAX.
"""

import argparse
import importlib.metadata
import os
import signal
import sys
from collections.abc import Sequence

from jqlora.cli import cache, compare, generate, merge, plan, quantize, resume, sweep, train
from jqlora.cli import eval as evaluate
from jqlora.errors import JqloraError

COMMANDS = {
    "train": train,
    "sweep": sweep,
    "resume": resume,
    "plan": plan,
    "eval": evaluate,
    "generate": generate,
    "merge": merge,
    "quantize": quantize,
    "compare": compare,
    "cache": cache,
}
BAD_INPUT = 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="jqlora",
        description="Fine-tune Hugging Face language models with LoRA on a 4-bit base, in JAX.",
        epilog="'jqlora COMMAND --help' explains a command, with examples.",
    )
    parser.add_argument(
        "--version", action="version", version=f"jqlora {importlib.metadata.version('jqlora')}"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in module.EXAMPLES),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0 is success, 2 a mistake that the user can mend (told in one line), 128 + n that signal n
    stopped it. Anything else is a defect of jqlora and keeps its traceback.
    """
    args = build_parser().parse_args(argv)
    quiet_backends()
    try:
        return COMMANDS[args.command].run(args)
    except JqloraError as error:
        print(f"jqlora: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("jqlora: interrupted", file=sys.stderr)
        if argv is None:  # a process of its own: it waits for no thread that XLA holds
            sys.stdout.flush()
            os._exit(128 + signal.SIGINT)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output went away, as in `jqlora plan x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def quiet_backends() -> None:
    """Keep XLA's and other libraries' notes off the terminal, unless asked for them."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
