"""The other side of a comparison: transformers, PEFT and bitsandbytes themselves, on the CPU.

This is the one file of jqlora that imports torch, and nothing imports this file but
``jqlora.compare`` at the moment of a comparison (a test holds both). The rule elsewhere is that
jqlora needs no torch. A certificate of equality is the exception: it is worth something only if the
other side is the real one, run on the user's own machine and checkpoint, and it would be worth less
if a second model in another language of ours stood in for it. So torch, peft and bitsandbytes stay
optional (the extra ``parity``), and whoever never compares never loads them.

A base in 4 bits is bitsandbytes' own ``Linear4bit`` computing in the certificate's dtype, not a
dense model with decoded weights: the claim is that what a user had with PEFT and bitsandbytes is
what they get, and the decoding is part of it. In fp32 nothing is lost by that: bitsandbytes decodes
to fp32 and multiplies. Both sides compute on the same bytes, from a file that ours writes and
bitsandbytes reads; apart from that bitsandbytes quantizes the dense weights itself, and its codes
are held against those of the file. (Quantizing twice and computing on each would not do: doubly
quantized scales that lie between two of their codes may take either one, which is 1e-4 of a state.)
"""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from jqlora.compare.observation import Arrays, Batch, Observation, Recipe, seen_in
from jqlora.errors import ConfigError
from jqlora.io.bnb import state_name
from jqlora.io.readers import open_directory
from jqlora.io.source import Source

AUTO = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
}
WHOLE = ".modules_to_save.default"
STEP = 2 / 65535
"""On a CPU bitsandbytes looks 8-bit codes up in a table of 65,536 entries over [-1, 1]."""
FREQUENCIES = "inv_freq"


def open_base(source: Source, task: str, dtype: str) -> Any:
    """transformers' model of a checkpoint, in eval mode, with its plainest attention."""
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    if source.kind == "gguf":
        options["gguf_file"] = source.path.name
    with _quiet():
        model = AUTO[task].from_pretrained(source.folder, device_map={"": "cpu"}, **options).eval()
    _compute_in(model, getattr(torch, dtype))
    return model


def quantized_otherwise(dense: Any, folder: Path) -> tuple[int, int]:
    """How many weights of the 4-bit checkpoint in ``folder`` there are, and how many of them
    bitsandbytes makes otherwise of the same weights of ``dense``.

    Codes must stand for the same values and scales be equal; doubly quantized ones may be one code
    away, or near zero, where codes lie closer together, a ``STEP`` of bitsandbytes' own table.
    """
    reader, count, different = open_directory(folder), 0, 0
    present = set(reader.names())
    for name, weight in dense.named_parameters():
        keys = [key for s in ("nf4", "fp4") if (key := state_name(name, s)) in present]
        if not keys:
            continue
        stored = json.loads(reader.read(keys[0]).tobytes())
        module = dense.get_submodule(name.rpartition(".")[0])
        matrix = weight.data.T if isinstance(module, Conv1D) else weight.data
        nested = "nested_blocksize" in stored
        codes, state = functional.quantize_4bit(
            matrix.contiguous(),
            blocksize=stored["blocksize"],
            quant_type=stored["quant_type"],
            compress_statistics=nested,
        )
        assert state.code is not None
        table = state.code.numpy()
        pairs = zip(_halves(codes.numpy()), _halves(reader.read(name)), strict=True)
        same = all(np.array_equal(table[theirs], table[ours]) for theirs, ours in pairs)
        scales = state.absmax.numpy(), reader.read(f"{name}.absmax").ravel()
        if state.state2 is None or state.state2.code is None:
            alike = np.array_equal(*scales)
        else:
            alike = _nearly(*scales, state.state2.code.numpy())
        count, different = count + 1, different + int(not same or not alike)
    return count, different


def _nearly(theirs: np.ndarray, ours: np.ndarray, table: np.ndarray) -> bool:
    """Whether codes of scales are neighbours, or their values in ``table`` within a step."""
    apart = np.abs(theirs.astype(int) - ours.astype(int))
    return bool(((apart <= 1) | (np.abs(table[theirs] - table[ours]) <= STEP)).all())


def _halves(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return codes.reshape(-1) >> 4, codes.reshape(-1) & 15


def exact(model: Any, dtype: str) -> Any:
    """The same model, its weights as they are, computing in ``dtype``; changed in place.

    bitsandbytes does not multiply in fp64, so that there what it decodes takes the place of codes.
    Rotary frequencies stay fp32: the angle is their product with a position in fp32 by definition.
    """
    wide = getattr(torch, dtype)
    if wide == torch.float64:
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear4bit):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, _decoded(module))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not name.endswith(FREQUENCIES):
            tensor.data = tensor.data.to(wide)
    _compute_in(model, wide)
    return model


class _Exactly(TorchDispatchMode):
    """Takes nothing from fp64 to fp32, as transformers' norms, softmax and losses would.

    The loss needs it most: torch's ``log_softmax`` in fp32 on a CPU is off by 1e-5 over a
    vocabulary of 49,152, and that is an error of all gradients in common.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        narrow = func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64
        if narrow and kwargs.get("dtype") == torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def _precision_of(model: Any) -> contextlib.AbstractContextManager:
    """How a model of its dtype is run: a bf16 one as ``transformers.Trainer`` does with ``bf16``,
    where autocast takes the products with fp32 adapters in bf16 too."""
    found = {parameter.dtype for parameter in model.parameters()}
    if torch.float64 in found:
        return _Exactly()
    if torch.bfloat16 in found:
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def _decoded(module: Any) -> Any:
    weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.bias = module.bias
    return linear


def adapted(base: Any, folder: str | os.PathLike) -> Any:
    """``base`` with the adapter that PEFT reads from ``folder``, to be trained, without dropout."""
    with _quiet():
        return PeftModel.from_pretrained(base, os.fspath(folder), is_trainable=True).eval()


def save(model: Any, folder: Path) -> None:
    """Write the adapter as PEFT does."""
    with _quiet():
        model.save_pretrained(folder, save_embedding_layers=False)


def observe(model: Any, batches: list[Batch], recipe: Recipe, say: Any = None) -> Observation:
    """Run and train PEFT's ``model`` on ``batches`` in turn; it is changed by that.

    Parameters trained in less than fp32, which are those that PEFT trains whole, have an fp32 copy
    that the optimizer updates and they are rounded from, as jqlora does.
    """
    live = {_file_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    masters = {n: _master(p) if p.dtype.itemsize < 4 else p for n, p in live.items()}
    before = {name: _numpy(master) for name, master in masters.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in masters.items() if _decayed(n, p)]},
            {
                "params": [p for n, p in masters.items() if not _decayed(n, p)],
                "weight_decay": 0.0,
            },
        ],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
    )
    hidden, logits, gradients, losses = {}, {}, {}, []
    for number in range(recipe.steps):
        batch = batches[number % len(batches)]
        model.zero_grad(set_to_none=True)
        with _precision_of(model):
            output = model(**_tensors(batch.theirs), output_hidden_states=number == 0)
        output.loss.backward()
        losses.append(output.loss.item())
        if number == 0:
            hidden, logits = seen_in(output, batch, _numpy)
            # the order in which a backward pass comes to them
            gradients = {name: _gradient(p) for name, p in reversed(live.items())}
        del output
        for name, master in masters.items():
            if master is not live[name]:
                master.grad = live[name].grad.float()
        optimizer.step()
        with torch.no_grad():
            for name, master in masters.items():
                if master is not live[name]:
                    live[name].copy_(master)
        if say is not None:
            say(number + 1, recipe.steps)
    after = {name: _numpy(master) for name, master in masters.items()}
    return Observation(hidden, logits, gradients, losses, before, after)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' bars, and their warnings of what comes in other versions."""
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _compute_in(model: Any, dtype: Any) -> None:
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            # a repacking for inference on some processors, whose products have no gradient
            module.support_avx512bf16_for_cpu = False
            _check_decodable(module)


def _check_decodable(module: Any) -> None:
    """Its decoder for AVX-512 misplaces scales of such matrices: nothing could be learnt there."""
    block = module.weight.quant_state.blocksize
    if module.in_features % block and module.in_features % 16 == 0:
        raise ConfigError(
            f"bitsandbytes decodes matrices with {module.in_features} inputs wrongly on CPUs: with "
            f"blocks of {block} it needs a multiple of {block}; compare without --quantized"
        )


def _file_name(name: str) -> str:
    """A parameter's name as in an adapter file."""
    return name.replace(WHOLE, "").replace(".default", "")


def _decayed(name: str, parameter: Any) -> bool:
    return parameter.ndim > 1 and not name.endswith("lora_E")


def _master(parameter: Any) -> Any:
    return torch.nn.Parameter(parameter.detach().float())


def _gradient(parameter: Any) -> np.ndarray:
    found = parameter.grad
    return _numpy(torch.zeros_like(parameter) if found is None else found)


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().float().numpy().copy()


def _tensors(arrays: Arrays) -> dict[str, Any]:
    made = {name: torch.tensor(array) for name, array in arrays.items()}
    return {n: t.long() if t.dtype == torch.int32 else t for n, t in made.items()}
