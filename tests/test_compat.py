"""The versions that `make compat` tries are the ends of the ranges that setup.py states."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {line.split("==")[0].lower(): line.split("==")[1] for line in lines if "==" in line}


def bounds() -> dict[str, str]:
    """Of all that the library imports: what installs without extras, with [train], and Triton."""
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    needed = re.findall(r"(?:install_requires=|\"train\": )\[(.+?)\]", source, re.S)
    triton = re.findall(r"triton>=[\d.]+", source)
    assert len(needed) == 2 and len(triton) == 1
    return {
        name.lower(): bound
        for name, bound in re.findall(r"([\w-]+)>=([\d.]+)", "".join([*needed, *triton]))
    }


def test_the_oldest_versions_are_the_lower_bounds():
    oldest = pins("constraints-oldest.txt")
    assert oldest.keys() == bounds().keys()
    for name, bound in bounds().items():
        assert f"{oldest[name]}.".startswith(f"{bound}."), name


def test_the_newest_versions_are_within_the_ranges():
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    for name, bound in bounds().items():
        assert [int(part) for part in newest[name].split(".")] >= [
            int(part) for part in bound.split(".")
        ], name
        assert newest[name] != oldest[name], name
