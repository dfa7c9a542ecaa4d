"""What a training step needs of a GPU's memory, told by the compiler, without the GPU.

The step of the config, on text or on a task, is compiled for the named device, and the compiler's
assignment of buffers is read: every argument, and the room for all that lives between them. What is
not in it: what driver and libraries take of a device, see ``RESERVED``, and the memory of loading
and of evaluations.
"""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jqlora import tree
from jqlora.attach import bind, init, plan
from jqlora.config import RunConfig
from jqlora.errors import ConfigError
from jqlora.methods import Plan
from jqlora.optim.residence import planned, planned_residence
from jqlora.quant import QTensor
from jqlora.run import choices
from jqlora.run.data import check_length
from jqlora.run.head import choose, describe_model
from jqlora.run.sizes import size_of
from jqlora.tasks import TASKS
from jqlora.train.loss import BATCH
from jqlora.train.placement import compiled_bytes, device_limit, lower_on
from jqlora.train.state import TrainState
from jqlora.train.step import make_train_step
from jqlora.train.task_loss import loss_for
from jqlora.train.usage import readable_bytes
from jqlora.types import Params
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
class Present:
    """A device of this process, compiled for as it is."""

    name: str
    memory: int
    mesh: jax.sharding.Mesh

    @classmethod
    def here(cls) -> "Present":
        """The first GPU. Raises ConfigError where there is none."""
        device = jax.local_devices()[0]
        limit = device_limit()
        if device.platform != "gpu" or limit is None:
            raise ConfigError("--device here: this process has no GPU")
        # what the allocator may have already leaves out what the driver takes
        return cls(device.device_kind, limit + RESERVED, jax.sharding.Mesh([device], "x"))


Device: TypeAlias = Target | Present


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one training step on one device."""

    codes: int
    scales: int
    unquantized: int
    adapters: int
    optimizer: int
    batch: int
    temporaries: int
    """Activations, gradients, decoded matrices and workspace at their most."""
    peak: int
    host: int
    """Optimizer state in host memory."""
    scoreless: bool
    """Whether attention is cuDNN's or by blocks; if not, it is XLA's, whose scores take room."""
    host_activations: int = 0
    """What the forward pass leaves in host memory to the backward pass: remat "offload"."""
    estimated: str | None = None
    """Why nothing was compiled, of an estimate; None of a compiled program."""

    def lines(self, target: Device) -> list[str]:
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
        if self.host_activations:
            found.append(f"  {'activations, host':26}{readable_bytes(self.host_activations):>12}")
        if self.estimated is not None:
            return [f"one step ESTIMATED for {target.name}; {self.estimated}:", *found]
        note = [] if self.scoreless else ["  " + NO_CUDNN]
        return [f"one step compiled for {target.name}, jax {jax.__version__}:", *found, *note]

    def fits(self, target: Device) -> bool:
        """Whether the device has room."""
        return self.peak <= target.memory - RESERVED


@dataclasses.dataclass(frozen=True)
class Step:
    """A config's training step in abstract: nothing of it is allocated."""

    config: RunConfig
    model: Any
    params: Params
    plan: Plan
    tx: optax.GradientTransformation
    batch: dict[str, jax.ShapeDtypeStruct]

    def create(self) -> TrainState:
        """The state before the first update; to be traced."""
        key, dtype = jax.random.key(0), self.config.method.dtype
        base = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.params)
        return TrainState.create(init(key, self.plan, base, dtype=dtype), self.tx, key)

    def parts(self) -> dict[str, Any]:
        """The bytes that shapes tell: base, adapters, optimizer state and batch."""
        state, away = planned(self.create)
        homes = planned_residence(state.opt_state, away.opt_state)
        leaves = tree.flatten(self.params).values()
        quantized = [leaf for leaf in leaves if isinstance(leaf, QTensor)]
        codes = sum(size_of(leaf.codes) for leaf in quantized)
        return {
            "codes": codes,
            "scales": size_of(quantized) - codes,
            "unquantized": size_of([leaf for leaf in leaves if not isinstance(leaf, QTensor)]),
            "adapters": size_of(state.adapters),
            "optimizer": homes.device,
            "batch": size_of(self.batch),
            "host": homes.host,
        }


def abstract_step(config: RunConfig) -> Step:
    """The step of a config; headers of its files are read, nothing is run.

    ``model.dtype`` ``auto`` is what it is on a GPU, bfloat16.
    """
    config = on_gpu(config)
    chosen = choose(config)
    model, params = describe_model(config, chosen, weightless=True)
    check_length(config, model)
    sites = plan(model, params, choices.adapter_spec(chosen.method))
    tx = choices.optimizer_of(config, sites, config.train.steps or 2**17)
    config = dataclasses.replace(config, method=chosen.method)
    return Step(config, model, params, sites, tx, batch_of(config, model.task))


def batch_of(config: RunConfig, task: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the longest batch of the config's data, for a model of this task."""
    rows, length = config.train.batch_size, config.data.length

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    if task == "causal-lm":
        return dict.fromkeys(BATCH, ints(rows, length))
    read: dict[str, jax.ShapeDtypeStruct] = {
        name: ints(rows, length) for name in ("input_ids", "attention_mask")
    }
    if task == "question-answering":
        return read | dict.fromkeys(("start_positions", "end_positions"), ints(rows))
    if task == "seq2seq-lm":
        return read | {"labels": ints(rows, config.data.target_length)}
    if task in ("masked-lm", "token-classification"):
        return read | {"labels": ints(rows, length)}
    number = TASKS[config.data.task or ""].number
    return read | {"labels": jax.ShapeDtypeStruct((rows,), jnp.float32 if number else jnp.int32)}


def compile_step(config: RunConfig, target: Device) -> Memory:
    """The memory of the config's training step, from the program compiled for ``target``.

    ``model.attention`` ``auto`` is cuDNN where its libraries are installed. Raises what
    :func:`jqlora_kernels.aot.compile_for` raises.
    """
    found = abstract_step(config)
    model = found.model
    cudnn = aot.installed("nvidia.cudnn")
    if model.attention == "auto" and not cudnn:
        model = model.clone(attention="xla")
    step = make_train_step(
        bind(model, found.plan),
        found.tx,
        accumulate=config.train.accumulate,
        loss=loss_for(model),
    )
    present = isinstance(target, Present)
    mesh = target.mesh if present else aot.mesh(target)
    lowered = lower_on(mesh, step, found.create, found.params, found.batch)
    program = lowered.compile() if present else aot.compiled(lowered)
    analysis: Any = program.memory_analysis()
    parts = found.parts()
    return Memory(
        **parts,
        temporaries=analysis.temp_size_in_bytes,
        host_activations=analysis.host_temp_size_in_bytes,
        peak=compiled_bytes(program, host_bytes=parts["host"]),
        scoreless=cudnn or model.attention == "blockwise",
    )


def on_gpu(config: RunConfig) -> RunConfig:
    """The config with the dtype that ``auto`` is there."""
    if config.model.dtype != "auto":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))


def named(target: Device) -> AbstractContextManager[Any]:
    """A context in which functions are traced for the device, not for this process's."""
    if isinstance(target, Present):
        return nullcontext()
    if aot.missing():
        kind = AbstractDevice(target.name, num_cores=target.cores, platform="gpu")
        return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=kind))
    return use_abstract_mesh(aot.mesh(target).abstract_mesh)
