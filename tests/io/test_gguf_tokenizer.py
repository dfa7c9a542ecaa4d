"""Tokenizers rebuilt from GGUF metadata split text as the originals do."""

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jqlora.errors import DataError
from jqlora.io import load_tokenizer

CORPUS = [
    "The year 2024 wasn't 1999, they'll say; we've got 12345 reasons.\n\n  indented",
    "def f(x):\n    return x ** 2  # naïve",
    "Größe: 10 000 km² — “quoted” … 日本語テキスト 42",
    "WE'LL see, don't you? I'm sure it's fine.  Two  spaces.\t\ttabs\r\n",
] * 3
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|bos|>", "<|eos|>", "<|user|>"]
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def raw_bytes():
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def words(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), raw_bytes()])


RULES = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "llama-bpe": lambda: words(LLAMA3),
    "qwen2": lambda: words(LLAMA3.replace("{1,3}", "")),
}


def trained(rule):
    """A byte-level BPE tokenizer that splits by ``rule``, as its tokenizer.json would hold it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    tokenizer.pre_tokenizer = RULES[rule]()
    tokenizer.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_gguf(path, kind, tokens, types, **fields):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in fields.items():
        getattr(writer, name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_gguf(path, tokenizer, rule, **fields):
    import json

    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens]
    merges = [" ".join(merge) for merge in model["merges"]]
    return write_gguf(
        path, "gpt2", tokens, types, add_token_merges=merges, add_tokenizer_pre=rule, **fields
    )


@pytest.mark.parametrize("rule", RULES)
def test_each_splitting_rule_tokenizes_as_the_original(tmp_path, rule):
    original = trained(rule)
    path = as_gguf(tmp_path / "toy.gguf", original, rule, add_add_bos_token=False)
    ours = load_tokenizer(path)
    for text in [*CORPUS, "<|user|>hello 123456<|eos|>", "café", ""]:
        assert ours(text).input_ids == original.encode(text).ids, text
    assert ours.decode(ours(CORPUS[0]).input_ids) == CORPUS[0]
    assert (ours.bos_token, ours.eos_token) == ("<|bos|>", "<|eos|>")
    assert ours.model_max_length == 128


def test_the_rules_differ_where_it_matters(tmp_path):
    """Otherwise the test above would not notice a wrong one."""
    counts = {len(trained(rule).encode("x 12345 y").tokens) for rule in ("gpt-2", "smollm")}
    assert len(counts) == 2


@pytest.mark.parametrize(("rule", "expected"), [("llama-bpe", True), ("gpt-2", False)])
def test_bos_is_put_in_front_where_the_model_expects_it(tmp_path, rule, expected):
    path = as_gguf(tmp_path / "toy.gguf", trained(rule), rule)
    assert (load_tokenizer(path)("hi").input_ids[0] == 0) == expected
    forced = as_gguf(tmp_path / "b.gguf", trained(rule), rule, add_add_bos_token=not expected)
    assert (load_tokenizer(forced)("hi").input_ids[0] == 0) != expected


def test_the_chat_template_renders_and_everything_survives_saving(tmp_path):
    path = as_gguf(tmp_path / "toy.gguf", trained("smollm"), "smollm", add_chat_template=TEMPLATE)
    ours = load_tokenizer(path)
    chat = [{"role": "user", "content": "hi 77"}]
    text = ours.apply_chat_template(chat, tokenize=False)
    assert text == "<|bos|>hi 77<|eos|>"
    ours.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"")
    again = load_tokenizer(tmp_path / "saved")
    assert again.apply_chat_template(chat, tokenize=False) == text
    for text in CORPUS:
        assert again(text).input_ids == ours(text).input_ids


def test_sentencepiece_models_merge_by_score(tmp_path):
    """A BPE model with SentencePiece's normalization; scores are minus the rank of the merge."""
    original = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    original.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    original.train_from_iterator(CORPUS[:2], trainer)
    tokens = [original.id_to_token(i) for i in range(original.get_vocab_size())]
    kinds = gguf.TokenType
    types = [kinds.CONTROL, kinds.CONTROL, kinds.UNKNOWN, *[kinds.BYTE] * 256]
    types += [kinds.NORMAL] * (len(tokens) - len(types))
    path = write_gguf(
        tmp_path / "toy.gguf",
        "llama",
        tokens,
        types,
        add_token_scores=[-float(i) for i in range(len(tokens))],
        add_unk_token_id=2,
    )
    ours = load_tokenizer(path)
    for text in [*CORPUS[:2], "return the reasons 12", "日本"]:
        ids = ours(text).input_ids
        assert ids[0] == 0
        assert ids[1:] == original.encode(text).ids, text
        assert ours.decode(ids, skip_special_tokens=True) == text


def test_what_cannot_be_rebuilt_is_named(tmp_path):
    path = as_gguf(tmp_path / "a.gguf", trained("gpt-2"), "tekken")
    with pytest.raises(DataError, match=r"pre='tekken' names no splitting rule.*known are gpt-2"):
        load_tokenizer(path)
    path = write_gguf(tmp_path / "b.gguf", "bert", ["a", "b"], [1, 1])
    with pytest.raises(DataError, match="kind 'bert' are not supported; known are gpt2, llama"):
        load_tokenizer(path)
    path = write_gguf(tmp_path / "c.gguf", "gpt2", ["a", "b"], [1, 1], add_tokenizer_pre="gpt-2")
    with pytest.raises(DataError, match=r"c\.gguf: .*lack 'tokenizer\.ggml\.merges'"):
        load_tokenizer(path)


def test_a_directory_without_or_with_a_broken_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"has no tokenizer: none of tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be used"):
        load_tokenizer(tmp_path)
