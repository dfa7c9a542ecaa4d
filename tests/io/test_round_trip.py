"""Every family: what transformers saved, read and written again, is bit for bit the same."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from jqlora.io import load  # noqa: E402
from jqlora.io.save import save_pretrained  # noqa: E402
from tests.models import variants  # noqa: E402

pytestmark = pytest.mark.parity
# one of each kind, those that say most in their config
NAMES = [
    "llama3_gqa_scaled",
    "mistral_window",
    "qwen2_layer_types",
    "qwen3_biased_windows",
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
