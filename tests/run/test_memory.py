"""The memory of a step, compiled for a GPU that is not there, and the command that tells it."""

import dataclasses
import functools
import json

import jax
import pytest

from jqlora.attach import bind
from jqlora.cli import main
from jqlora.config import read_config
from jqlora.models import abstract_params, family_of
from jqlora.run import estimate, plan_run
from jqlora.run.estimate import estimate_step
from jqlora.run.memory import RESERVED, Present, batch_of, compile_step, on_gpu
from jqlora.train.task_loss import loss_for
from jqlora_kernels import aot
from jqlora_kernels.aot_targets import TARGETS
from tests.toy_encoder import write_encoder

MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
]
compiles = [
    pytest.mark.aot,
    pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing())),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    # the config alone will do; one shape of matrices, so that few kernels are compiled
    (folder / "config.json").write_text(json.dumps(MODEL))
    path = folder / "config.yaml"
    path.write_text(
        f"model: {{source: {folder}, quantize: {{}}, attention: xla}}\n"
        "method: {name: lora, rank: 4, dtype: bfloat16}\n"
        "data: {train: nowhere.jsonl, length: 128}\n"
        "train: {steps: 2, batch_size: 2, offload: none}\n"
        f"output: {{directory: {folder / 'out'}}}\n"
    )
    return path


@pytest.fixture(scope="module")
def steps(file):
    """The memory of a config's step, each compiled once; 16 and 16.0 are one config."""
    found = []

    def compiled(config, target=TARGETS["h100"]):
        config = on_gpu(config)
        for known, memory in found:
            if known == config:
                return memory
        found.append((config, compile_step(config, target)))
        return found[-1][1]

    return compiled


@pytest.mark.parametrize("remat", [pytest.param(name, marks=compiles) for name in ("full", "dots")])
def test_the_parts_are_the_plans_and_the_peak_is_their_sum(remat, file, steps):
    config = read_config([file], [f"model.remat={remat}"])
    memory, sizes = steps(config), plan_run(on_gpu(config), weightless=True)
    assert memory.codes + memory.scales == sizes.base.quantized_bytes
    assert memory.unquantized == sizes.base.other_bytes
    assert memory.adapters == sizes.adapter_bytes == 2 * sizes.plan.trainable_count
    assert memory.host == 0
    held = memory.codes + memory.scales + memory.unquantized + memory.adapters + memory.optimizer
    assert 0 <= memory.peak - held - memory.batch - memory.temporaries < 2**14


@pytest.mark.parametrize("remat", [pytest.param(name, marks=compiles) for name in ("full", "dots")])
def test_the_estimate_is_within_five_percent_of_what_is_compiled(remat, file, steps):
    config = read_config([file], [f"model.remat={remat}"])
    memory, guessed = steps(config), estimate_step(config, "as a test")
    assert abs(guessed.peak / memory.peak - 1) < 0.05
    assert abs(guessed.temporaries / memory.temporaries - 1) < 0.25
    exact = {"codes", "scales", "unquantized", "adapters", "optimizer", "batch", "host"}
    for part in exact:
        assert getattr(guessed, part) == getattr(memory, part)


@pytest.mark.parametrize("_", [pytest.param(0, marks=compiles)])
def test_the_command_prints_the_table_and_finds_what_fits(
    _, file, steps, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(estimate, "compile_step", steps)
    before = steps(read_config([file], ["model.remat=dots"]))
    room = RESERVED + before.peak - 2**12  # just too little
    written = tmp_path / "fits.yaml"
    words = ["plan", str(file), "model.remat=dots", "--device", "h100"]
    assert main([*words, "--memory", f"{room / 2**20}MiB", "--write", str(written)]) == 0
    said = capsys.readouterr().out
    assert "base, codes" in said
    assert "does not fit" in said
    assert "kernels    triton: 256 rows times" in said
    config = read_config([written])
    assert config != read_config([file], ["model.remat=dots"])
    assert steps(config).fits(dataclasses.replace(TARGETS["h100"], memory=int(room)))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "h1000"], "known are h100"),
        (["--memory", "24"], "such as 24GB"),
        (["--write", "x.yaml"], "--device or --memory"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, told, file, monkeypatch, capsys):
    monkeypatch.setattr(aot, "missing", lambda: None)
    assert main(["plan", str(file), *words]) != 0
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("_", [pytest.param(0, marks=compiles)])
def test_offloaded_inputs_of_layers_take_room_on_the_host_alone(_, file, steps):
    # rows enough for inputs to outweigh a layer at work, and little else to compile
    words = ["model.quantize=null", "train.batch_size=8", "train.optimizer=sgd"]
    config = read_config([file], ["model.remat=offload", "method.targets=[q_proj]", *words])
    inputs = MODEL["num_hidden_layers"] * MODEL["hidden_size"] * 8 * 128 * 2  # rows, tokens, bytes
    memory, guessed = steps(config), estimate_step(config, "as a test")
    assert memory.host_activations == guessed.host_activations == inputs
    assert memory.temporaries < inputs
    assert abs(guessed.peak / memory.peak - 1) < 0.05
    assert any("activations, host" in line for line in memory.lines(TARGETS["h100"]))


def test_an_estimate_knows_that_a_chunk_of_logits_may_outweigh_a_layer(file, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"vocab_size": 2**17}))
    small = estimate_step(read_config([file]), "as a test")
    large = estimate_step(read_config([file], [f"model.source={tmp_path}"]), "as a test")
    chunk = 2 * 128 * 2**17 * (2 + 4)  # rows, tokens, vocabulary; bytes in bf16 and in fp32
    assert small.temporaries < chunk < large.temporaries < chunk + small.temporaries


def test_without_the_compiler_it_is_estimated_and_says_what_to_install(file, monkeypatch, capsys):
    monkeypatch.setattr(aot, "missing", lambda: "there is no ptxas: pip install 'jqlora[aot]'")
    assert main(["plan", str(file), "model.remat=full", "--device", "l4"]) == 0
    said = capsys.readouterr().out
    assert "ESTIMATED" in said
    assert "jqlora[aot]" in said
    assert "kernels    triton" in said
    assert "base, codes" in said


def test_there_is_no_gpu_here(file, capsys):
    assert main(["plan", str(file), "--device", "here"]) != 0
    assert "no GPU" in capsys.readouterr().err


def test_the_step_of_a_task_is_compiled_for_a_device_that_is_present(
    file, tmp_path, compile_quickly
):
    words = {
        "data.task": "sst2",
        "data.length": 16,
        "model.source": write_encoder(tmp_path / "model"),
        "model.attention": "auto",
        "model.dtype": "float32",
        "model.quantize": "null",
    }
    config = read_config([file], [f"{key}={value}" for key, value in words.items()])
    here = Present("a CPU", 2**30, jax.sharding.Mesh(jax.devices()[:1], "x"))
    memory = compile_step(config, here)
    assert "a CPU" in memory.lines(here)[0]
    held = memory.unquantized + memory.adapters + memory.optimizer + memory.batch
    assert memory.peak >= held


HEADS = {
    "sequence-classification": "sst2",
    "question-answering": "squad",
    "token-classification": "conll2003",
    "masked-lm": "masked_lm",
    "seq2seq-lm": "summarization",
}


@pytest.mark.parametrize("head", HEADS)
def test_the_batch_of_a_task_is_what_its_loss_reads(head, file):
    config = read_config([file], [f"data.task={HEADS[head]}", "data.length=16"])
    sizes = {"vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"hidden_size": 16, "intermediate_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 16}
    kind = {"model_type": "bert"} | sizes
    if head == "seq2seq-lm":
        kind = sizes | {"model_type": "t5", "decoder_start_token_id": 0, "pad_token_id": 0}
    family = family_of(kind)
    model = family.build(family.parse(kind), task=head)
    batch = batch_of(config, head)
    variables = {"params": abstract_params(model)}
    loss = functools.partial(loss_for(model), bind(model), key=None)
    total, count = jax.eval_shape(loss, variables, batch)
    assert total.shape == count.shape == ()
