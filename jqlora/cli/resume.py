"""Go on with an interrupted run or sweep.

RUN is the directory of a run that 'jqlora train' or 'jqlora sweep' began. Training goes on from
its last checkpoint and ends bit for bit where it would have ended uninterrupted.
"""

import argparse

HELP = "go on with an interrupted run or sweep"
EXAMPLES = ("jqlora resume runs/demo",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run directory."""
    parser.add_argument("run", metavar="RUN", help="the directory of the run")


def run(args: argparse.Namespace) -> int:
    """Resume; 0 when the run is complete."""
    from jqlora.cli.shared import finish
    from jqlora.run import resume

    return finish(resume(args.run))
