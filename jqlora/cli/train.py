"""Fine-tune a model as a config says.

CONFIG is a YAML file; of several, later ones override earlier ones, and key=value overrides them
all. The run directory then holds the adapter (PEFT's format), metrics, plots, report.html and
checkpoints. Ctrl-C saves a checkpoint first; whatever stops the run, 'jqlora resume' goes on with
it.
"""

import argparse

from jqlora.cli.shared import add_config_arguments

HELP = "fine-tune a model as a config says"
EXAMPLES = (
    "jqlora train configs/run/demo.yaml",
    "jqlora train configs/run/demo.yaml train.lr=1e-4 output.directory=runs/gentle",
    "jqlora train configs/run/demo.yaml configs/method/lora_attention.yaml",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG files and overrides."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the run is complete."""
    from jqlora.cli.shared import config_of, finish
    from jqlora.run import train

    return finish(train(config_of(args.config)))
