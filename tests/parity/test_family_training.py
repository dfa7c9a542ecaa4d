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
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from jqlora.compare import torch_side
from jqlora.compare.inputs import causal as next_tokens
from jqlora.compare.inputs import labelled
from jqlora.compare.measure import measure
from jqlora.compare.observation import Batch, Recipe
from jqlora.compare.our_side import OurSide
from jqlora.io.peft import load_adapter, save_adapter
from jqlora.models import family_for
from jqlora.quant import NF4, QTensor, quantize_params
from jqlora.quant.params import SKIP
from jqlora.train import TrainState
from jqlora.tree import flatten, unflatten
from tests.models import encoders, seq2seq, variants

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
]

RECIPE = Recipe(steps=60, learning_rate=5e-4)


class Row(NamedTuple):
    """``theirs`` makes a fresh torch model in eval mode; ``options`` are those of its adapter."""

    theirs: Callable[[], Any]
    model: Any
    params: Any
    options: dict[str, Any]
    batches: list[Batch]


def causal(name: str, targets: Any = "all-linear", **options: Any) -> Row:
    """A row of :mod:`tests.models.variants` with an adapter of rank 3 on ``targets``."""
    hf, model = calmed(variants.checkpoint(name))
    params = variants.params_from(hf.state_dict(), model)
    batches = [next_tokens(ids, np.ones(ids.shape, bool)) for ids in _learnable()]
    options = {"task_type": "CAUSAL_LM", "target_modules": targets, **options}
    return Row(lambda: copy.deepcopy(hf), model, params, options, batches)


def encoder(base: str, task: str, kind: str | None, **options: Any) -> Row:
    """A row of :mod:`tests.models.encoders`, with a head that PEFT trains whole where it does."""
    made = encoders.checkpoint(base, task)
    hf, model = calmed(made)
    params = variants.params_from(hf.state_dict(), model)
    inputs = [encoders.batch(made, rows=6, length=9, seed=seed) for seed in range(3)]
    whole = task == encoders.SEQUENCE
    batches = [
        labelled(i, encoders.targets(made, i), i["attention_mask"].astype(bool), whole=whole)
        for i in inputs
    ]
    options = {"task_type": kind, "target_modules": "all-linear", **options}
    return Row(lambda: copy.deepcopy(hf), model, params, options, batches)


def encoder_decoder(name: str, targets: Any = "all-linear") -> Row:
    """A row of :mod:`tests.models.seq2seq`, whose decoder has the labels one place later."""
    made = seq2seq.checkpoint(name)
    hf, model = calmed(made)
    params = variants.params_from(hf.state_dict(), model)
    batches = []
    for seed in range(3):
        batch = seq2seq.batch(rows=2, length=9, targets=7, seed=seed)
        shown, answered = batch["attention_mask"].astype(bool), batch["labels"] >= 0
        batches.append(Batch(batch, batch, shown, answered))
    options = {"task_type": "SEQ_2_SEQ_LM", "target_modules": targets}
    return Row(lambda: copy.deepcopy(hf), model, params, options, batches)


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


class OnBoth(OurSide):
    """Takes each step on ``codes`` as well, from the same adapters.

    All is one program: what its parts have in common, which is most, is compiled once.
    """

    def __init__(self, model: Any, plan: Any, codes: Any):
        super().__init__(model, plan, RECIPE)
        forward, step = self._forward, self._step

        def everything(state, there, params, codes, batch):
            output = forward(state.adapters, params, batch)
            return output, step(state, params, batch), step(there, codes, batch)

        self._everything = jax.jit(everything, donate_argnums=(0, 1))
        self._codes, self._forward, self._step = codes, self._output, self._both

    def _output(self, adapters: Any, params: Any, batch: Any) -> Any:
        states = (TrainState.create(adapters, self._tx, jax.random.key(0)) for _ in range(2))
        return self._everything(*states, params, self._codes, batch)[0]

    def _both(self, state: Any, params: Any, batch: Any) -> Any:
        if state.step == 0:
            self._there, self.losses_on_codes = jax.tree.map(jnp.array, state), []
        _, here, (self._there, found) = self._everything(
            state, self._there, params, self._codes, batch
        )
        self.losses_on_codes.append(float(found["loss"] + found["penalty"]))
        return here

    def after_on_codes(self) -> Any:
        return self._named(self._there.adapters)


class Case(NamedTuple):
    """A row with an adapter of random weights that PEFT wrote; ``theirs`` is PEFT's model."""

    row: Row
    theirs: Any
    folder: Any
    plan: Any
    adapters: Any
    codes: Any
    ours: OnBoth


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
    codes = quantize_params(row.params, NF4(), SKIP)
    ours = OnBoth(row.model, plan, codes)
    return Case(row, theirs, folder, plan, adapters, codes, ours)


def worst(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Largest difference in any leaf, relative to that leaf's largest value."""
    ours = {key: value for key, value in ours.items() if key in theirs}
    assert ours.keys() == theirs.keys()
    return max(
        float(np.abs(ours[key] - value).max() / np.abs(value).max())
        for key, value in theirs.items()
    )


def test_sixty_steps_of_training_follow_those_of_peft(case, record_property):
    row, model = case.row, case.theirs
    theirs = torch_side.observe(copy.deepcopy(model), row.batches, RECIPE)
    ours = case.ours.observe(row.params, case.adapters, row.batches)
    stacks = family_for(row.model).naming_for(row.model.task).stacks
    made = measure(ours, theirs, dtype="float32", stacks=stacks)
    for one in made:
        record_property(f"{one.quantity} {one.name}", one.error)
        assert one.passed, one
    assert worst(ours.after, theirs.after) < 1e-4
    assert theirs.losses[-1] < theirs.losses[0]


def test_peft_computes_the_same_from_what_is_saved_here(case):
    save_adapter(case.folder / "ours", case.plan, case.adapters, model=case.row.model)
    again = peft.PeftModel.from_pretrained(case.row.theirs(), case.folder / "ours").eval()
    batch = {name: torch.tensor(array).long() for name, array in case.row.batches[0].theirs.items()}
    with torch.no_grad():
        expected, found = (logits_of(model(**batch)) for model in (case.theirs, again))
    assert variants.gap(found, expected) < 1e-6


def logits_of(output: Any) -> Any:
    return output.logits if hasattr(output, "logits") else output.start_logits


@jax.jit
def decode(leaves: dict[Any, QTensor]) -> dict[Any, jax.Array]:
    return {path: leaf.dequantize() for path, leaf in leaves.items()}


def test_training_on_codes_equals_training_on_what_they_decode_to(case):
    ours, codes = case.ours, flatten(case.codes)
    quantized = {path: leaf for path, leaf in codes.items() if isinstance(leaf, QTensor)}
    decoded = unflatten(codes | decode(quantized))
    on_dense = ours.train(decoded, case.adapters, case.row.batches, steps=10)
    np.testing.assert_allclose(ours.losses_on_codes, on_dense.losses, rtol=1e-6)
    assert worst(ours.after_on_codes(), on_dense.after) < 1e-5
