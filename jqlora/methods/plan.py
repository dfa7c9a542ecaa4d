"""The plan: which sites every spec serves, and which parameters are trained whole.

A plan is built once from a survey of the model, before anything is allocated. It is hashable and
static under jit, and everything else (leaves, effects, files) follows from it.
"""

import dataclasses
import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from jqlora.errors import NoSiteMatched, UnsupportedSite
from jqlora.methods.base import Placement
from jqlora.methods.table import method_of
from jqlora.methods.targeting import place
from jqlora.sites import Leaf, Site, Survey
from jqlora.tree import nearest
from jqlora.types import Path

FULL = "full"
"""The collection of parameters trained whole; its leaves override their originals."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which sites are adapted and how, and which parameters are trained whole; hashable, static."""

    placements: tuple[Placement, ...]
    full: tuple[Leaf, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """The adapted sites, in calling order."""
        return tuple(placement.site for placement in self.placements)

    @property
    def trainable_count(self) -> int:
        """Trainable numbers, padding of unequal ranks left out."""
        return sum(int(row["parameters"]) for row in self.table())

    def table(self) -> list[dict[str, Any]]:
        """One row per adapted site and per parameter trained whole, for printing."""
        rows = []
        for placement in self.placements:
            site, method = placement.site, method_of(placement.spec)
            ranks = method.ranks(placement)
            used = sorted({rank for rank in ranks if rank})
            rows.append(
                {
                    "module": site.template.replace("{}", "*"),
                    "kind": site.kind,
                    "shape": f"{site.features_in} x {site.features_out}",
                    "layers": sum(placement.layers),
                    "method": method.collection,
                    "rank": "/".join(map(str, used)),
                    "parameters": method.parameters(placement),
                }
            )
        rows += [
            {
                "module": leaf.template.replace("{}", "*"),
                "kind": leaf.path[-1],
                "shape": " x ".join(map(str, leaf.shape[len(leaf.lead) :])),
                "layers": math.prod(leaf.lead),
                "method": FULL,
                "rank": "",
                "parameters": math.prod(leaf.shape),
            }
            for leaf in self.full
        ]
        return rows


def assemble(specs: Sequence[Any], survey: Survey, quantized: AbstractSet[Path]) -> Plan:
    """The plan for ``specs`` on the surveyed model, whose leaves ``quantized`` are stored as codes.

    A module that two specs of one method name goes to the first. Raises as :func:`jqlora.plan`
    does.
    """
    placements: list[Placement] = []
    full: dict[Path, Leaf] = {}
    for spec in specs:
        method = method_of(spec)
        found = place(spec, survey.sites)
        taken = {p.site: p for p in placements if method_of(p.spec).collection == method.collection}
        for old in (p for p in found if p.site in taken):
            if set(old.names) - set(taken[old.site].names):
                raise UnsupportedSite(
                    f"two specs serve different layers of the stack {old.site.template}: "
                    "use one spec with rank_pattern and alpha_pattern, or an unscanned model"
                )
        new = [p for p in found if p.site not in taken]
        if not new:
            raise NoSiteMatched(f"every module that {spec!r} matches is served by an earlier spec")
        method.check(spec, new)
        for placement in new:
            site = placement.site
            if site.leaf_path in quantized and len(site.shape_in) + len(site.shape_out) != 2:
                raise UnsupportedSite(f"{placement.names[0]}: only plain matrices can be quantized")
        placements += new
        full.update({leaf.path: leaf for leaf in saved_whole(spec.modules_to_save, survey)})
    return Plan(tuple(placements), tuple(full.values()))


def saved_whole(ends: Sequence[str], survey: Survey) -> list[Leaf]:
    """Parameters of the modules whose dotted name ends in one of ``ends``, as PEFT matches them.

    The end need not begin at a dot: ``norm`` also names ``input_layernorm``. Raises
    :class:`NoSiteMatched` for an end that matches nothing, :class:`UnsupportedSite` for one that
    picks single layers of a stack.
    """
    found: dict[Path, Leaf] = {}
    for end in ends:
        hits = 0
        for leaf in survey.leaves:
            chosen = [_under(name, end) for name in leaf.names]
            if any(chosen) and not all(chosen):
                raise UnsupportedSite(
                    f"modules_to_save '{end}' picks single layers of the stack {leaf.template}: "
                    "train all of them, or load the model unscanned"
                )
            if all(chosen):
                hits += 1
                found[leaf.path] = leaf
        if not hits:
            names = [leaf.template.rsplit(".", 1)[-1] for leaf in survey.leaves]
            raise NoSiteMatched(
                f"modules_to_save '{end}' ends no module's name; nearest: "
                f"{', '.join(nearest(end, dict.fromkeys(names)))}"
            )
    return list(found.values())


def _under(name: str, end: str) -> bool:
    """True where the module, or one that it lies in, has a name with this end."""
    parts = name.split(".")
    return any(".".join(parts[: i + 1]).endswith(end) for i in range(len(parts)))
