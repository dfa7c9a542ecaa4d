"""The commands on an encoder-decoder."""

import numpy as np
from tokenizers import processors

import jqlora as jq
from jqlora.cli import main
from tests.toy_checkpoint import toy_tokenizer, write_model

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
    tokenizer.save_pretrained(folder)
    words = ["generate", str(folder), "--prompt", "once", "--max-new-tokens", "4"]
    assert main(words) == 0
    model, params = jq.load(folder)
    ids = np.array([[*toy_tokenizer()("once")["input_ids"], 0]])
    tokens = jq.generate(
        jq.bind(model), {"params": params}, ids, model=model, max_new_tokens=4, eos_ids=(0,)
    )
    answer = tokenizer.decode(np.asarray(tokens)[0], skip_special_tokens=True)
    assert capsys.readouterr().out == f"{answer}\n"
    assert main([*words, "--system", "Be brief."]) == 2
    assert "--system needs a chat template" in capsys.readouterr().err
