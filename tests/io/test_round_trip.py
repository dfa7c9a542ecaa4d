"""Every family: what transformers saved, read and written again, is bit for bit the same."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from jqlora.io import load  # noqa: E402
from jqlora.io.save import save_pretrained  # noqa: E402
from jqlora.tree import flatten  # noqa: E402
from tests.models import encoders, seq2seq, variants  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.parity,
]
# one of each kind, those that say most in their config
NAMES = [
    "llama3_gqa_scaled",
    "mistral_window",
    "qwen2_layer_types",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3_longrope",
    "gpt2_scaled_by_layer",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_read_and_written_again_is_the_same_to_transformers(name, tmp_path):
    hf = variants.checkpoint(name).hf
    hf.save_pretrained(tmp_path / "theirs")
    save_pretrained(tmp_path / "ours", *load(tmp_path / "theirs"))
    theirs, ours = (load_file(tmp_path / s / "model.safetensors") for s in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    assert type(again) is type(hf)
    ids = variants.ids(2, 12)
    np.testing.assert_array_equal(
        variants.hf_run(again, ids).logits, variants.hf_run(hf, ids).logits
    )


ENCODERS = [
    ("bert", encoders.ANSWERS),
    ("roberta", encoders.SEQUENCE),
    ("xlm_roberta_relu", encoders.MASKED),
    ("deberta_v2", encoders.MASKED),
    ("deberta_v3", encoders.TOKENS),
]


@pytest.mark.parametrize(("base", "task"), ENCODERS)
def test_an_encoder_read_and_written_again_is_the_same_to_transformers(base, task, tmp_path):
    encoder = encoders.checkpoint(base, task)
    encoder.hf.save_pretrained(tmp_path / "theirs")
    save_pretrained(tmp_path / "ours", *load(tmp_path / "theirs"))
    theirs, ours = (load_file(tmp_path / s / "model.safetensors") for s in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
    again, report = type(encoder.hf).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    inputs = encoders.batch(encoder)
    np.testing.assert_array_equal(
        *(
            encoders.logits_of(encoders.run_theirs(one, inputs))
            for one in (encoder, encoder._replace(hf=again.eval()))
        )
    )


WRITING = [(name, seq2seq.WRITING) for name in ("t5", "t5_gated_untied", "mt5", "bart")]


@pytest.mark.parametrize(("name", "task"), [*WRITING, *seq2seq.READING])
def test_an_encoder_decoder_read_and_written_again_is_the_same_to_transformers(
    name, task, tmp_path
):
    made = seq2seq.checkpoint(name, task)
    made.hf.save_pretrained(tmp_path / "theirs")
    save_pretrained(tmp_path / "ours", *load(tmp_path / "theirs"))
    theirs, ours = (load_file(tmp_path / s / "model.safetensors") for s in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
    again, report = type(made.hf).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    inputs = seq2seq.batch() if task == seq2seq.WRITING else seq2seq.read_batch(made)
    np.testing.assert_array_equal(
        *(
            encoders.logits_of(encoders.run_theirs(one, inputs))
            for one in (made, made._replace(hf=again.eval()))
        )
    )


@pytest.mark.parametrize("name", ["t5", "t5_gated_untied", "bart"])
@pytest.mark.parametrize("own", [True, False])
def test_every_copy_of_a_shared_embedding_is_read_or_served_alone(name, own, tmp_path):
    checkpoint = seq2seq.checkpoint(name)
    state = checkpoint.hf.state_dict()
    assert "lm_head.weight" in state
    if not own:  # as files that keep another of the names
        state = {key: tensor for key, tensor in state.items() if not key.endswith("shared.weight")}
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint.hf.config.save_pretrained(tmp_path)
    model, params = load(tmp_path, dtype="float32")
    assert model.config.tie_word_embeddings == (name != "t5_gated_untied")
    for path, leaf in flatten(checkpoint.params).items():
        np.testing.assert_array_equal(flatten(params)[path], leaf)


def test_torchs_own_file_of_a_state_dict_is_read_with_its_tied_copies(tmp_path):
    encoder = encoders.checkpoint("bert", encoders.MASKED)
    assert "cls.predictions.decoder.weight" in encoder.hf.state_dict()
    torch.save(encoder.hf.state_dict(), tmp_path / "pytorch_model.bin")
    encoder.hf.config.save_pretrained(tmp_path)
    model, params = load(tmp_path, dtype="float32", task=encoders.MASKED)
    assert model.task == encoders.MASKED
    for path, leaf in flatten(encoder.params).items():
        np.testing.assert_array_equal(flatten(params)[path], leaf)
