"""Generation by encoder-decoders: greedily beside transformers, and on codes with an adapter."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jqlora.attach import bind, init, plan  # noqa: E402
from jqlora.errors import ConfigError  # noqa: E402
from jqlora.generation import generate, stream  # noqa: E402
from jqlora.methods import LoRA  # noqa: E402
from jqlora.quant import NF4, quantize_params  # noqa: E402
from tests.models import seq2seq  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.parity,
]


FORCED = {"forced_bos_token_id": 5, "forced_eos_token_id": 7}


@pytest.mark.parametrize(
    ("name", "forced", "options"),
    [("t5_gated_untied", {}, {}), ("bart", FORCED, {"repetition_penalty": 1.7})],
)
def test_greedy_tokens_equal_transformers_with_padded_prompts(name, forced, options):
    hf, _, model, params = seq2seq.checkpoint(name)
    batch, config = seq2seq.batch(), model.config
    arrays = [batch[name] for name in ("input_ids", "attention_mask")]
    ids, mask = (torch.tensor(array).long() for array in arrays)
    count = 12
    theirs = hf.generate(
        ids, attention_mask=mask, max_new_tokens=count, num_beams=1, **forced, **options
    ).numpy()[:, 1:]
    asked = model.clone(config=dataclasses.replace(config, **forced))
    ours = np.asarray(
        generate(
            bind(model),
            {"params": params},
            *arrays,
            model=asked,
            max_new_tokens=count,
            eos_ids=config.eos_token_ids,
            **options,
        )
    )
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
    assert (ours[:, theirs.shape[1] :] == config.pad_token_id).all()


def test_tokens_are_written_on_codes_with_an_adapter_beside_them():
    found = seq2seq.checkpoint("t5", num_layers=1)
    inputs = seq2seq.batch()
    params = quantize_params(found.params, NF4(block=32))
    planned = plan(found.model, params, LoRA(rank=2, alpha=64))
    adapters = init(jax.random.key(0), planned)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)  # so that they matter
    apply = bind(found.model, planned)
    variables = {"params": params, **adapters}
    arrays = (inputs["input_ids"], inputs["attention_mask"])
    tokens = np.asarray(generate(apply, variables, *arrays, model=found.model, max_new_tokens=8))
    start = np.full((len(tokens), 1), found.model.config.decoder_start_token_id, np.int32)
    written = np.concatenate([start, tokens[:, :-1]], 1)
    inputs = {"attention_mask": arrays[1], "decoder_input_ids": written}

    @jax.jit
    def likeliest(adapters):
        given = {"params": params, **adapters}
        return apply(given, arrays[0], **inputs).logits.argmax(-1)

    np.testing.assert_array_equal(likeliest(adapters), tokens)
    off = jax.tree.map(lambda leaf: 0 * leaf, adapters)
    assert (likeliest(off) != tokens).any()


def test_the_bucket_of_a_prompt_and_its_padding_move_no_token():
    _, _, model, params = seq2seq.checkpoint("bart", encoder_layers=1, decoder_layers=1)
    ids, mask = (seq2seq.batch()[name] for name in ("input_ids", "attention_mask"))
    apply, options = bind(model), {"model": model, "max_new_tokens": 6}
    together = generate(apply, {"params": params}, ids, mask, **options)
    wide = [np.pad(array, ((0, 0), (0, 24))) for array in (ids, mask)]  # up to the last position
    widened = generate(apply, {"params": params}, *wide, **options)
    np.testing.assert_array_equal(widened, together)
    streamed = list(stream(apply, {"params": params}, ids, mask, **options))
    np.testing.assert_array_equal(np.stack(streamed, 1), together)
    for wrong, message in (
        ({"max_new_tokens": 41}, r"max_new_tokens=41 exceeds.*40 positions"),
        ({"input_ids": np.ones((1, 41), np.int32)}, r"prompt of 41 tokens exceeds.*40"),
    ):
        asked = {"input_ids": ids, **options, **wrong}
        with pytest.raises(ConfigError, match=message):
            generate(apply, {"params": params}, **asked)
