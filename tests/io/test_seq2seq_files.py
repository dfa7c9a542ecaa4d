# ruff: noqa: E402
"""Files of encoder-decoders: 4-bit ones, adapters of them, and what they say of how to write."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
from transformers import AutoModelForSeq2SeqLM, BitsAndBytesConfig

from jqlora.attach import bind, init, plan
from jqlora.errors import AdapterFileError
from jqlora.io import fresh_head, load, load_adapter, save_adapter, save_pretrained
from jqlora.io.adapter_head import head_of
from jqlora.io.checkpoint import open_checkpoint
from jqlora.io.merge_files import merge_checkpoint
from jqlora.io.source import resolve
from jqlora.methods import LoRA
from jqlora.models import family_for
from jqlora.quant import NF4, QTensor
from jqlora.tree import flatten
from tests.models import encoders, seq2seq
from tests.models.variants import gap

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
]


def torch_model(folder, **options):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager", **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # or its first evaluation repacks the weights and computes in bfloat16
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def in_four_bits(model):
    return {name for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}


def test_what_transformers_quantizes_of_a_t5_is_quantized_here_to_the_same_bytes(tmp_path):
    # bitsandbytes decodes on the CPU by rows of whole blocks only
    checkpoint = seq2seq.checkpoint("t5_gated_untied", d_model=64)
    checkpoint.hf.save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    theirs = torch_model(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load(tmp_path / "dense", quantize=NF4(), dtype="float32")
    flat = flatten(params)
    names = family_for(model).hf_names(model)
    ours = {n.hf.removesuffix(".weight") for n in names if isinstance(flat[n.path], QTensor)}
    assert ours == in_four_bits(theirs)
    assert not any(name.endswith("wo") for name in ours)
    read = flatten(load(tmp_path / "theirs")[1])
    for path, leaf in flat.items():
        jax.tree.map(np.testing.assert_array_equal, read[path], leaf)
    batch = seq2seq.batch()
    expected = seq2seq.run_theirs(theirs, **batch)
    shifted = seq2seq.decoder_inputs(model.config, batch.pop("labels"))
    inputs = jax.tree.map(jnp.asarray, batch | {"decoder_input_ids": shifted})
    logits = jax.jit(lambda inputs: bind(model)({"params": params}, **inputs).logits)(inputs)
    assert gap(logits, expected.logits) < 1e-5
    save_pretrained(tmp_path / "ours", model, params)
    again = torch_model(tmp_path / "ours")
    assert in_four_bits(again) == ours
    same = seq2seq.run_theirs(again, **seq2seq.batch()).logits
    np.testing.assert_array_equal(same, expected.logits)


def test_an_adapter_is_folded_into_the_files_as_peft_folds_it(tmp_path):
    hf = seq2seq.checkpoint("t5").hf
    hf.save_pretrained(tmp_path / "base")
    targets = ["q", "wo", "relative_attention_bias"]
    base = torch_model(tmp_path / "base")
    options = peft.LoraConfig(r=3, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    theirs = peft.get_peft_model(base, options).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found, expected = (
        seq2seq.run_theirs(model, **seq2seq.batch()).logits
        for model in (torch_model(tmp_path / "merged"), theirs)
    )
    assert gap(found, expected) < 1e-5


def test_a_head_that_peft_knows_by_no_name_is_trained_whole_if_it_is_told(tmp_path):
    made = seq2seq.checkpoint("bart", encoders.SEQUENCE)
    options = peft.LoraConfig(
        r=3,
        target_modules=["q_proj", "fc2"],
        task_type="SEQ_CLS",
        modules_to_save=["classification_head"],
    )
    theirs = peft.get_peft_model(copy.deepcopy(made.hf), options).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    planned, adapters = load_adapter(tmp_path / "theirs", made.model, made.params)
    assert {leaf.path[0] for leaf in planned.full} == {"classification_head"}
    assert head_of(tmp_path / "theirs") == {"task": encoders.SEQUENCE, "num_labels": 3}
    inputs = seq2seq.read_batch(made)
    expected = encoders.run_theirs(made._replace(hf=theirs), inputs).logits
    apply = jax.jit(bind(made.model, planned))
    found = apply({"params": made.params, **adapters}, **jax.tree.map(jnp.asarray, inputs))
    assert gap(found.logits, expected) < 1e-5
    save_adapter(tmp_path / "ours", planned, adapters, model=made.model)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(made.hf), tmp_path / "ours").eval()
    same = encoders.run_theirs(made._replace(hf=again), inputs).logits
    np.testing.assert_array_equal(same, expected)


def test_an_adapter_of_the_shared_embedding_has_no_place_in_pefts_files(tmp_path):
    model, params = seq2seq.checkpoint("t5", num_layers=1)[2:]
    for spec in (LoRA(targets=["shared"]), LoRA(targets=["q"], modules_to_save=["shared"])):
        planned = plan(model, params, spec)
        adapters = init(jax.random.key(0), planned, params)
        with pytest.raises(AdapterFileError, match="shared is the embedding of encoder and"):
            save_adapter(tmp_path / "a", planned, adapters, model=model)
    planned = plan(model, params, LoRA(targets=["q"]))
    save_adapter(tmp_path / "a", planned, init(jax.random.key(0), planned), model=model)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    config["target_modules"] = ["q", "shared"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match="shared"):
        load_adapter(tmp_path / "a", model, params)


def config_of(folder):
    return open_checkpoint(resolve(folder)).parsed


def test_the_generation_config_says_which_tokens_are_forced(tmp_path):
    seq2seq.checkpoint("bart").hf.save_pretrained(tmp_path)
    assert config_of(tmp_path).forced_eos_token_id == 2
    path = tmp_path / "generation_config.json"
    said = json.loads(path.read_text())
    del said["forced_eos_token_id"]
    path.write_text(json.dumps(said | {"forced_bos_token_id": 0, "decoder_start_token_id": 4}))
    config = config_of(tmp_path)
    assert (config.forced_bos_token_id, config.forced_eos_token_id) == (0, None)
    assert config.decoder_start_token_id == 4
    path.unlink()
    assert config_of(tmp_path).forced_eos_token_id == 2


def test_a_bare_encoder_decoder_gets_the_head_that_it_is_asked_for(tmp_path):
    checkpoint = seq2seq.checkpoint("bart")
    checkpoint.hf.model.save_pretrained(tmp_path)
    assert fresh_head(tmp_path, task="seq2seq-lm") == ("final_logits_bias",)
    params = flatten(load(tmp_path, task="seq2seq-lm")[1])
    for path, leaf in flatten(checkpoint.params).items():
        wanted = 0 * leaf if path[0] == "final_logits_bias" else leaf
        np.testing.assert_array_equal(params[path], wanted)
