"""Show what a config would train, before anything is allocated.

Prints the table of adapted modules, the numbers of parameters, the bytes that base, adapters and
optimizer will take, and which kernels will multiply by the quantized matrices on this device. Only
the headers of the model's files are read, and a directory with a config.json alone will do.

With --device or --memory the training step is compiled for a GPU that need not be there (extra
"aot"), and its memory is told to the byte; without that extra it is estimated from shapes. Where it
does not fit, what would make it fit is found by trying, and --write keeps that config.
"""

import argparse
import dataclasses
import re
from typing import TYPE_CHECKING

from jqlora.cli.shared import add_config_arguments
from jqlora.errors import ConfigError

if TYPE_CHECKING:
    from jqlora.run.memory import Device

HELP = "show what a config would train, without allocating it"
EXAMPLES = (
    "jqlora plan configs/run/demo.yaml",
    "jqlora plan configs/run/demo.yaml method.rank=64 model.quantize=null",
    "jqlora plan configs/run/llama3_8b_qlora.yaml --device rtx4090 --write fits.yaml",
    "jqlora plan configs/run/llama3_8b_qlora.yaml --memory 12GB",
)
UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG files and overrides, and the device to compile for."""
    add_config_arguments(parser)
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="compile the step for h100, h200, a100 (80 GB), a100-40, a10, l4, l40, rtx3090, "
        "rtx4090, or for the GPU that is here",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="of the device, as 24GB or 22.5GiB; without --device an A100 with so much",
    )
    parser.add_argument("--write", metavar="FILE", help="keep the config that fits")


def run(args: argparse.Namespace) -> int:
    """Print the table and the totals; with a device, 1 where nothing was found to fit."""
    from jqlora.cli.shared import config_of
    from jqlora.run import plan_run, table
    from jqlora.run.backends import backend_lines

    config = config_of(args.config)
    target = target_of(args.device, args.memory)
    if args.write and target is None:
        raise ConfigError("--write keeps a config that fits: say what into, --device or --memory")
    if target is None:
        sizes = plan_run(config, weightless=True)
        print(table(sizes.plan), *sizes.lines(), *backend_lines(config), sep="\n")
        return 0
    from jqlora.run.fitting import fit_into
    from jqlora.run.memory import named, on_gpu

    config = on_gpu(config)
    sizes = plan_run(config, weightless=True)
    print(table(sizes.plan), *sizes.lines(), sep="\n")
    print(*backend_lines(config, named(target)), sep="\n")
    return fit_into(config, target, say=lambda line: print(line, flush=True), write=args.write)


def target_of(device: str | None, memory: str | None) -> "Device | None":
    """The device that the options mean. Raises ConfigError for one that is not known, or not
    here."""
    if device is None and memory is None:
        return None
    import jax

    from jqlora.run.memory import Present
    from jqlora_kernels.aot_targets import TARGETS

    target: Device
    if device == "here":
        target = Present.here()
    elif device is not None and device not in TARGETS:
        raise ConfigError(f"--device {device}: known are {', '.join(TARGETS)}, here")
    else:
        # or jax would look for a GPU, and no plugin can compile without one
        jax.config.update("jax_platforms", "cpu")
        target = TARGETS[device or "a100"]
    return target if memory is None else dataclasses.replace(target, memory=bytes_of(memory))


def bytes_of(text: str) -> int:
    """``24GB`` in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM]i?B)", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"--memory {text}: give a number and GB, GiB, MB or MiB, such as 24GB")
    return int(float(found[1]) * UNITS[found[2].upper()])
