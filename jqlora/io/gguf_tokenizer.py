"""A tokenizer out of the metadata of a GGUF file.

The metadata hold tokens, merges or scores, and the name of the rule that splits text before the
merges (``tokenizer.ggml.pre``), not the rule itself: that is the table below. Getting it wrong
changes how some texts are tokenized and nothing complains, so an unknown name is an error.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gguf import TokenType
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from jqlora.errors import DataError
from jqlora.io.readers.gguf_header import GGUFHeader, field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The word pattern of GPT-4's tokenizer, with as many digits to a word as the model was trained on.
_GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2_words() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits_gpt2_words() -> Any:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _gpt2_words()])


def _gpt4_words(digits: str) -> Callable[[], Any]:
    def build() -> Any:
        words = Regex(_GPT4_WORDS.format(digits=digits))
        split = pre_tokenizers.Split(words, behavior="isolated", invert=False)
        raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, raw])

    return build


# Rules as in llama.cpp's src/llama-vocab.cpp, which names them.
_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo"), _gpt2_words),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _single_digits_gpt2_words),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _gpt4_words("{1,3}")),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _gpt4_words("")),
}
_NORMALIZERS: dict[str, Callable[[], Any]] = dict.fromkeys(
    ("qwen2", "deepseek-r1-qwen"), normalizers.NFC
)
# Llama 3 takes a word that is a token as it is, before any merge, and starts every text with bos.
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3"}


def tokenizer_from_gguf(header: GGUFHeader) -> "PreTrainedTokenizerFast":
    """Byte-level BPE (``gpt2``) or SentencePiece BPE (``llama``), with special tokens and template.

    Raises DataError for other models and unknown splitting rules, CheckpointError for missing
    metadata.
    """
    from transformers import PreTrainedTokenizerFast  # takes seconds where torch is installed

    kind = field(header, "tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise DataError(
            f"GGUF tokenizers of the kind {kind!r} are not supported; "
            f"known are {', '.join(_BUILDERS)}"
        )
    tokens: list[str] = field(header, "tokenizer.ggml.tokens")
    tokenizer, starts_with_bos = _BUILDERS[kind](header, tokens)
    kinds = field(header, "tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    tokenizer.add_special_tokens(_added(tokens, kinds, TokenType.CONTROL))
    tokenizer.add_tokens(_added(tokens, kinds, TokenType.USER_DEFINED))
    special = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {
        name: field(header, f"tokenizer.ggml.{key}_token_id", None) for name, key in special.items()
    }
    named = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    if field(header, "tokenizer.ggml.add_bos_token", starts_with_bos) and "bos_token" in named:
        _start_with(tokenizer, named["bos_token"])
    architecture = field(header, "general.architecture")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=field(header, "tokenizer.chat_template", None),
        model_max_length=field(header, f"{architecture}.context_length", None),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _byte_level_bpe(header: GGUFHeader, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    rule = field(header, "tokenizer.ggml.pre", "absent")
    if rule not in _PRE_TOKENIZERS:
        raise DataError(
            f"tokenizer.ggml.pre={rule!r} names no splitting rule that is known here; known are "
            f"{', '.join(_PRE_TOKENIZERS)}; take the tokenizer of the original model instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in field(header, "tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    whole = rule in _WHOLE_WORDS
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole))
    if rule in _NORMALIZERS:
        tokenizer.normalizer = _NORMALIZERS[rule]()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[rule]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, whole


def _sentencepiece_bpe(header: GGUFHeader, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """SentencePiece's BPE merges the adjacent pair whose union has the best score."""
    scores = field(header, "tokenizer.ggml.scores")
    kinds = field(header, "tokenizer.ggml.token_type")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[float, int, int]] = []
    for i, token in enumerate(tokens):
        if kinds[i] in (TokenType.NORMAL, TokenType.USER_DEFINED):
            for n in range(1, len(token)):
                left, right = vocabulary.get(token[:n]), vocabulary.get(token[n:])
                if left is not None and right is not None:
                    merges.append((-scores[i], left, right))
    merges.sort()
    unknown = tokens[field(header, "tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(tokens[left], tokens[right]) for _, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    ends: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if field(header, "tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        ends.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer, True


_BUILDERS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}


def _added(tokens: Sequence[str], kinds: Sequence[int], kind: TokenType) -> list[AddedToken]:
    special = kind == TokenType.CONTROL
    return [
        AddedToken(token, special=special, normalized=False)
        for token, found in zip(tokens, kinds, strict=True)
        if found == kind
    ]


def _start_with(tokenizer: Tokenizer, bos: str) -> None:
    template = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    tokenizer.post_processor = template  # pyright: ignore[reportAttributeAccessIssue]
