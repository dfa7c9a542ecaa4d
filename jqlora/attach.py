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
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.errors import AdapterNotReached, UnsupportedSite
from jqlora.methods import COLLECTIONS, FULL, Placement, Plan, assemble, method_of
from jqlora.quant import QTensor, quantized_matmul
from jqlora.sites import Observer, Survey, abstract, traced_and_static
from jqlora.tree import flatten, fold_in_path, unflatten
from jqlora.types import Adapters, Params, Path, Variables

PREFIX = "jqlora_"
INDEX = PREFIX + "index"


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


def init(key: jax.Array, plan: Plan, params: Params | None = None) -> dict[str, Any]:
    """Fresh adapters, fp32: ``{"lora": {path: {"a", "b"}}, "full": {path: leaf}}``.

    Numbers depend on ``key`` and the layer's name alone, so they are the same for a scanned and an
    unscanned model, and adding a target leaves the others unchanged. ``params`` is needed only
    where the plan trains parameters whole: ``full`` starts as their copy.
    """
    flat: dict[Path, jax.Array] = {}
    for placement in plan.placements:
        method = method_of(placement.spec)
        for name, leaf in method.init(key, placement).items():
            flat[(method.collection, *placement.site.path, name)] = leaf
    if plan.full:
        if params is None:
            raise ValueError(
                "this plan trains modules whole (modules_to_save): pass params to init"
            )
        base = flatten(params)
        for leaf in plan.full:
            # a real copy, which a donated training step may overwrite
            flat[(FULL, *leaf.path)] = jnp.array(dense(base[leaf.path]), jnp.float32, copy=True)
    return unflatten(flat)


def dense(leaf: Any) -> jax.Array:
    """The matrix that a leaf of ``params`` stands for."""
    return leaf.dequantize() if isinstance(leaf, QTensor) else leaf


def bind(model: nn.Module, plan: Plan | None = None) -> "Bound":
    """A pure function ``apply(variables, *args, key=None, **kwargs)`` that interprets ``model``.

    ``variables`` is ``{"params": base, **adapters}``; further collections pass to the model as
    they are, and so do ``args`` and ``kwargs`` (``rngs``, ``mutable`` and ``method`` included, as
    for ``model.apply``). Without ``key`` there is no dropout. Without a plan the bare model is
    run, quantized or not.

    Raises :class:`AdapterNotReached` where a planned module was not called, unless the model itself
    says that such a call leaves it out, by a method ``leaves_out(path, *args, **kwargs)``.

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
        _check_collections(variables, self.plan)
        grafted, quantized = _graft(variables, self.plan.placements, key)
        others = {n: v for n, v in variables.items() if n != "params" and n not in _OURS}
        by_path: dict[Path, list[Placement]] = {}
        for placement in self.plan.placements:
            by_path.setdefault(placement.site.path, []).append(placement)
        with nn.intercept_methods(_Interpreter(by_path, quantized, reached)):
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
                leaves = [_at(adapters[method.collection], p.site.path) for p in placements]
                total = total + method.penalty(leaves, placements)
        return total


_OURS = COLLECTIONS | {FULL}


def _check_collections(variables: Variables, plan: Plan) -> None:
    planned = {method_of(placement.spec).collection for placement in plan.placements}
    planned |= {FULL} if plan.full else set()
    given = _OURS & set(variables)
    if missing := sorted(planned - given):
        raise ValueError(f"variables lack the planned collections {missing}: pass **adapters")
    if extra := sorted(given - planned):
        raise ValueError(f"variables hold {extra}, which the bound plan knows nothing of")


def _graft(
    variables: Variables, placements: Sequence[Placement], key: jax.Array | None
) -> tuple[dict[str, Any], dict[Path, QTensor]]:
    """The params tree to give the model, and the quantized kernels by module, left out of it."""
    flat = override(variables["params"], variables.get(FULL, {}))
    if taken := [path for path in flat if path[-1].startswith(PREFIX)]:
        raise ValueError(f"parameter {'/'.join(taken[0])} has the reserved prefix {PREFIX}")
    quantized: dict[Path, QTensor] = {}
    for path in [p for p, leaf in flat.items() if isinstance(leaf, QTensor)]:
        leaf = flat.pop(path)
        if path[-1] != "kernel":
            raise UnsupportedSite(f"{'/'.join(path)} is quantized, but only dense kernels can be")
        quantized[path[:-1]] = leaf.flat_lead() if leaf.lead else leaf
        if leaf.lead:
            index = jnp.arange(math.prod(leaf.lead), dtype=jnp.int32).reshape(leaf.lead)
            flat[(*path[:-1], INDEX)] = index
    for placement in placements:
        method, site = method_of(placement.spec), placement.site
        leaves = dict(_at(variables[method.collection], site.path))
        leaves |= {name: jnp.asarray(leaf) for name, leaf in method.constants(placement).items()}
        if key is not None and placement.spec.dropout:
            keys = jnp.stack([fold_in_path(key, tuple(n.split("."))) for n in site.names])
            leaves["key"] = keys.reshape(site.lead)
        for name, leaf in leaves.items():
            flat[(*site.path, f"{PREFIX}{method.collection}_{name}")] = leaf
    return unflatten(flat), quantized


def override(params: Params, full: Adapters) -> dict[Path, Any]:
    """Flat ``params`` with the leaves of ``full`` in place of the originals, in the originals'
    dtype."""
    flat = flatten(params)
    for path, leaf in flatten(full).items():
        if path not in flat:
            raise ValueError(f"full/{'/'.join(path)} overrides no parameter of the model")
        flat[path] = leaf.astype(flat[path].dtype)
    return flat


def _at(tree: Adapters, path: Path) -> Mapping[str, Any]:
    for name in path:
        if name not in tree:
            raise ValueError(f"the adapters hold no leaves for {'.'.join(path)}")
        tree = tree[name]
    return tree


@dataclasses.dataclass
class _Interpreter:
    """The interceptor of one trace; it notes the planned modules that it reached."""

    placements: Mapping[Path, Sequence[Placement]]
    quantized: Mapping[Path, QTensor]
    reached: set[Path]

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
        return method.effect(x, flat, leaves, placement, key).reshape(y.shape)


def _quantized_dense(
    module: nn.Module, x: jax.Array, kernel: QTensor, index: jax.Array | None
) -> jax.Array:
    """What ``nn.Dense`` computes, on codes: x W + bias in the module's dtype."""
    plain = isinstance(module, nn.Dense) and inspect.unwrap(type(module).__call__) is _DENSE_CALL
    if not plain or module.dot_general or module.dot_general_cls:
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
