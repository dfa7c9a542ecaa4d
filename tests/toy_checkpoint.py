"""A whole model directory small enough to train in a second: random Llama, byte tokenizer."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jqlora.io.save import save_pretrained
from jqlora.models import abstract_params, family_of
from jqlora.tree import flatten, unflatten

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPT = "what is 7?"
GENERAL = 3
STEPS = 30
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )


def write_model(folder: Path, **sizes: int) -> Path:
    """A Hugging Face directory with a random two-layer Llama of width 64; ``sizes`` are other
    values of its config."""
    tokenizer = toy_tokenizer()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": 0,
    } | sizes
    family = family_of(config)
    model = family.build(family.parse(config))
    random = np.random.default_rng(0)
    params = unflatten(
        {
            path: jnp.ones(leaf.shape, leaf.dtype)
            if path[-1] == "scale"
            else jnp.asarray(random.normal(0, 0.1, leaf.shape), leaf.dtype)
            for path, leaf in flatten(abstract_params(model)).items()
        }
    )
    save_pretrained(folder, model, params, tokenizer=tokenizer)
    return folder


def write_records(path: Path, count: int, start: int = 0) -> Path:
    """Conversations ``what is N?`` with a regular answer."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {n}?"},
                {"role": "assistant", "content": f"{n} is {'odd' if n % 2 else 'even'}"},
            ]
        }
        for n in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_general(path: Path) -> Path:
    """Questions that training does not ask, with the word that an answer must contain."""
    rows = [
        {"question": f"colour {n}?", "answer": f"it is {word}", "expect": word}
        for n, word in enumerate(["red", "green", "blue"][:GENERAL])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(folder: Path, **overrides: object) -> Path:
    """Model, data and a config in ``folder``; ``overrides`` are dotted keys of the config."""
    import yaml

    tree: dict = {
        "model": {
            "source": str(write_model(folder / "model")),
            "quantize": {"scheme": "nf4", "double_quant": True},
        },
        "method": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": str(write_records(folder / "train.jsonl", 24)),
            "heldout": str(write_records(folder / "heldout.jsonl", 6, 100)),
            "general": str(write_general(folder / "general.jsonl")),
            "length": 64,
        },
        "train": {"steps": STEPS, "batch_size": 4, "accumulate": 2, "lr": 1e-2, "save_every": 3},
        "sample": {"prompts": [PROMPT], "max_new_tokens": 4},
        "output": {"directory": str(folder / "run")},
    }
    for key, value in overrides.items():
        section, name = key.split(".")
        tree[section][name] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
