"""Imports point one way, and the client stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rayvaec"

ORDER = (
    "option_names",
    "errors",
    "util",
    "cluster",
    "kernels",
    "model",
    "protocol",
    "data",
    "datasets",
    "training",
    "inference",
    "client",
    "serving",
    "demo",
    "commands",
    "cli",
    "__main__",
)
"""Every part of the package; a part may import itself and what stands before it."""

BARE = {
    "kernels": {"torch", "numpy", "numba", "llvmlite"},  # numba brings llvmlite
    "model": {"torch", "numpy", "numba", "safetensors"},
}
"""What kernels and model may import from outside, to be checked on a bare GPU machine."""


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """What a module imports, for types alone as well."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    part = part_of(path)
    assert part in ORDER, f"{part} has no place in the order of imports"
    for name in imported_modules(path):
        words = name.split(".")
        if words[0] == "rayvaec" and len(words) > 1 and words[1] in ORDER:
            assert ORDER.index(words[1]) <= ORDER.index(part), f"{path} imports {name}"


@pytest.mark.parametrize("part", BARE)
def test_kernels_and_model_need_few_packages(part):
    allowed = BARE[part] | set(sys.stdlib_module_names) | {"rayvaec"}
    for path in (PACKAGE / part).rglob("*.py"):
        outside = {name.split(".")[0] for name in imported_modules(path)} - allowed
        assert not outside, f"{path} imports {outside}"


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_the_client_imports_neither_torch_nor_ray():
    assert not modules_after("import rayvaec.client") & {"torch", "ray", "numba"}


def test_help_imports_nothing_heavy():
    heavy = {"torch", "ray", "numba", "anndata", "pandas", "zarr", "numpy"}
    assert not modules_after("import rayvaec.cli; rayvaec.cli.build_parser()") & heavy


def test_what_the_package_offers_is_seen_before_it_is_loaded():
    code = (
        "import rayvaec, sys; assert dir(rayvaec) == sorted(rayvaec.__all__); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in done.stdout.split()} & {"torch", "ray", "numba"}
    import rayvaec

    assert all(hasattr(rayvaec, name) for name in rayvaec.__all__)


def test_there_are_no_cycles():
    modules = {
        str(p.relative_to(PACKAGE.parent).with_suffix("")).replace("/", "."): p for p in MODULES
    }
    graph = {name: imported_modules(path) & set(modules) for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle {' -> '.join((*trail, name))}"
        if name not in done:
            for other in graph[name] - {name}:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) == len(MODULES)
