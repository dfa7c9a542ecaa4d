"""The arrows of the architecture, held against the imports that the files really have."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"jqlora": ROOT / "jqlora", "jqlora_kernels": ROOT / "kernels" / "jqlora_kernels"}

# From the ground up: a module imports from its own layer and those below it, never from above.
LAYERS = [
    {"types", "errors", "platforms", "processor"},
    {"tree", "products"},
    {"jqlora_kernels"},
    {"quant", "sites", "methods", "models"},
    {"graft"},
    {"attach"},
    {"merging", "compacting", "stacking"},
    {"io", "data", "optim", "generation", "tasks"},
    {"train"},
    {"config"},
    {"run", "compare"},
    {"cli"},
]
# What a room may use beyond the standard library and jqlora; None leaves it free.
THIRD_PARTY = {
    "jqlora_kernels": {"jax", "numpy", "jaxtyping", "jax_triton", "triton", "matplotlib"},
    "models": {"jax", "flax", "numpy"},
}
# Of all files one runs the other side of a comparison, and says why; it is loaded only for that.
TORCH_SIDE = PACKAGES["jqlora"] / "compare" / "torch_side.py"
FORBIDDEN_ELSEWHERE = {"torch", "peft", "bitsandbytes"}
# Rooms that a model must not know: a model is plain Linen.
MODELS_MUST_NOT_KNOW = {"quant", "sites", "methods", "jqlora_kernels"}


def python_files():
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            yield pytest.param(package, file, id=str(file.relative_to(ROOT)))


def imports(file: Path) -> list[str]:
    """Absolute names of everything that a file imports, imports inside functions included."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room(package: str, file: Path) -> str:
    if package == "jqlora_kernels":
        return package
    first = file.relative_to(PACKAGES["jqlora"]).parts[0]
    return first.removesuffix(".py")


def level(name: str) -> int:
    found = [i for i, layer in enumerate(LAYERS) if name in layer]
    assert found, f"{name} has no place in LAYERS"
    return found[0]


@pytest.mark.parametrize(("package", "file"), list(python_files()))
def test_imports_point_down(package, file):
    here = room(package, file)
    if here == "__init__":  # the public surface gathers from everywhere
        return
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "jqlora" and len(parts) > 1:
            target = parts[1]
        elif parts[0] == "jqlora_kernels":
            target = "jqlora_kernels"
        else:
            torch = parts[0] in FORBIDDEN_ELSEWHERE
            assert not torch or file == TORCH_SIDE, f"{file}: imports {name}"
            allowed = THIRD_PARTY.get(here)
            if allowed is not None and parts[0] not in __import__("sys").stdlib_module_names:
                assert parts[0] in allowed, f"{file}: {here} may not use {name}"
            continue
        assert level(target) <= level(here), f"{file}: {here} may not import {name}"
        assert not (here == "models" and target in MODELS_MUST_NOT_KNOW), (
            f"{file}: a model imports {name}"
        )


@pytest.mark.parametrize(("package", "file"), list(python_files()))
def test_the_side_with_torch_is_loaded_by_a_comparison_alone(package, file):
    inside = file.parent == TORCH_SIDE.parent
    tree = ast.parse(file.read_text())
    for node in tree.body if inside else ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            text = ast.unparse(node)
            assert TORCH_SIDE.stem not in text, f"{file}: {text}"


@pytest.mark.parametrize(("package", "file"), list(python_files()))
def test_only_attach_intercepts_and_only_kernels_use_pallas(package, file):
    text = file.read_text()
    if file != PACKAGES["jqlora"] / "attach.py":
        assert "intercept_methods" not in text
    if package != "jqlora_kernels":
        assert not any("pallas" in name for name in imports(file))


@pytest.mark.parametrize(("package", "file"), list(python_files()))
def test_no_private_imports_from_jax_or_flax(package, file):
    for name in imports(file):
        parts = name.split(".")
        if parts[0] in {"jax", "flax", "optax", "orbax"}:
            assert not any(part.startswith("_") for part in parts[1:]), f"{file}: {name}"


@pytest.mark.parametrize(("package", "file"), list(python_files()))
def test_files_stay_short(package, file):
    lines = len(file.read_text().splitlines())
    assert lines <= 350, f"{file} has {lines} lines: does it still hold one idea?"


def test_half_of_the_files_fit_on_a_few_screens():
    lengths = sorted(len(p.values[1].read_text().splitlines()) for p in python_files())
    assert lengths[len(lengths) // 2] <= 180


def test_the_bare_name_kernels_is_never_a_package():
    # transformers probes for a package of this name and breaks on ours
    assert not (ROOT / "kernels" / "__init__.py").exists()
