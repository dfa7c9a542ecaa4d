"""Every kind of encoder checkpoint with its heads, one row each; a new row inherits every check."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.models import family_of, task_of
from tests.models.variants import params_from

TINY = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
BASES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "type_vocab_size": 3},
    "roberta": {"model_type": "roberta"},
    "xlm_roberta_relu": {"model_type": "xlm-roberta", "type_vocab_size": 1, "hidden_act": "relu"},
    # as the published v3: shared projections, normed log buckets, no absolute positions
    "deberta_v3": {
        "model_type": "deberta-v2",
        "relative_attention": True,
        "pos_att_type": "p2c|c2p",
        "share_att_key": True,
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "legacy": False,
    },
    # as the published v2 with its convolution, and all that may differ
    "deberta_v2": {
        "model_type": "deberta-v2",
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "max_relative_positions": 6,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
        "conv_groups": 2,
        "type_vocab_size": 2,
        "embedding_size": 24,
    },
    "deberta_c2p_only": {
        "model_type": "deberta-v2",
        "relative_attention": True,
        "pos_att_type": ["c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm|other",
    },
    "deberta_absolute": {"model_type": "deberta-v2", "type_vocab_size": 2},
}
MASKED, SEQUENCE = "masked-lm", "sequence-classification"
TOKENS, ANSWERS = "token-classification", "question-answering"
AUTO = {
    MASKED: "AutoModelForMaskedLM",
    SEQUENCE: "AutoModelForSequenceClassification",
    TOKENS: "AutoModelForTokenClassification",
    ANSWERS: "AutoModelForQuestionAnswering",
}
HEADS = {
    "bert": (MASKED, SEQUENCE, TOKENS, ANSWERS),
    "roberta": (MASKED, SEQUENCE, TOKENS, ANSWERS),
    "xlm_roberta_relu": (MASKED,),
    "deberta_v3": (MASKED, SEQUENCE, TOKENS, ANSWERS),
    "deberta_v2": (MASKED, SEQUENCE),
    "deberta_c2p_only": (TOKENS,),
    "deberta_absolute": (SEQUENCE,),
}
ROWS = [(base, task) for base, tasks in HEADS.items() for task in tasks]
LABELS = 3


class Encoder(NamedTuple):
    hf: Any  # transformers' model, float32, eager attention
    config: dict[str, Any]  # as transformers writes config.json
    model: Any
    params: dict[str, Any]


@functools.cache
def checkpoint(base: str, task: str, **extra: Any) -> Encoder:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    labels = {} if task == ANSWERS else {"num_labels": LABELS}
    config = transformers.AutoConfig.for_model(**TINY | BASES[base] | labels | extra)
    auto = getattr(transformers, AUTO[task])
    hf = auto.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(sum(f"{base}{task}".encode()))
    with torch.no_grad():
        for key, weight in hf.named_parameters():
            scale = "norm" in key.lower() and key.endswith("weight")
            center, spread = (1.0, 0.2) if scale else (0.0, 0.25)
            weight.normal_(center, spread, generator=generator)
    written = config.to_dict() | {"architectures": [type(hf).__name__]}
    family = family_of(written)
    model = family.build(family.parse(written), task=task_of(written), dtype=jnp.float32)
    return Encoder(hf, written, model, params_from(hf.state_dict(), model))


def batch(encoder: Encoder, rows: int = 3, length: int = 14, seed: int = 0) -> dict[str, Any]:
    """Rows of several lengths, padded on the right, with token types where the model has some."""
    generator = np.random.default_rng(seed)
    mask = np.arange(length)[None] < np.array([length, 9, 3, 7, 12, 5, 11, 6])[:rows, None]
    ids = np.where(mask, generator.integers(3, 60, mask.shape), encoder.config["pad_token_id"])
    kinds = generator.integers(0, max(encoder.config["type_vocab_size"], 1), mask.shape)
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def targets(encoder: Encoder, inputs: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Labels for these inputs, in the words of transformers; -100 where nothing is asked."""
    generator = np.random.default_rng(seed + 1)
    task, mask = encoder.model.task, inputs["attention_mask"].astype(bool)
    rows, length = mask.shape
    if task == ANSWERS:
        ends = generator.integers(0, 3, (2, rows))
        made = {"start_positions": ends[0], "end_positions": ends[1] + 1}
    elif task == SEQUENCE:
        made = {"labels": generator.integers(0, encoder.model.config.num_labels, rows)}
    else:
        count = encoder.config["vocab_size"] if task == MASKED else encoder.model.config.num_labels
        asked = mask & (generator.random(mask.shape) < 0.7)
        made = {"labels": np.where(asked, generator.integers(0, count, (rows, length)), -100)}
    return {name: array.astype(np.int32) for name, array in made.items()}


def run_theirs(encoder: Encoder, arrays: dict[str, Any]) -> Any:
    """transformers' output for numpy inputs, without gradients."""
    import torch

    def tensor(array: np.ndarray) -> Any:
        made = torch.tensor(array)
        return made.long() if array.dtype.kind == "i" else made

    # transformers would keep the kind of problem that it infers from the first labels
    encoder.hf.config.problem_type = encoder.config.get("problem_type")
    with torch.no_grad():
        return encoder.hf(**{n: tensor(a) for n, a in arrays.items()}, output_hidden_states=True)


def logits_of(output: Any) -> np.ndarray:
    """All logits of an output, those of both ends beside each other."""
    if hasattr(output, "start_logits"):
        return np.stack([np.asarray(output.start_logits), np.asarray(output.end_logits)], -1)
    return np.asarray(output.logits)
