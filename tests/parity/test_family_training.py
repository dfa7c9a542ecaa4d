# ruff: noqa: E402
"""Every family beside the real PEFT: adapters in and out, gradients, and sixty steps of training.

A row says how a family's tiny random model is made and called; it inherits every check here.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from safetensors.numpy import load_file

from jqlora.attach import bind
from jqlora.io.peft import load_adapter, save_adapter
from jqlora.quant import NF4, QTensor, quantize_params
from jqlora.quant.params import SKIP
from jqlora.train import loss_for
from jqlora.tree import flatten, unflatten
from tests.models import encoders, seq2seq, variants

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

STEPS, LEARNING_RATE, DECAY = 60, 5e-4, 0.01
# Exact in fp32: optax takes 1 - β^t in fp32 and torch in fp64, which for 0.999 differ by 6e-5 at
# the first step.
BETAS = (0.875, 0.96875)
Batch = dict[str, np.ndarray]
LABELS = ("labels", "start_positions", "end_positions")


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    """Programs this small run but briefly: optimizing them costs more than it gains."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Row(NamedTuple):
    """``theirs`` makes a fresh torch model in eval mode. ``batches`` are keyword arguments of both
    models, those in ``LABELS`` theirs alone; ``loss(output, batch)`` is what theirs computes."""

    theirs: Callable[[], Any]
    model: Any
    params: Any
    options: dict[str, Any]
    batches: list[Batch]
    loss: Callable[[Any, dict[str, jax.Array]], jax.Array]


def next_token_loss(output: Any, batch: dict[str, jax.Array]) -> jax.Array:
    logits, wanted = output.logits[:, :-1], batch["labels"][:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()


def causal(name: str, targets: Any = "all-linear", **options: Any) -> Row:
    """A row of :mod:`tests.models.variants` with an adapter of rank 3 on ``targets``."""
    hf, model = calmed(variants.checkpoint(name))
    params = variants.params_from(hf.state_dict(), model)
    batches = [{"input_ids": ids, "labels": ids} for ids in _learnable()]
    options = {"task_type": "CAUSAL_LM", "target_modules": targets, **options}
    return Row(lambda: copy.deepcopy(hf), model, params, options, batches, next_token_loss)


def encoder(base: str, task: str, kind: str | None, **options: Any) -> Row:
    """A row of :mod:`tests.models.encoders`, with a head that PEFT trains whole where it does."""
    made = encoders.checkpoint(base, task)
    hf, model = calmed(made)
    params = variants.params_from(hf.state_dict(), model)
    inputs = [encoders.batch(made, rows=6, length=9, seed=seed) for seed in range(3)]
    batches = [batch | encoders.targets(made, batch) for batch in inputs]
    options = {"task_type": kind, "target_modules": "all-linear", **options}
    return Row(lambda: copy.deepcopy(hf), model, params, options, batches, task_loss(model))


def encoder_decoder(name: str, targets: Any = "all-linear") -> Row:
    """A row of :mod:`tests.models.seq2seq`, whose decoder has the labels one place later."""
    made = seq2seq.checkpoint(name)
    hf, model = calmed(made)
    params = variants.params_from(hf.state_dict(), model)
    batches = []
    for seed in range(3):
        batch = seq2seq.batch(rows=2, length=9, targets=7, seed=seed)
        shifted = seq2seq.decoder_inputs(model.config, batch["labels"])
        batches.append(batch | {"decoder_input_ids": shifted})
    options = {"task_type": "SEQ_2_SEQ_LM", "target_modules": targets}
    return Row(lambda: copy.deepcopy(hf), model, params, options, batches, task_loss(model))


def task_loss(model: Any) -> Callable[[Any, dict[str, jax.Array]], jax.Array]:
    """The loss of a task, of an output that is there already."""

    def loss(output: Any, batch: dict[str, jax.Array]) -> jax.Array:
        total, count = loss_for(model)(lambda *_, **__: output, {}, batch, None)
        return total / count

    return loss


def calmed(checkpoint: Any) -> tuple[Any, Any]:
    """A copy with half the weights, and norms near 1, and our model for it.

    The variants' own weights make every part matter at once, and training chaotic: on some of them
    PEFT in fp32 leaves PEFT in fp64 by a thousandth of the loss. These it follows to 1e-6.
    """
    hf = copy.deepcopy(checkpoint.hf)
    offset = getattr(checkpoint.model.config, "unit_offset_norms", False)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.ndim > 1:
                weight.mul_(0.5)
            elif "norm" in name and offset:
                weight.sub_(1)
    return hf, checkpoint.model


def _learnable() -> list[np.ndarray]:
    """Three batches int32 [2, 9] in which each token follows from the one before, mostly."""
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 60, (3, 2, 9))
    for t in range(1, ids.shape[-1]):
        known = generator.random((3, 2)) < 0.8
        ids[..., t] = np.where(known, 3 + (5 * ids[..., t - 1]) % 57, ids[..., t])
    return list(ids.astype(np.int32))


ROWS: dict[str, Callable[[], Row]] = {
    "qwen3": lambda: causal("qwen3"),
    "gemma": lambda: causal("gemma", ["embed_tokens", "q_proj", "down_proj"]),
    "gemma2": lambda: causal("gemma2"),
    "gemma3": lambda: causal("gemma3"),
    "phi3": lambda: causal("phi3_longrope", ["qkv_proj", "gate_up_proj", "down_proj"]),
    "gpt2": lambda: causal("gpt2", ["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True),
    "bert": lambda: encoder("bert", encoders.SEQUENCE, "SEQ_CLS"),
    "roberta": lambda: encoder(
        "roberta", encoders.TOKENS, "TOKEN_CLS", target_modules=["query", "value", "dense"]
    ),
    "deberta v2": lambda: encoder(
        "deberta_v2", encoders.MASKED, None, target_modules=["pos_key_proj", "query_proj", "dense"]
    ),
    "deberta v3": lambda: encoder(
        "deberta_v3", encoders.TOKENS, "TOKEN_CLS", target_modules=["query_proj", "key_proj"]
    ),
    "flan t5": lambda: encoder_decoder(
        "t5_gated_untied", ["q", "k", "v", "o", "wi_0", "wi_1", "wo", "relative_attention_bias"]
    ),
    "bart": lambda: encoder_decoder("bart"),
}


class Case(NamedTuple):
    """A row with an adapter of random weights that PEFT wrote; ``theirs`` is PEFT's model."""

    row: Row
    theirs: Any
    folder: Any
    plan: Any
    adapters: Any
    train: Any


@pytest.fixture(scope="module", params=ROWS)
def case(request, tmp_path_factory):
    row = ROWS[request.param]()
    options = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, **row.options}
    theirs = peft.get_peft_model(row.theirs(), peft.LoraConfig(**options)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder / "theirs")
    plan, adapters = load_adapter(folder / "theirs", row.model, row.params)
    return Case(row, theirs, folder, plan, adapters, training(row, plan))


def training(row: Row, plan: Any) -> Any:
    """``run(params, adapters, steps)``: AdamW on the row's batches, in turn."""
    apply = bind(row.model, plan)
    tx = optax.adamw(LEARNING_RATE, *BETAS, weight_decay=DECAY)

    def loss(adapters, params, batch):
        inputs = {key: value for key, value in batch.items() if key not in LABELS}
        output = apply({"params": params, **adapters}, **inputs)
        return row.loss(output, batch), logits_of(output)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))

    @jax.jit
    def update(adapters, state, gradient):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and floats
            updates, state = tx.update(gradient, state, adapters)
        return optax.apply_updates(adapters, updates), state

    def run(params, adapters, steps):
        """Losses, the first gradient, the first logits and the last adapters."""
        losses, first, state = [], None, tx.init(adapters)
        for number in range(steps):
            batch = jax.tree.map(jnp.asarray, row.batches[number % len(row.batches)])
            (value, logits), slope = gradient(adapters, params, batch)
            adapters, state = update(adapters, state, slope)
            first = first or (slope, logits)
            losses.append(float(value))
        return losses, *first, adapters

    return run


def logits_of(output: Any) -> Any:
    return output.logits if hasattr(output, "logits") else output.start_logits


def at_real_tokens(logits: Any, batch: Batch) -> np.ndarray:
    """Without what stands at padding, which means nothing and differs."""
    logits, mask = np.asarray(logits), batch.get("attention_mask", np.ones((0, 0)))
    return logits[mask.astype(bool)] if logits.shape[:2] == mask.shape else logits


def torch_batch(batch: Batch) -> dict[str, Any]:
    return {key: torch.tensor(value).long() for key, value in batch.items()}


def train_theirs(model: Any, row: Row) -> Any:
    wanted = {
        n.replace(".modules_to_save.default", ""): p
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    optimizer = torch.optim.AdamW(
        wanted.values(), lr=LEARNING_RATE, betas=BETAS, weight_decay=DECAY
    )
    losses, first = [], None
    for number in range(STEPS):
        optimizer.zero_grad()
        output = model(**torch_batch(row.batches[number % len(row.batches)]))
        output.loss.backward()
        if first is None:
            first = (
                {n: p.grad.numpy().copy() for n, p in wanted.items()},
                logits_of(output).detach(),
            )
        optimizer.step()
        losses.append(output.loss.item())
    last = {n: p.detach().numpy() for n, p in wanted.items()}
    return losses, *first, last


def by_peft_names(case: Case, tree: Any, name: str) -> dict[str, np.ndarray]:
    """Leaves shaped like the adapters, under the names of PEFT's parameters."""
    save_adapter(case.folder / name, case.plan, tree, model=case.row.model)
    saved = load_file(case.folder / name / "adapter_model.safetensors")
    named = {}
    for key, value in saved.items():
        for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            key = key.replace(f".{part}.", f".{part}.default.")
            key = f"{key}.default" if key.endswith(f".{part}") else key
        named[key] = value
    return named


def worst(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Largest difference in any leaf, relative to that leaf's largest value."""
    ours = {key: value for key, value in ours.items() if key in theirs}
    assert ours.keys() == theirs.keys()
    return max(
        float(np.abs(ours[key] - value).max() / np.abs(value).max())
        for key, value in theirs.items()
    )


def test_sixty_steps_of_training_follow_those_of_peft(case, record_property):
    theirs = copy.deepcopy(case.theirs)
    losses, gradient, logits, last = train_theirs(theirs, case.row)
    ours = case.train(case.row.params, case.adapters, STEPS)
    measured = {
        "logits": variants.gap(
            *(at_real_tokens(x, case.row.batches[0]) for x in (ours[2], logits))
        ),
        "gradient": worst(by_peft_names(case, ours[1], "gradient"), gradient),
        "losses": float(np.max(np.abs(np.subtract(ours[0], losses)) / np.abs(losses))),
        "adapters": worst(by_peft_names(case, ours[3], "last"), last),
    }
    for name, value in measured.items():
        record_property(name, value)
    assert measured["logits"] < 1e-5
    assert measured["gradient"] < 1e-4
    assert measured["losses"] < 1e-5
    assert measured["adapters"] < 1e-4
    assert losses[-1] < losses[0]


def test_peft_computes_the_same_from_what_is_saved_here(case):
    save_adapter(case.folder / "ours", case.plan, case.adapters, model=case.row.model)
    again = peft.PeftModel.from_pretrained(case.row.theirs(), case.folder / "ours").eval()
    batch = torch_batch(case.row.batches[0])
    with torch.no_grad():
        expected, found = (logits_of(model(**batch)) for model in (case.theirs, again))
    assert variants.gap(found, expected) < 1e-6


def test_training_on_codes_equals_training_on_what_they_decode_to(case):
    quantized = quantize_params(case.row.params, NF4(), SKIP)
    dense = {
        path: jax.jit(QTensor.dequantize)(leaf) if isinstance(leaf, QTensor) else leaf
        for path, leaf in flatten(quantized).items()
    }
    steps = 10
    on_codes = case.train(quantized, case.adapters, steps)
    on_dense = case.train(unflatten(dense), case.adapters, steps)
    np.testing.assert_allclose(on_codes[0], on_dense[0], rtol=1e-6)
    ours, theirs = (by_peft_names(case, run[3], "codes") for run in (on_codes, on_dense))
    assert worst(ours, theirs) < 1e-5
