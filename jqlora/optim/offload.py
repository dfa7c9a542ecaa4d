"""Optimizer state in the host's memory, streamed through the update page by page.

The stand-in for bitsandbytes' paged optimizers (QLoRA §3), which rest on CUDA's unified memory: a
driver moves pages when a kernel touches them. XLA has no such memory, but it has memory kinds, and
a program may say which of its arguments live in pinned host memory. What has to be avoided is one
``device_put`` of a whole tree: everything is then copied before anything is used. Here each leaf is
cut along its leading axis, the layers of a stack, and a loop takes one page after another to the
device, updates it and writes it back in place. So the device holds one page of every array that the
update of a leaf needs, the host one copy of the state, and loops of different leaves share their
pages' memory. XLA copies pages by DMA; copies and arithmetic follow each other within the loop.

The arrays say themselves where they live: neither the state's tree nor, hence, a checkpoint depends
on it. An array that is moved to the device goes through the same loop, so that the numbers are the
same bit for bit wherever it lives. Against ``inner`` alone, which a compiler fuses with all that is
around it, Adam's may differ in the last bit: XLA then divides and contracts in other places.

Pages and leaves are updated one at a time, which is the same as all at once only if no element's
update depends on another's. A transformation of which that is not so (a global norm, a factored
moment) is refused.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import optax
from jax import lax

from jqlora.optim.elementwise import check_elementwise
from jqlora.optim.parts import Named, Parts, named, renamed
from jqlora.tree import flatten, unflatten
from jqlora.types import Path, PyTree

Offload: TypeAlias = Literal["none", "auto", "all"]
PAGE_BYTES = 64 * 2**20
SMALLEST = 100_000
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def offload(
    inner: optax.GradientTransformation,
    *,
    page_bytes: int = PAGE_BYTES,
    smallest: int = SMALLEST,
    home: Any = HOST,  # a jax.memory.Space, which type checkers cannot see
) -> optax.GradientTransformationExtraArgs:
    """``inner`` with its state in pinned host memory (``home``), updated in pages.

    ``init`` makes the state leaf by leaf and puts arrays of ``smallest`` elements or more on the
    host, with the sharding that they have on the device. ``update`` streams those in pages of at
    most ``page_bytes`` each, wherever a leaf's leading axis can be cut so (two pages at least; an
    axis that cannot be cut at all makes one page). A leading axis should not be sharded: cutting it
    is right but moves data between devices.

    With ``home=jax.memory.Space.Device`` it stays where it is, and pages only bound the memory that
    an update takes: 8-bit moments are decoded a page at a time.

    ``inner`` must update every element by itself: chain what looks at a whole tree or leaf, such as
    clipping by the global norm, outside. Raises :class:`ConfigError` in ``init`` where it does not.

    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), offload(optax.scale_by_adam()),
    ...                  optax.scale_by_learning_rate(1e-4))                     # doctest: +SKIP
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> PyTree:
        leaves = _arrays(params)
        check_elementwise(inner, leaves)
        found = named(inner.init({}))
        for path, leaf in leaves.items():
            for key, part in named(inner.init(unflatten({path: leaf}))).items():
                if key not in found:
                    found[key] = jax.device_put(part, home) if part.size >= smallest else part
        return renamed(jax.eval_shape(inner.init, params), found)

    def update(updates: Any, state: PyTree, params: Any = None, **extra: Any) -> tuple[Any, PyTree]:
        gradients = _arrays(updates)
        weights = None if params is None else _arrays(params)
        parts, old = Parts(inner, gradients), named(state)
        # wherever their arrays live: the rounding of a run must not depend on the room there was
        streamed = [p for p in gradients if any(old[k].size >= smallest for k in parts.own(p))]
        resident = [path for path in gradients if path not in streamed]

        def restricted(tree: Mapping[Path, Any] | None) -> Any:
            return None if tree is None else unflatten({path: tree[path] for path in resident})

        found, new = inner.update(
            restricted(gradients),
            renamed(parts.template(resident), old),
            restricted(weights),
            **extra,
        )
        done, after = _arrays(found), named(new)
        for path in streamed:
            template = parts.template([path])
            step = functools.partial(_step, inner, template, path, extra)
            weight = None if weights is None else weights[path]
            own = {key: old[key] for key in parts.own(path)}
            shared = {key: old[key] for key in parts.shared}
            done[path], moved = _stream(step, gradients[path], own, shared, weight, page_bytes)
            after |= moved
        return unflatten(flatten(updates) | done), renamed(state, after)

    return optax.GradientTransformationExtraArgs(init, update)


def on_host(leaf: Any) -> bool:
    """Whether an array, or a traced one, lives in host memory."""
    return getattr(jax.typeof(leaf), "memory_space", DEVICE) == HOST


def pages(lengths: list[int], nbytes: int, page_bytes: int) -> int:
    """Into how many equal pages arrays of these leading lengths are cut: the fewest, two or more,
    that divide every length and hold at most ``page_bytes`` of ``nbytes``; else as many as can be.
    """
    common = math.gcd(*lengths)
    counts = [count for count in range(2, common + 1) if common % count == 0]
    return next((count for count in counts if nbytes / count <= page_bytes), common)


def _step(inner, template, path: Path, extra, gradient, own: Named, shared: Named, weight):
    """The inner update of one leaf or of one page of it, all of it on the device."""
    state = renamed(template, own | shared)
    params = None if weight is None else unflatten({path: weight})
    updates, state = inner.update(unflatten({path: gradient}), state, params, **extra)
    return flatten(updates)[path], {key: leaf for key, leaf in named(state).items() if key in own}


def _stream(step, gradient, own: Named, shared: Named, weight, page_bytes: int):
    """Update of one leaf and its new state; the pages of the update replace those of the gradient.

    A loop that carries the arrays writes each page in place, where a scan would build new stacks.
    """
    where = {key: on_host(leaf) for key, leaf in own.items()}
    lengths = [leaf.shape[0] if leaf.ndim else 1 for leaf in (gradient, *own.values())]
    largest = max(leaf.nbytes for leaf in own.values())
    count = pages(lengths, largest, page_bytes)

    def page(stack, number):
        if not stack.ndim:
            return stack
        size = stack.shape[0] // count
        return lax.dynamic_slice_in_dim(stack, number * size, size)

    def put(stack, part, number):
        if not stack.ndim:
            return part
        return lax.dynamic_update_slice_in_dim(stack, part, number * part.shape[0], 0)

    def body(number, carry):
        gradient, own = carry
        here = {
            key: jax.device_put(page(leaf, number), DEVICE) if where[key] else page(leaf, number)
            for key, leaf in own.items()
        }
        part = None if weight is None else page(weight, number)
        update, new = step(page(gradient, number), here, shared, part)
        if update.dtype != gradient.dtype:
            raise TypeError(f"offload: updates are {update.dtype}, gradients {gradient.dtype}")
        moved = {
            key: put(leaf, jax.device_put(new[key], HOST) if where[key] else new[key], number)
            for key, leaf in own.items()
        }
        return put(gradient, update, number), moved

    return lax.fori_loop(0, count, body, (gradient, own))


def _arrays(tree: Any) -> dict[Path, Any]:
    """Arrays of nested dicts by path; what optax puts where a mask hides one is none."""
    return {path: leaf for path, leaf in flatten(tree).items() if jax.tree.leaves(leaf)}
