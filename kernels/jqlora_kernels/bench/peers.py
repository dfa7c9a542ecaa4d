"""The same operations in other libraries, where they and a GPU that they can use are present.

Their calls are recorded into a CUDA graph and replayed, as the loops of ``timing`` are compiled, so
that neither side pays for launches. Weights are random; values are not compared, only times.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax

from jqlora_kernels.bench import timing
from jqlora_kernels.bench.cases import BLOCK, Case
from jqlora_kernels.bench.timing import Contender


def contenders(case: Case) -> dict[str, Callable[[], Contender]]:
    """bitsandbytes and torchao on this case; what cannot be imported is refused when called."""
    if case.operation == "gradient":
        return {}
    return {
        "bitsandbytes": lambda: _recorded("bitsandbytes", case, _bitsandbytes),
        "torchao": lambda: _recorded("torchao", case, _torchao),
    }


def _recorded(name: str, case: Case, calls_of: Callable[[Any, Case], list]) -> Contender:
    """All layers' calls in one CUDA graph, replayed as often as a round wants."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError("JAX sees no GPU")
    try:
        torch = importlib.import_module("torch")
        importlib.import_module(name)
    except ImportError as error:
        raise NotImplementedError(str(error)) from error
    if not torch.cuda.is_available():
        raise NotImplementedError("torch sees no GPU")
    calls = calls_of(torch, case)
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    turns = timing.turns_for(case.moved_bytes, case.operations, len(calls))

    def run() -> None:
        for _ in range(turns):
            graph.replay()
        torch.cuda.synchronize()

    run()
    return Contender(name, run, turns * len(calls))


def _weights(torch: Any, case: Case) -> list:
    shape = (case.outputs, case.inputs)
    count = timing.layers_for(case.stored_bytes)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


def _bitsandbytes(torch: Any, case: Case) -> list:
    functional = importlib.import_module("bitsandbytes.functional")
    bitsandbytes = importlib.import_module("bitsandbytes")
    stored = [
        functional.quantize_4bit(
            w, blocksize=BLOCK, quant_type="nf4", compress_statistics=case.double_quant
        )
        for w in _weights(torch, case)
    ]
    if case.operation == "decode":
        return [lambda c=c, s=s: functional.dequantize_4bit(c, s) for c, s in stored]
    x = torch.randn((case.rows, case.inputs), device="cuda", dtype=torch.bfloat16)
    return [lambda c=c, s=s: bitsandbytes.matmul_4bit(x, c.t(), s) for c, s in stored]


def _torchao(torch: Any, case: Case) -> list:
    nf4 = importlib.import_module("torchao.dtypes.nf4tensor")
    stored = [nf4.to_nf4(w, BLOCK, 256) for w in _weights(torch, case)]
    if case.operation == "decode":
        return [lambda w=w: w.get_original_weight() for w in stored]
    x = torch.randn((case.rows, case.inputs), device="cuda", dtype=torch.bfloat16)
    return [lambda w=w: nf4.linear_nf4(x, w) for w in stored]
