"""The house stays in order: imports run one way, files stay small, README and CONTRIBUTING name what is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 400
PROGRAM = sorted(
    path
    for folder, pattern in (("kloss", "**/*"), ("bench", "*.py"), ("examples", "*.py"), ("csrc", "**/*"))
    for path in (ROOT / folder).glob(pattern)
    if path.suffix in (".py", ".cpp", ".h", ".inl", ".cu", ".cuh", ".j2", ".css")
)
# A module may import what stands left of it, and its own package.
FLOORS = (
    *("errors", "files", "kernels", "machine", "processes", "models", "optim", "adapters", "config"),
    *("cl", "report", "presets", "pace", "estimate", "console", "run"),
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in PROGRAM if path.suffix == ".py"}


def imports_of(module: str) -> set[str]:
    """The project's modules that a module imports, at its top or within its functions."""
    path, found = MODULES[module], set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names = [f"{name}.{alias.name}" for alias in node.names]
            found |= {full if full in MODULES else name for full in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in MODULES and name != module}


def floor(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("kloss.")])
def test_imports_run_one_way(module):
    for other in imports_of(module):
        if floor(other) == floor(module):
            continue
        assert other.startswith("kloss.") and FLOORS.index(floor(other)) < FLOORS.index(floor(module)), f"{module} -> {other}"


def test_no_imports_run_in_a_circle():
    # A package's __init__ may be imported by way of a module in it; only circles of modules count.
    open_, done = [], set()

    def visit(module: str) -> None:
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        if module not in done:
            open_.append(module)
            for other in sorted(imports_of(module)):
                visit(other)
            done.add(open_.pop())

    for module in MODULES:
        visit(module)


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_readmes_tree_is_what_is_there():
    tree = re.search(r"```text\n(kloss/.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    folders, named = [], set()
    for line in tree[1].splitlines():
        names, _, job = line.strip().rpartition("  ")
        assert names and job, f"README says nothing of {line.strip()}"
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        for name in names.strip().split(", "):
            if name.endswith("/"):
                folders.append(name)
            else:
                named.add("".join(folders) + name)
    there = {str(path.relative_to(ROOT)) for path in PROGRAM if path.name != "__init__.py"}
    assert named == there, (named - there, there - named)


def test_contributings_walks_name_functions_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\d+\. `([\w/.]+):([\w.]+)`", text, re.MULTILINE)
    assert len(steps) >= 15
    for file, name in steps:
        tree, last = ast.parse((ROOT / "kloss" / file).read_text(encoding="utf-8")), None
        for part in name.split("."):
            body = tree.body if last is None else last.body
            last = next((node for node in body if getattr(node, "name", None) == part), None)
            assert last is not None, f"{file} has no {name}"
