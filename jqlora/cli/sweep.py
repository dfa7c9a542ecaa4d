"""Train every combination of some settings at once, on one base.

CONFIG and key=value are those of 'jqlora train'; each --vary names a setting and its values, and
every combination of them is a member. All members are trained by one program that reads the base
once for each step, and each comes out as it would from 'jqlora train' alone. What belongs to an
adapter or its optimizer can vary: method.* (but modules_to_save and dtype), train.lr, schedule,
warmup, optimizer, betas, weight_decay, max_grad_norm, lora_plus_ratio, freeze_a, seed. With
data.seed=0 a seed is of adapters and dropout alone: members then share the order of the data, what
is held out, and a task's fresh head. The directory then holds members/NAME/ (a run directory each),
results.csv, plots and report.html.
Memory for activations, adapters and optimizer grows with the members; the base is there once.
"""

import argparse

from jqlora.cli.shared import add_config_arguments

HELP = "train many settings at once on one base"
EXAMPLES = (
    "jqlora sweep configs/run/demo.yaml --vary train.lr=1e-4,3.5e-4,1e-3 \\",
    "    output.directory=runs/rates",
    "jqlora sweep configs/run/demo.yaml --vary method.rank=4,16 --vary train.seed=0,1 \\",
    "    output.directory=runs/ranks",
    "jqlora sweep configs/run/demo.yaml --vary 'method.targets=all-linear,[q_proj,v_proj]'",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG files and overrides, and what varies."""
    add_config_arguments(parser)
    parser.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="KEY=V1,V2,...",
        help="a setting and its values (YAML); repeat it for a grid",
    )


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the sweep is complete."""
    from jqlora.cli.shared import finish, words_of
    from jqlora.config.grid import expand
    from jqlora.run import sweep

    return finish(sweep(expand(*words_of(args.config), args.vary)))
