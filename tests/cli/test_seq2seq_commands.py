"""The commands on an encoder-decoder."""

import argparse

import pytest
from tokenizers import processors

from jqlora.cli import main
from jqlora.cli.generate import prompt_ids
from tests.toy_checkpoint import toy_tokenizer, write_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "num_hidden_layers": 1,
    "d_kv": 16,
    "d_ff": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}


def test_generate_reads_the_prompt_with_the_ends_that_the_tokenizer_gives_it(tmp_path, capsys):
    folder = write_model(tmp_path / "model", **T5)
    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 0)]
    )
    args = argparse.Namespace(prompt="once", system=None, plain=False)
    bare = toy_tokenizer()("once")["input_ids"]
    assert prompt_ids(args, args.prompt, tokenizer, "seq2seq-lm").tolist() == [*bare, 0]
    words = ["generate", str(folder), "--prompt", "once", "--max-new-tokens", "4"]
    assert main(words) == 0
    assert len(capsys.readouterr().out.rstrip("\n")) == 4  # a token is a byte
    assert main([*words, "--system", "Be brief."]) == 2
    assert "--system needs a chat template" in capsys.readouterr().err
