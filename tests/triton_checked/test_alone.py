"""The folder needs nothing of this repository, so that other projects can copy it."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
NEEDED = {"numpy", "pytest", "torch", "triton"}


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.name)
def test_imports(path):
    """The folder itself, the standard library and a few packages."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else node.names
            roots = {getattr(name, "name", name).split(".")[0] for name in names}
            assert roots <= NEEDED | sys.stdlib_module_names


def test_a_copy_runs_under_another_name(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "kernel_tests", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "run.py").write_text("""
import kernel_tests

kernel_tests.enable_interpreter()
import torch
from kernel_tests.interpreter import KernelFault, checked
from kernel_tests.plan import run_plan
from kernel_tests.planted import masked

x = torch.zeros(16)
with checked(x=x) as report:
    masked[(1,)](x, x, 16, BLOCK=16)
assert report["x"].read == report["x"].written == 64
report = run_plan("kernel_tests.planted_sizes", targets=("sm_90",), compiled=False)
assert len(report.variants) == 6
""")
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")
    }
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
