"""What a training step needs of a GPU's memory, told by the compiler, without the GPU.

The step of the config is compiled for the named device, and the compiler's assignment of buffers is
read: every argument, and the room for all that lives between them. What is not in it: what driver
and libraries take of a device, see ``RESERVED``, and the memory of loading and of evaluations.
"""

import dataclasses
import importlib.util
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp

from jqlora import tree
from jqlora.attach import bind, init, plan
from jqlora.config import RunConfig
from jqlora.errors import ConfigError
from jqlora.optim.residence import planned, planned_residence
from jqlora.quant import QTensor
from jqlora.run import choices
from jqlora.run.data import check_length
from jqlora.run.head import choose, describe_model
from jqlora.run.sizes import size_of
from jqlora.train.loss import BATCH
from jqlora.train.placement import compiled_bytes, lower_on
from jqlora.train.state import TrainState
from jqlora.train.step import make_train_step
from jqlora.train.usage import readable_bytes
from jqlora_kernels import aot
from jqlora_kernels.aot_targets import GIB, Target

RESERVED = GIB
"""Bytes of a device that a program cannot have: CUDA's context, libraries' workspaces and what an
allocator loses; between 0.5 and 1 GiB."""
NO_CUDNN = (
    "attention is XLA's here, with its scores in memory: for cuDNN's, which a GPU would use, "
    "pip install nvidia-cudnn-cu12 or nvidia-cudnn-cu13, like the plugin"
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one training step on one device, from the compiled program."""

    codes: int
    scales: int
    unquantized: int
    adapters: int
    optimizer: int
    batch: int
    temporaries: int
    """Activations, decoded matrices and workspace at their most."""
    peak: int
    host: int
    """Optimizer state in host memory."""
    cudnn: bool
    """Whether cuDNN's attention could be compiled; if not, XLA's was, whose scores take room."""

    def lines(self, target: Target) -> list[str]:
        """As a table."""
        rows = {
            "base, codes": self.codes,
            "base, scales": self.scales,
            "base, not quantized": self.unquantized,
            "adapters": self.adapters,
            "optimizer state": self.optimizer,
            "batch": self.batch,
            "activations and workspace": self.temporaries,
            "peak": self.peak,
        }
        found = [f"  {name:26}{readable_bytes(size):>12}" for name, size in rows.items()]
        if self.host:
            found.append(f"  {'optimizer state, host':26}{readable_bytes(self.host):>12}")
        note = [] if self.cudnn else ["  " + NO_CUDNN]
        return [f"one step compiled for {target.name}, jax {jax.__version__}:", *found, *note]

    def fits(self, target: Target) -> bool:
        """Whether the device has room."""
        return self.peak <= target.memory - RESERVED


def compile_step(config: RunConfig, target: Target) -> Memory:
    """The memory of the config's training step; headers of its files are read, nothing is run.

    ``model.dtype`` and ``model.attention`` ``auto`` are what they are on a GPU: bfloat16, and cuDNN
    where its libraries are installed. Raises ConfigError for a run that does not train on text, and
    what :func:`jqlora_kernels.aot.compile_for` raises.
    """
    if config.data.task is not None:
        raise ConfigError(
            f"data.task={config.data.task!r}: only a step on text is compiled for a device"
        )
    config = on_gpu(config)
    chosen = choose(config)
    model, params = describe_model(config, chosen, weightless=True)
    check_length(config, model)
    cudnn = importlib.util.find_spec("nvidia.cudnn") is not None
    if model.attention == "auto" and not cudnn:
        model = model.clone(attention="xla")
    sites = plan(model, params, choices.adapter_spec(chosen.method))
    tx = choices.optimizer_of(config, sites, config.train.steps or 2**17)

    def create() -> TrainState:
        key = jax.random.key(0)
        base = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
        return TrainState.create(init(key, sites, base, dtype=config.method.dtype), tx, key)

    shape = (config.train.batch_size, config.data.length)
    batch = dict.fromkeys(BATCH, jax.ShapeDtypeStruct(shape, jnp.int32))
    step = make_train_step(bind(model, sites), tx, accumulate=config.train.accumulate)
    program = lower_on(aot.mesh(target), step, create, params, batch).compile()
    state, away = planned(create)
    homes = planned_residence(state.opt_state, away.opt_state)
    leaves = tree.flatten(params).values()
    quantized = [leaf for leaf in leaves if isinstance(leaf, QTensor)]
    codes = sum(size_of(leaf.codes) for leaf in quantized)
    analysis: Any = program.memory_analysis()
    return Memory(
        codes=codes,
        scales=size_of(quantized) - codes,
        unquantized=size_of([leaf for leaf in leaves if not isinstance(leaf, QTensor)]),
        adapters=size_of(state.adapters),
        optimizer=homes.device,
        batch=size_of(batch),
        temporaries=analysis.temp_size_in_bytes,
        peak=compiled_bytes(program),
        host=homes.host,
        cudnn=cudnn,
    )


def on_gpu(config: RunConfig) -> RunConfig:
    """The config with the dtype that ``auto`` is there."""
    if config.model.dtype != "auto":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))


def named(target: Target) -> AbstractContextManager[Any]:
    """A context in which functions are traced for the device, not for this process's."""
    return jax.sharding.use_abstract_mesh(aot.mesh(target).abstract_mesh)
