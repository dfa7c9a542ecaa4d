"""Every kind of encoder-decoder checkpoint, one row each; a new row inherits every check."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.models import family_of, task_of
from tests.models.encoders import ANSWERS, AUTO, LABELS, SEQUENCE, TOKENS
from tests.models.variants import Checkpoint, params_from

T5 = {
    "model_type": "t5",
    "vocab_size": 67,
    "d_model": 32,
    "d_kv": 16,  # heads together are wider than the stream
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {
    "model_type": "bart",
    "vocab_size": 67,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 40,
}
ROWS: dict[str, dict[str, Any]] = {
    "t5": T5,
    # as v1.1 and FLAN: gated, with a head of its own, whose logits are not scaled
    "t5_gated_untied": T5
    | {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 10,
    },
    "mt5": T5 | {"model_type": "mt5", "layer_norm_epsilon": 1e-3},
    "bart": BART,
    "bart_scaled_relu": BART | {"scale_embedding": True, "activation_function": "relu"},
}
WRITING = "seq2seq-lm"
# which of them have heads that read, and with which of the rows above these are checked
READING = [
    ("bart", SEQUENCE),
    ("bart_scaled_relu", ANSWERS),
    ("t5_gated_untied", SEQUENCE),
    ("mt5", TOKENS),
    ("t5", ANSWERS),
]


@functools.cache
def checkpoint(name: str, task: str = WRITING, **extra: Any) -> Checkpoint:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    labels = {} if task in (WRITING, ANSWERS) else {"num_labels": LABELS}
    config = transformers.AutoConfig.for_model(**ROWS[name] | labels | extra)
    if name.startswith("bart") and task == ANSWERS:
        config.num_labels = 2  # as the class itself would say a moment later
    auto = getattr(transformers, {**AUTO, WRITING: "AutoModelForSeq2SeqLM"}[task])
    hf = auto.from_config(config, attn_implementation="eager").eval()
    untied = ROWS[name].get("tie_word_embeddings") is False
    # transformers 5 ties what it makes of a config, whatever that says
    if untied and task == WRITING:
        hf.lm_head.weight = torch.nn.Parameter(torch.empty_like(hf.lm_head.weight))
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for key, weight in (*hf.named_parameters(), *hf.named_buffers()):
            scale = "norm" in key and key.endswith("weight")
            weight.normal_(1.0 if scale else 0.0, 0.2 if scale else 0.25, generator=generator)
            if key.endswith(".q.weight"):  # T5 scales its queries' weights in place of scores
                weight.mul_(config.d_kv**-0.5)
    written = config.to_dict() | {"architectures": [type(hf).__name__]}
    written["tie_word_embeddings"] = not untied
    family = family_of(written)
    model = family.build(family.parse(written), task=task_of(written), dtype=jnp.float32)
    return Checkpoint(hf, written, model, params_from(hf.state_dict(), model))


def batch(rows: int = 3, length: int = 14, targets: int = 9, seed: int = 0) -> dict[str, Any]:
    """Rows of several lengths on both sides, padded on the right; labels -100 at padding."""
    generator = np.random.default_rng(seed)
    mask = np.arange(length)[None] < np.array([length, 9, 3, 7, 12, 5])[:rows, None]
    asked = np.arange(targets)[None] < np.array([targets, 4, 6, 9, 5, 7])[:rows, None]
    ids = generator.integers(3, 67, mask.shape)
    labels = generator.integers(3, 67, asked.shape)
    arrays = {
        "input_ids": np.where(mask, ids, 1),
        "attention_mask": mask,
        "labels": np.where(asked, labels, -100),
    }
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def read_batch(made: Checkpoint, **options: Any) -> dict[str, np.ndarray]:
    """The text's side of a batch for a head that reads; each row ends in its end token."""
    found = batch(**options)
    ids, mask = found["input_ids"], found["attention_mask"]
    end, padding = made.config["eos_token_id"], made.config["pad_token_id"]
    last = np.arange(ids.shape[1])[None] == mask.sum(1, keepdims=True) - 1
    ids = np.where(last, end, np.where(mask > 0, ids, padding))
    return {"input_ids": ids.astype(np.int32), "attention_mask": mask}


def decoder_inputs(config: Any, labels: np.ndarray) -> np.ndarray:
    """The labels one place later, behind the start."""
    start = np.full((len(labels), 1), config.decoder_start_token_id)
    shifted = np.concatenate([start, labels[:, :-1]], 1)
    return np.where(shifted == -100, config.pad_token_id, shifted).astype(np.int32)


def run_theirs(hf: Any, **arrays: Any) -> Any:
    """transformers' output for numpy inputs, without gradients."""
    import torch

    with torch.no_grad():
        tensors = {name: torch.tensor(array).long() for name, array in arrays.items()}
        return hf(**tensors, output_hidden_states=True)
