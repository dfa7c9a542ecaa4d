"""A tiny random BERT with a WordPiece tokenizer, and a small task that it can learn."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jqlora.io.save import save_pretrained
from jqlora.models import abstract_params, family_of
from jqlora.tree import flatten, unflatten

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
GOOD = ("good", "fine", "great", "warm")
BAD = ("bad", "dull", "poor", "cold")
OTHER = ("film", "was", "the", "a", "it", "plot", "we", "saw", "and", "actor")
CONFIG = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words above, and any other by its characters; pairs as BERT has them."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'\"-"
    pieces = [*SPECIAL, *GOOD, *BAD, *OTHER, *letters, *(f"##{c}" for c in letters)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, SPECIAL, strict=True)),
    )


def write_encoder(folder: Path) -> Path:
    """A Hugging Face directory with a random one-layer BERT of width 32."""
    tokenizer = wordpiece_tokenizer()
    config = CONFIG | {"vocab_size": len(tokenizer)}
    family = family_of(config)
    model = family.build(family.parse(config), task="masked-lm")
    generator = np.random.default_rng(0)
    params = unflatten(
        {
            path: np.ones(leaf.shape, np.float32)
            if path[-1] == "scale"
            else generator.normal(0, 0.15, leaf.shape).astype(np.float32)
            for path, leaf in flatten(abstract_params(model)).items()
        }
    )
    save_pretrained(folder, model, params, tokenizer=tokenizer)
    return folder


def reviews(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences of other words with one that tells good (1) from bad (0); two thirds are good."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        label = int(i % 3 > 0)
        words = list(generator.choice(OTHER, size=generator.integers(1, 10)))
        telling = generator.choice(GOOD if label else BAD)
        words.insert(int(generator.integers(0, len(words))), telling)
        rows.append((" ".join(map(str, words)), label))
    return rows


def write_sst2(path: Path, count: int, seed: int) -> Path:
    """As GLUE's own site writes SST-2."""
    lines = [f"{text}\t{label}" for text, label in reviews(count, seed)]
    path.write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    return path


def write_squad(path: Path, contexts: int) -> Path:
    """SQuAD 2.0's JSON: in each context one question with an answer, and one without."""
    paragraphs = []
    for i in range(contexts):
        context = f"we saw a film and it was {GOOD[i % 4]}. the actor was {BAD[i % 4]}."
        answer = GOOD[i % 4]
        asked = {"question": "it was?", "id": f"q{i}", "is_impossible": False}
        asked["answers"] = [{"text": answer, "answer_start": context.index(answer)}]
        other = {"question": "the plot was?", "id": f"n{i}", "is_impossible": True, "answers": []}
        paragraphs.append({"context": context, "qas": [asked, other]})
    tree = {"version": "v2.0", "data": [{"title": "films", "paragraphs": paragraphs}]}
    path.write_text(json.dumps(tree))
    return path


def write_t5(folder: Path) -> Path:
    """A Hugging Face directory with a random one-layer T5 of width 32."""
    tokenizer = wordpiece_tokenizer()
    tokenizer.eos_token = "[SEP]"
    config = {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 1,
        "num_heads": 4,
        "pad_token_id": 0,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": 0,
    }
    family = family_of(config)
    model = family.build(family.parse(config))
    generator = np.random.default_rng(0)
    params = unflatten(
        {
            path: np.ones(leaf.shape, np.float32)
            if path[-1] in ("scale", "weight")
            else generator.normal(0, 0.15, leaf.shape).astype(np.float32)
            for path, leaf in flatten(abstract_params(model)).items()
        }
    )
    save_pretrained(folder, model, params, tokenizer=tokenizer)
    return folder
