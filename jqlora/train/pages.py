"""HTML pages that stand alone: templates with one style, and pictures written into them."""

import base64
from pathlib import Path
from typing import Any

import jinja2


def render(package: str, name: str, **values: Any) -> str:
    """The template ``name`` in ``package`` with ``values``; it may include ``style.css``."""
    loaders = [jinja2.PackageLoader(where, ".") for where in (package, "jqlora.train")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)


def embedded(images: dict[str, Path]) -> dict[str, str]:
    """PNG files as base64, to be written into the page."""
    return {n: base64.b64encode(path.read_bytes()).decode() for n, path in images.items()}
