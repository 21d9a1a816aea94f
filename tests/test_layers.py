"""The layers hold: who may import whom, and what `pyproject.toml` must list.

The source is parsed, not imported, so a forbidden import inside a function is found as well.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LAYERS = ("ops", "passes", "solver", "tools")
TOOLS_USERS = ("intaglio.__main__",)

FORBIDDEN = {
    "ops": ("intaglio.solver", "intaglio.passes", "intaglio.tools"),
    "passes": ("intaglio.tools",),
    "solver": ("intaglio.ops", "intaglio.passes", "intaglio.tools", "onnx", "onnx_graphsurgeon", "onnxruntime"),
}


def sources() -> dict[str, Path]:
    """Module name → file, for every module of the package; `ops/emit.py` is `intaglio.ops.emit`."""
    paths = [*ROOT.glob("intaglio/*.py"), *(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))]
    return {module_name(path.relative_to(ROOT)): path for path in sorted(paths)}


def module_name(path: Path) -> str:
    """The module that a file is, by its path from the repository's root."""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == "intaglio" else ("intaglio", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, package: str) -> Iterator[str]:
    """Absolute names that a module of `package` imports; `from a import b` gives `a` and `a.b`, as `b` may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, package: str, forbidden: tuple[str, ...]) -> list[str]:
    """What a module of `package` imports from a `forbidden` module or from below one."""
    return [name for name in imported(source, package) if any(f"{name}.".startswith(f"{bad}.") for bad in forbidden)]


def package_of(module: str, path: Path) -> str:
    """The package that relative imports in `module` start from."""
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import intaglio.passes.load", ["intaglio.passes.load"]),
        ("from intaglio import passes", ["intaglio.passes"]),
        ("from .. import passes", ["intaglio.passes"]),
        ("from ..passes.errors import InputError", ["intaglio.passes.errors", "intaglio.passes.errors.InputError"]),
        ("def late():\n    import intaglio.passes as p", ["intaglio.passes"]),
        ("import intaglio.passes_of_time\nfrom .passes import anything\nimport passes", []),
    ],
)
def test_forbidden_imports_are_found_however_they_are_written(source: str, expected: list[str]) -> None:
    assert violations(source, "intaglio.ops", ("intaglio.passes",)) == expected


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_layer_imports_nothing_forbidden(layer: str) -> None:
    members = {name: path for name, path in sources().items() if f"{name}.".startswith(f"intaglio.{layer}.")}
    assert members, f"no module found in {layer}/"
    found = {name: violations(path.read_text(encoding="utf-8"), package_of(name, path), FORBIDDEN[layer]) for name, path in members.items()}
    assert {name: bad for name, bad in found.items() if bad} == {}


def test_only_the_main_module_imports_tools() -> None:
    outside = {name: path for name, path in sources().items() if not f"{name}.".startswith("intaglio.tools.")}
    users = [
        name for name, path in outside.items() if violations(path.read_text(encoding="utf-8"), package_of(name, path), ("intaglio.tools",))
    ]
    assert set(users) <= set(TOOLS_USERS)


def test_pyproject_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    existing = {package_of(name, path) for name, path in sources().items()}
    assert sorted(listed) == sorted(existing)


def test_every_package_has_an_init_file() -> None:
    missing = {str(path.parent) for path in sources().values() if not (path.parent / "__init__.py").exists()}
    assert missing == set()


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_is_linked_into_the_package(layer: str) -> None:
    assert (ROOT / "intaglio" / layer).readlink() == Path("..", layer)


def test_the_architecture_names_every_pass() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    unnamed = {path.name for path in (ROOT / "passes").glob("*.py") if not re.search(rf"(?<![a-z_]){re.escape(path.name)}", text)}
    assert unnamed == {"__init__.py"}
