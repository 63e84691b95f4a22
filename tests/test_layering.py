"""Layers of imports, the cost of importing, examples in docstrings, and expected files."""

import ast
import doctest
import graphlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fmkernels

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fmkernels"

# part of the package -> parts that it may import
ALLOWED = {
    "dtypes": set(),
    "cpu": {"cpu", "dtypes"},
    "kernels": {"kernels", "dtypes"},
    "ops": {"ops", "dtypes"},
    "functional": {"ops"},
    "nn": {"functional", "ops"},
    # cpu: where compiled loops are kept
    "doctor": {"cpu", "functional", "kernels"},
    "warmup": {"cpu", "functional"},
    "focalmix": {"doctor", "focalmix", "functional", "nn", "warmup"},
    "integrations": {"functional", "integrations", "nn", "ops"},
    "__init__": {"functional", "nn"},
    "__main__": {"focalmix"},
}

# room of focalmix -> other rooms that it imports
ROOMS = {
    "errors": set(),
    "files": {"errors"},
    "config": {"errors"},
    "distributed": {"errors"},
    "data": {"errors", "files"},
    "model": {"config", "data"},
    "evaluation": {"data", "errors", "files"},
    "roles": {"config", "data", "errors", "files"},
    "training": {
        "config",
        "data",
        "distributed",
        "errors",
        "evaluation",
        "files",
        "model",
        "roles",
    },
    "compare": {
        "config",
        "data",
        "distributed",
        "errors",
        "evaluation",
        "files",
        "roles",
        "training",
    },
    "detect": {"config", "data", "errors", "evaluation", "model", "training"},
    "evaluate": {"data", "errors", "evaluation"},
    "check": {"config", "data", "errors", "evaluation", "roles"},
    "cli": {
        "check",
        "compare",
        "config",
        "data",
        "detect",
        "distributed",
        "errors",
        "evaluate",
        "evaluation",
        "training",
    },
}


def imports(path: Path) -> set[str]:
    """Full names of everything that a file imports, including imports in functions."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                (*package[: len(package) - node.level + 1], *filter(None, [node.module]))
            )
            name = base if node.level else node.module
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def with_examples() -> list[Path]:
    return [
        path for path in modules() if re.search(r"^ *>>> ", path.read_text(encoding="utf-8"), re.M)
    ]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    used = {name.split(".")[1] for name in imports(path) if name.startswith("fmkernels.")}
    inside = {
        name for name in used if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()
    }
    assert inside <= ALLOWED[part], f"{path.name} imports {sorted(inside - ALLOWED[part])}"
    assert used - inside <= {*fmkernels.__all__, "__version__"}


def test_rooms_of_focalmix_import_one_another_as_listed():
    used = {room: set() for room in ROOMS}
    for path in (PACKAGE / "focalmix").rglob("*.py"):
        room = path.relative_to(PACKAGE / "focalmix").parts[0].removesuffix(".py")
        inside = (name.split(".")[2:3] for name in imports(path) if ".focalmix." in name)
        if room != "__init__":
            used[room] |= {name for names in inside for name in names} - {room}
    assert used == ROOMS


def test_imports_have_no_cycle():
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in modules()}
    graph = {
        name: {
            other
            for imported in imports(path)
            for other in (imported, imported.rpartition(".")[0])
            if other in files and other != name
        }
        for name, path in files.items()
    }
    graphlib.TopologicalSorter(graph).prepare()
    assert len(graph["fmkernels.focalmix.training.loop"]) > 10


def test_only_kernels_import_triton():
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in modules()
        if any("triton" in n.split(".") for n in imports(path))
    }
    assert users <= {"kernels"}


def test_only_integrations_import_monai():
    users = {
        path for path in modules() if any(name.split(".")[0] == "monai" for name in imports(path))
    }
    assert users == {PACKAGE / "integrations" / "monai.py"}


def test_nothing_outside_of_tests_and_benchmarks_uses_the_reference():
    assert not [
        path
        for path in modules()
        if any(n.split(".")[0] in ("reference", "tests") for n in imports(path))
    ]


def test_no_file_that_is_read_can_run_code():
    """No pickle but torch.load with weights_only=True, no eval, exec, numpy objects or YAML.

    Except for compiled loops, which are code: they lie where the package or the user keeps code.
    """
    for path in modules():
        assert not {name.split(".")[0] for name in imports(path)} & {
            "marshal",
            "shelve",
            "yaml",
            "dill",
            "joblib",
        }, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            if call == "pickle.loads" and path.name == "compiled.py":
                continue
            given = {option.arg: ast.unparse(option.value) for option in node.keywords}
            assert call not in (
                "eval",
                "exec",
                "compile",
                "pickle.load",
                "pickle.loads",
                "pickle.Unpickler",
            ), path
            assert call not in ("os.system", "__import__") and given.get("shell") != "True", path
            assert call != "torch.load" or given.get("weights_only") == "True", path
            assert given.get("allow_pickle") in (None, "False"), path


@pytest.mark.parametrize("forbidden", ["triton", "numba", "SimpleITK", "matplotlib", "scipy"])
def test_importing_the_package_imports_no_more_than_torch(forbidden):
    code = (
        "import sys, torch; before = set(sys.modules); import fmkernels, fmkernels.focalmix.cli; "
        f"sys.exit({forbidden!r} in set(sys.modules) - before)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", with_examples(), ids=lambda path: path.stem)
def test_examples_in_docstrings(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if path.stem == "monai":
        pytest.importorskip("monai")
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0 and results.attempted > 0


@pytest.mark.parametrize(
    "name",
    ["README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", "setup.py"],
)
def test_files_that_a_person_expects(name):
    assert (ROOT / name).stat().st_size > 100


def test_constraints_pin_names_and_versions_only():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]
    assert lines and all(
        line.count("==") == 1 and "/" not in line and " " not in line for line in lines
    )
