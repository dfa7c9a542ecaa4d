"""Attaching adapters to an unchanged Linen model: plan where, initialise, bind.

Fine-tuning is an interpretation of the model, not a rewrite of it. Adapters live in collections of
their own, beside ``params``. To apply the model, a private function *grafts* each adapter leaf
beside the matrix of its module, in the params tree that the model is given, and an *interceptor*
replaces the call of that module by its method's effect. Linen ignores siblings that it does not
know, and whatever slices params on the way to a module (``nn.scan``, ``nn.vmap``, ``nn.remat``)
slices the grafted leaves with them. Collections read natively inside the module would need every
scan of every model to list them, and are dropped in silence where one does not.

A quantized kernel never enters the params tree. One without lead axes is closed over; of a stack,
the grafted leaf is the layer's index, because slicing codes would copy them before every kernel
call.

Guards: only ``__call__`` of modules with a path counts; the interceptor's context is never public,
since entering it around an already traced function would change nothing; and after each trace the
modules reached are compared with those planned, because a stale trace inside the model (a
class-level ``nn.jit``) loses adapters without any other sign.

This is the one file that intercepts, and the one that another module system would replace.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jqlora import products
from jqlora.errors import AdapterNotReached, UnsupportedSite
from jqlora.graft import INDEX, OURS, PREFIX, at, check_collections, dense, graft
from jqlora.methods import FULL, Placement, Plan, assemble, method_of
from jqlora.methods.by_row import ADAPTER_IDS, effect_by_row
from jqlora.quant import QTensor, quantized_matmul
from jqlora.sites import Observer, Survey, abstract, traced_and_static
from jqlora.tree import flatten, unflatten
from jqlora.types import Adapters, Params, Path, Variables


def plan(
    model: nn.Module, params: Params, spec: Any | Sequence[Any], *args: Any, **kwargs: Any
) -> Plan:
    """Where ``spec`` (or each of several) goes in ``model``; nothing is allocated or computed.

    ``params`` may be abstract (``jax.ShapeDtypeStruct`` leaves). ``args`` and ``kwargs`` are
    example inputs, arrays or abstract; without any, ``model.example_inputs()`` gives keyword
    arguments.

    A module that two specs of one method name goes to the first.

    Raises :class:`NoSiteMatched` where anything in a spec matches nothing,
    :class:`UnsupportedSite` where a matched module or its rank cannot be served.
    """
    survey = inspect_model(model, params, *args, **kwargs)
    specs = spec if isinstance(spec, list | tuple) else (spec,)
    return assemble(specs, survey, quantized_paths(params))


def quantized_paths(params: Params) -> set[Path]:
    """Paths of the leaves that are stored as codes."""
    return {path for path, leaf in flatten(params).items() if isinstance(leaf, QTensor)}


def inspect_model(model: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Survey:
    """Trace ``model`` abstractly and report its sites and parameters; inputs as for
    :func:`plan`."""
    if not args and not kwargs:
        if not hasattr(model, "example_inputs"):
            raise TypeError(
                f"{type(model).__name__} has no example_inputs(): give inputs after the spec"
            )
        kwargs = dict(model.example_inputs())
    stored = abstract(params)
    observer = Observer(stored)
    arrays, rebuild = traced_and_static((args, kwargs))

    def call(params: Params, arrays: list[Any]) -> Any:
        inputs, keywords = rebuild(arrays)
        return model.apply({"params": params}, *inputs, **keywords)

    with nn.intercept_methods(observer):
        jax.eval_shape(call, unflatten(stored), arrays)
    return observer.survey()


def init(
    key: jax.Array, plan: Plan, params: Params | None = None, *, dtype: DTypeLike = "float32"
) -> dict[str, Any]:
    """Fresh adapters: ``{"lora": {path: {"a", "b"}}, "full": {path: leaf}}``.

    Numbers depend on ``key`` and the layer's name alone, so they are the same for a scanned and an
    unscanned model, and adding a target leaves the others unchanged. ``params`` is needed only
    where the plan trains parameters whole: ``full`` starts as their copy. ``dtype`` is float32 or
    bfloat16, see :mod:`jqlora.optim.rounding` for how the latter is trained.
    """
    flat: dict[Path, jax.Array] = {}
    for placement in plan.placements:
        method = method_of(placement.spec)
        for name, leaf in method.init(key, placement).items():
            flat[(method.collection, *placement.site.path, name)] = leaf.astype(dtype)
    if plan.full:
        if params is None:
            raise ValueError(
                "this plan trains modules whole (modules_to_save): pass params to init"
            )
        base = flatten(params)
        for leaf in plan.full:
            # a real copy, which a donated training step may overwrite
            flat[(FULL, *leaf.path)] = jnp.array(dense(base[leaf.path]), dtype, copy=True)
    return unflatten(flat)


def bind(model: nn.Module, plan: Plan | None = None) -> "Bound":
    """A pure function ``apply(variables, *args, key=None, **kwargs)`` that interprets ``model``.

    ``variables`` is ``{"params": base, **adapters}``; further collections pass to the model as
    they are, and so do ``args`` and ``kwargs`` (``rngs``, ``mutable`` and ``method`` included, as
    for ``model.apply``). Without ``key`` there is no dropout. Without a plan the bare model is
    run, quantized or not.

    Raises :class:`AdapterNotReached` where a planned module was not called, unless the model itself
    says that such a call leaves it out, by a method ``leaves_out(path, *args, **kwargs)``.

    With the plan and adapters of :func:`jqlora.stack`, ``variables["adapter_ids"]``, int32 [B],
    says which of them serves each row of the inputs; -1 is none, the base alone.

    >>> apply = bind(model, plan)                                   # doctest: +SKIP
    >>> apply({"params": params, **adapters}, input_ids).logits     # doctest: +SKIP
    """
    return Bound(model, Plan(()) if plan is None else plan)


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """What :func:`bind` returns: the function, with what its plan asks of training."""

    model: nn.Module
    plan: Plan

    def __call__(
        self, variables: Variables, *args: Any, key: jax.Array | None = None, **kwargs: Any
    ) -> Any:
        reached: set[Path] = set()
        result = self.partly(reached, variables, *args, key=key, **kwargs)
        left_out = getattr(self.model, "leaves_out", lambda path, *args, **kwargs: False)
        meant = {site.path for site in self.plan.sites if left_out(site.path, *args, **kwargs)}
        self.check(reached | meant)
        return result

    def partly(
        self,
        reached: set[Path],
        variables: Variables,
        *args: Any,
        key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        """One call of several that are a pass through the model together (``method=``).

        The planned modules that it called are added to ``reached``, for :meth:`check` after the
        last.
        """
        check_collections(variables, self.plan)
        if ADAPTER_IDS in variables and key is not None:
            raise ValueError("adapters that differ by row are for use, not for training: no key")
        grafted, quantized = graft(variables, self.plan.placements, key)
        others = {n: v for n, v in variables.items() if n != "params" and n not in OURS}
        by_path: dict[Path, list[Placement]] = {}
        for placement in self.plan.placements:
            by_path.setdefault(placement.site.path, []).append(placement)
        rows = variables.get(ADAPTER_IDS)
        with nn.intercept_methods(_Interpreter(by_path, quantized, reached, rows)):
            return self.model.apply({"params": grafted, **others}, *args, **kwargs)

    def check(self, reached: set[Path]) -> None:
        """Raises :class:`AdapterNotReached` where a planned module is not among ``reached``."""
        planned = {placement.site.path for placement in self.plan.placements}
        if missed := sorted(".".join(path) for path in planned - reached):
            raise AdapterNotReached(
                f"the trace never called {', '.join(missed)}, so their adapters would be lost: a "
                "class-level nn.jit with an old trace, or a branch that skips them"
            )

    def penalty(self, adapters: Adapters) -> jax.Array:
        """What the plan's methods ask to be minimized beside the loss: fp32 scalar, 0 for LoRA."""
        total = jnp.zeros((), jnp.float32)
        for spec in dict.fromkeys(placement.spec for placement in self.plan.placements):
            method = method_of(spec)
            if method.penalty is not None:
                placements = [p for p in self.plan.placements if p.spec == spec]
                leaves = [at(adapters[method.collection], p.site.path) for p in placements]
                total = total + method.penalty(leaves, placements)
        return total


@dataclasses.dataclass
class _Interpreter:
    """The interceptor of one trace; it notes the planned modules that it reached."""

    placements: Mapping[Path, Sequence[Placement]]
    quantized: Mapping[Path, QTensor]
    reached: set[Path]
    rows: jax.Array | None

    def __call__(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module, path = context.module, context.module.path
        placements = self.placements.get(path, ())
        kernel = self.quantized.get(path)
        ours = bool(path) and context.method_name == "__call__"
        if not ours or (not placements and kernel is None):
            return next_fun(*args, **kwargs)
        # a detached module may repeat the path of a planned one, but not what was grafted there
        own = module.variables.get("params", {})
        x = args[0] if args else kwargs["inputs"]
        if kernel is not None and "kernel" not in own:
            y = _quantized_dense(module, x, kernel, own.get(INDEX))
        else:
            y = next_fun(*args, **kwargs)
        for placement in placements:
            y = self._adapted(placement, own, x, y)
        return y

    def _adapted(self, placement: Placement, own: Mapping[str, Any], x: Any, y: Any) -> Any:
        method, site = method_of(placement.spec), placement.site
        prefix = f"{PREFIX}{method.collection}_"
        leaves = {n.removeprefix(prefix): v for n, v in own.items() if n.startswith(prefix)}
        if not leaves:
            return y
        self.reached.add(site.path)
        key = leaves.pop("key", None)
        if site.kind == "dense":
            x = x.reshape(*x.shape[: x.ndim - len(site.shape_in)], site.features_in)
        flat = y.reshape(*y.shape[: y.ndim - len(site.shape_out)], site.features_out)
        if self.rows is not None:
            return effect_by_row(placement, self.rows, x, flat, leaves).reshape(y.shape)
        return method.effect(x, flat, leaves, placement, key).reshape(y.shape)


def _quantized_dense(
    module: nn.Module, x: jax.Array, kernel: QTensor, index: jax.Array | None
) -> jax.Array:
    """What ``nn.Dense`` computes, on codes: x W + bias in the module's dtype."""
    plain = isinstance(module, nn.Dense) and inspect.unwrap(type(module).__call__) is _DENSE_CALL
    usual = module.dot_general in (None, products.dot_general) and not module.dot_general_cls
    if not plain or not usual:
        raise UnsupportedSite(
            f"{'.'.join(module.path)}: a quantized kernel serves a plain nn.Dense, "
            f"not {type(module).__name__} with its own product"
        )
    bias = module.get_variable("params", "bias") if module.use_bias else None
    types = [x.dtype, kernel.dtype, *([] if bias is None else [bias.dtype])]
    dtype = module.dtype or jnp.result_type(*types)
    y = quantized_matmul(x.astype(dtype), kernel, index)
    if bias is not None:
        y = y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y


_DENSE_CALL = inspect.unwrap(nn.Dense.__call__)
