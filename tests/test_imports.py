"""The islands meet in the contract alone (docs/architecture.md): checked on every import statement."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"coordinator", "vcpu", "devhost", "blockd"}
ISLANDS = ("vcpu", "devhost", "blockd")
CONTRACT = "coordinator.contract"


def imports(file: Path) -> Iterator[str]:
    """Dotted names that a file imports from the project."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, package
    return found


@pytest.mark.parametrize("island", ISLANDS)
def test_island_imports_only_itself_and_the_contract(island: str) -> None:
    for file in files(island):
        for name in imports(file):
            allowed = name.split(".")[0] == island or f"{name}.".startswith(f"{CONTRACT}.")
            assert allowed, f"{file.relative_to(ROOT)} imports {name}"


def test_contract_imports_nothing_else_of_the_project() -> None:
    for file in files("coordinator/contract"):
        for name in imports(file):
            assert f"{name}.".startswith(f"{CONTRACT}."), f"{file.relative_to(ROOT)} imports {name}"


def test_nothing_shipped_imports_the_tests() -> None:
    for package in PACKAGES:
        for file in files(package):
            tree = ast.parse(file.read_text())
            modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
            assert not any(m.split(".")[0] == "tests" for m in modules), file
