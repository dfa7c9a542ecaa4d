"""Show what a config would train, before anything is allocated.

Prints the table of adapted modules, the numbers of parameters, the bytes that base, adapters and
optimizer will take, and which kernels will multiply by the quantized matrices on this device. Only
the headers of the model's files are read.
"""

import argparse

from jqlora.cli.shared import add_config_arguments

HELP = "show what a config would train, without allocating it"
EXAMPLES = (
    "jqlora plan configs/run/demo.yaml",
    "jqlora plan configs/run/demo.yaml method.rank=64 model.quantize=null",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG files and overrides."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table and the totals."""
    from jqlora.cli.shared import config_of
    from jqlora.run import plan_run, table
    from jqlora.run.backends import backend_lines

    config = config_of(args.config)
    sizes = plan_run(config)
    print(table(sizes.plan), *sizes.lines(), *backend_lines(config), sep="\n")
    return 0
