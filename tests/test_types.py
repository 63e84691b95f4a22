"""The type hints hold, in the package and for those who use it as the examples do."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import fmkernels

ROOT = Path(__file__).parents[1]


def test_the_type_checker_finds_nothing():
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed; the extra fmkernels[dev] brings it")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_says_that_it_is_typed():
    assert (Path(fmkernels.__file__).parent / "py.typed").is_file()
