"""Which layers of which sites a spec serves: PEFT's rules, and an error for whatever matches
nothing.

* ``targets`` a list: a name matches a module whose dotted name it equals or ends (after a dot).
* ``targets`` a string: one regular expression for the whole dotted name; ``"all-linear"``: every
  linear module but the output head, by the names that heads have.
* ``exclude`` takes away, by the same two rules; modules under ``modules_to_save`` are trained
whole and
  never adapted.
* ``layers_to_transform`` keeps the layers whose number, the first in the dotted name, is listed.

PEFT raises only when nothing at all matched; here every single name has to match something, because
one misspelt name among five is the more common mistake.
"""

import re
from collections.abc import Iterable, Sequence

from jqlora.errors import NoSiteMatched, UnsupportedSite
from jqlora.methods.base import Placement, Spec
from jqlora.sites import Site, without_numbers
from jqlora.tree import nearest

ALL_LINEAR = "all-linear"
OUTPUT_HEAD = "lm_head"
HEADS = (OUTPUT_HEAD, "classifier", "score", "qa_outputs")


def place(spec: Spec, sites: Sequence[Site]) -> tuple[Placement, ...]:
    """The sites that ``spec`` serves, in calling order.

    Raises :class:`NoSiteMatched` for a target, exclusion or layer that matches nothing, and
    :class:`UnsupportedSite` for a matched module that no adapter can serve.
    """
    _check_names(spec, sites)
    placements = []
    for site in sites:
        layers = tuple(_served(spec, site, name) for name in site.names)
        if any(layers):
            if site.problem:
                raise UnsupportedSite(
                    f"{site.names[layers.index(True)]}: {site.problem}; exclude it"
                )
            placements.append(Placement(site, spec, layers))
    if not placements:
        raise NoSiteMatched(_why_nothing(spec, sites))
    return tuple(placements)


def matches(targets: str | Iterable[str], name: str) -> bool:
    """True where a regular expression matches all of ``name``, or one of a list of names ends
    it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def layer_number(name: str) -> int | None:
    """The first component of a dotted name that is a number and not the first of all."""
    return next((int(part) for part in name.split(".")[1:] if part.isdigit()), None)


def pattern_value(pattern: Sequence[tuple[str, float]], name: str, default: float) -> float:
    """The value of the first pattern that matches the end of ``name``, as PEFT's rank patterns
    do."""
    return next((value for key, value in pattern if pattern_matches(key, name)), default)


def pattern_matches(key: str, name: str) -> bool:
    """True where the regular expression ``key`` matches the end of ``name`` from after a dot."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def check_pattern(field: str, keys: Iterable[str], placements: Sequence[Placement]) -> None:
    """Raise :class:`NoSiteMatched` for a pattern's key that matches no adapted module."""
    names = tuple(name for placement in placements for name in placement.names)
    for key in keys:
        if not any(pattern_matches(key, name) for name in names):
            raise NoSiteMatched(
                _no_match(f"{field} key '{key}' matched no adapted module", key, names)
            )


def _targeted(spec: Spec, site: Site, name: str) -> bool:
    if spec.targets == ALL_LINEAR:
        return site.kind == "dense" and site.path[-1] not in HEADS
    return matches(spec.targets, name)


def _excluded(spec: Spec, name: str) -> bool:
    saved = any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in spec.modules_to_save)
    return saved or (bool(spec.exclude) and matches(spec.exclude, name))


def _served(spec: Spec, site: Site, name: str) -> bool:
    if not _targeted(spec, site, name) or _excluded(spec, name):
        return False
    return spec.layers_to_transform is None or layer_number(name) in spec.layers_to_transform


def _check_names(spec: Spec, sites: Sequence[Site]) -> None:
    names = tuple(name for site in sites for name in site.names)
    for field, value in (("target", spec.targets), ("exclude", spec.exclude)):
        if value == ALL_LINEAR:
            continue
        for one in (value,) if isinstance(value, str) else value:
            rule = one if isinstance(value, str) else (one,)
            if not any(matches(rule, name) for name in names):
                raise NoSiteMatched(_no_match(f"{field} '{one}' matched no module", one, names))
    if spec.layers_to_transform is not None:
        targeted = (n for site in sites for n in site.names if _targeted(spec, site, n))
        numbers = {n for name in targeted if (n := layer_number(name)) is not None}
        if wrong := [n for n in spec.layers_to_transform if n not in numbers]:
            known = f"{min(numbers)}..{max(numbers)}" if numbers else "none"
            raise NoSiteMatched(
                f"layers_to_transform has {wrong}, but the targeted modules' layers are {known}"
            )


def _no_match(what: str, wanted: str, names: Sequence[str]) -> str:
    short = without_numbers(tuple(names))
    ends = {name.rsplit(".", 1)[-1]: name for name in short}
    close = nearest(wanted, [*ends, *short])
    shown = list(dict.fromkeys(ends.get(name, name) for name in close)) or list(short)[:3]
    return f"{what}; nearest: {', '.join(shown)} (of {len(short)} kinds of module)"


def _why_nothing(spec: Spec, sites: Sequence[Site]) -> str:
    targeted = [n for site in sites for n in site.names if _targeted(spec, site, n)]
    if not targeted:
        return f"targets={spec.targets!r} matched none of the model's {len(sites)} modules"
    left = [name for name in targeted if not _excluded(spec, name)]
    if not left:
        fields = f"exclude={spec.exclude!r}, modules_to_save={spec.modules_to_save!r}"
        return (
            f"targets={spec.targets!r} matched {len(targeted)} modules, and {fields} took all away"
        )
    return f"layers_to_transform={spec.layers_to_transform!r} leaves none of {len(left)} modules"
