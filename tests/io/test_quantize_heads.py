"""Heads that read on bases in 4 bits: transformers quantizes the same and decodes the same."""

import pytest

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jqlora.attach import bind  # noqa: E402
from jqlora.io import load, quantize_checkpoint  # noqa: E402
from jqlora.models import family_for  # noqa: E402
from jqlora.quant import NF4, QTensor  # noqa: E402
from jqlora.tree import flatten  # noqa: E402
from tests.models import encoders, seq2seq  # noqa: E402
from tests.models.encoders import ANSWERS, MASKED, SEQUENCE, TOKENS  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
]
# bitsandbytes on a CPU decodes rows wrongly that are no multiple of a block
ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
T5 = {"d_model": 64, "d_ff": 128, "num_layers": 1}
BART = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1}
BART |= {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
SIZES = {"bart": BART, "t5": T5, "mt5": T5}
ROWS = [
    ("bert", SEQUENCE),
    ("roberta", MASKED),
    ("roberta", ANSWERS),
    ("roberta", TOKENS),
    ("deberta_v3", SEQUENCE),
    ("bart", SEQUENCE),
    ("t5", ANSWERS),
    ("mt5", TOKENS),
]
COMPUTED = [("bert", SEQUENCE), ("roberta", TOKENS), *(row for row in ROWS if row[0] in SIZES)]
"""Rows whose logits are compared as well."""


@pytest.mark.parametrize(("base", "task"), ROWS)
def test_the_same_modules_are_quantized_and_the_head_is_whole(base, task, tmp_path):
    made = seq2seq if base in SIZES else encoders
    encoder = made.checkpoint(base, task, **SIZES.get(base, ENCODER))
    encoder.hf.save_pretrained(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "nf4", NF4())
    theirs, report = getattr(transformers, encoders.AUTO[task]).from_pretrained(
        tmp_path / "nf4", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    model, params = load(tmp_path / "nf4")
    leaves = flatten(params)
    ours = {
        item.hf.removesuffix(".weight"): (leaves[item.path], item.index)
        for item in family_for(model).hf_names(model)
        if isinstance(leaves[item.path], QTensor)
    }
    modules = {
        name: module
        for name, module in theirs.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert ours.keys() == modules.keys()
    for name, (leaf, index) in ours.items():
        weight = modules[name].weight
        modules[name].support_avx512bf16_for_cpu = False
        stored = np.asarray(leaf.codes if index is None else leaf.codes[index])
        np.testing.assert_array_equal(stored.reshape(-1), weight.data.numpy().reshape(-1))
    if (base, task) not in COMPUTED:
        return
    inputs = seq2seq.read_batch(encoder) if base in SIZES else encoders.batch(encoder)
    expected = encoders.logits_of(encoders.run_theirs(encoder._replace(hf=theirs.eval()), inputs))
    arrays = {name: jnp.asarray(array) for name, array in inputs.items()}
    got = jax.jit(bind(model))({"params": params}, **arrays)
    np.testing.assert_allclose(
        encoders.logits_of(got), expected, atol=1e-4 * np.abs(expected).max()
    )
