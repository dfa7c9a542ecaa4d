"""Show what a config would train, before anything is allocated.

Prints the table of adapted modules, the numbers of parameters, and the bytes that base, adapters
and optimizer will take. Only the headers of the model's files are read.
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

    sizes = plan_run(config_of(args.config))
    print(table(sizes.plan), *sizes.lines(), sep="\n")
    return 0
