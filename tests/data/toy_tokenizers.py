"""Tokenizers small enough to follow by eye: one token a byte, three special ones, some merges."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(chat_template=None, *, merges=(), bos=False, eos=True):
    """Byte-level BPE; pad and end of turn are one token, as in many published models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} if eos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **ends)
    fast.chat_template = chat_template
    return fast


def metaspace_tokenizer(characters, *, merges=()):
    """A token per character, words begun by U+2581 and the first one too, as in SentencePiece."""
    vocab = [*sorted({*characters, "\u2581"}), *(a + b for a, b in merges)]
    model = models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=list(merges))
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
