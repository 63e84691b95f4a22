"""The sdist builds the wheel, and the wheel works from an empty folder."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fmkernels
from fmkernels import functional
from tests.test_layering import imports

pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
pytest.importorskip("wheel", reason="building a wheel needs wheel")
pytest.importorskip("pip", reason="building a wheel needs pip")

ROOT = Path(__file__).parents[1]
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "reference",
    "tests",
    "fmkernels",
)


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """The output of a Python process that has nothing of this one's path."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "TRITON_INTERPRET")
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built in a copy: building leaves folders behind."""
    copy = tmp_path_factory.mktemp("copy")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    python("-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=copy)
    (built,) = (copy / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    options = (
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        "--quiet",
    )
    python(
        "-m", "pip", "wheel", *options, "--wheel-dir", str(folder / "dist"), str(source), cwd=folder
    )
    (built,) = (folder / "dist").iterdir()
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.name == f"fmkernels-{fmkernels.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    inside = {name for name in names if name.startswith("fmkernels/")}
    there = [path for path in (ROOT / "fmkernels").rglob("*") if path.suffix in (".py", ".typed")]
    assert inside == {path.relative_to(ROOT).as_posix() for path in there}
    assert {name.split("/")[0] for name in names} == {
        "fmkernels",
        f"fmkernels-{fmkernels.__version__}.dist-info",
    }
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_works_without_the_repository(wheel, tmp_path):
    target = tmp_path / "installed"
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet")
    python("-m", "pip", "install", *options, "--target", str(target), str(wheel), cwd=tmp_path)
    code = """
import importlib.metadata, sys
import fmkernels
from fmkernels.focalmix.cli import main
print(fmkernels.__file__)
assert importlib.metadata.version("fmkernels") == fmkernels.__version__
sys.exit(main(["doctor"]))
"""
    said = python(
        "-c",
        code,
        cwd=tmp_path,
        PYTHONPATH=str(target),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert said.splitlines()[0] == str(target / "fmkernels" / "__init__.py")
    assert f"all {len(functional.__all__)} self-tests passed" in said
    (script,) = (
        (target / "bin").iterdir() if (target / "bin").exists() else (target / "Scripts").iterdir()
    )
    assert script.stem == "fmkernels"


def test_what_is_required_is_what_the_code_imports(wheel):
    """The package itself, train and monai: nothing missing, nothing unused."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode()
    required: dict[str, set[str]] = {}
    for name, extra in re.findall(
        r"^Requires-Dist: ([\w-]+)(?:.*extra == [\"'](\w+)[\"'])?", lines, re.M
    ):
        required.setdefault(extra, set()).add(name)
    used: dict[str, set[str]] = {}
    for path in (ROOT / "fmkernels").rglob("*.py"):
        extra = {"focalmix": "train", "integrations": "monai"}.get(
            path.relative_to(ROOT).parts[1], ""
        )
        names = {
            name.removeprefix("torch.utils.") if "tensorboard" in name else name
            for name in imports(path)
        }
        used.setdefault(extra, set()).update(name.split(".")[0] for name in names)
    foreign = {
        extra: names - {"fmkernels", *sys.stdlib_module_names} for extra, names in used.items()
    }
    base = required[""]
    assert foreign[""] - {"triton", "llvmlite"} == base  # they come with torch and numba
    assert foreign["train"] - base == required["train"]
    assert foreign["monai"] - base == required["monai"] - {
        "torchvision"
    }  # which MONAI's detector asks for


def test_importing_the_package_is_quick(tmp_path):
    """CPU time beyond torch."""
    code = (
        "import time, torch; before = time.process_time(); import fmkernels; "
        "print(time.process_time() - before)"
    )
    assert (
        min(float(python("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))) for _ in range(3)) < 0.1
    )
