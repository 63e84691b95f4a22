"""The docs: all pages are listed, public names documented, quotes right, and the site builds."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fmkernels import functional, nn
from fmkernels.focalmix import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
QUOTE = re.compile(r"^```\{(?:include|literalinclude)\} (\S+)\n((?::.*\n)*)", re.M)


def quotes() -> Iterator[tuple[Path, Path, dict[str, str]]]:
    """Page, quoted file and options of every include."""
    for page, text in PAGES.items():
        for file, options in QUOTE.findall(text):
            yield (
                page,
                (page.parent / file).resolve(),
                dict(re.findall(r"^:([\w-]+): ?\"?(.*?)\"?$", options, re.M)),
            )


def test_the_contents_and_the_pages_agree():
    entries = re.findall(
        r"^```\{toctree\}\n(?::[^\n]*\n)*\n(.+?)```", PAGES[DOCS / "index.md"], re.M | re.S
    )
    patterns = [f"{entry}.md" for block in entries for entry in block.split()]
    listed = [page for pattern in patterns for page in DOCS.glob(pattern)]
    assert sorted([*listed, DOCS / "index.md"]) == list(PAGES)


def test_an_inverse_shares_the_page_of_its_operation():
    page = PAGES[DOCS / "operations" / "apply_symmetry.md"]
    assert ".. autofunction:: fmkernels.undo_symmetry\n" in page


@pytest.mark.parametrize("name", [name for name in functional.__all__ if name != "undo_symmetry"])
def test_every_operation_has_a_page_with_a_picture_and_its_reference(name):
    page = PAGES[DOCS / "operations" / f"{name}.md"]
    assert page.startswith(f"# {name}\n") and f".. autofunction:: fmkernels.{name}\n" in page
    assert f"(../generated/{name}.png)" in page
    assert f"def {name}(path: Path)" in (DOCS / "images.py").read_text(encoding="utf-8")


def test_every_other_public_name_is_documented():
    pages = "".join(PAGES.values())
    for name in nn.__all__:
        assert f".. autoclass:: fmkernels.nn.{name}\n" in pages
    source = (ROOT / "fmkernels" / "integrations" / "monai.py").read_text(encoding="utf-8")
    (names,) = re.findall(r"^__all__ = \[(.+?)\]", source, re.M | re.S)
    for name in re.findall(r'"(\w+)"', names):
        assert re.search(rf"\.\. auto(class|function):: {name}\b", pages), name


def test_every_command_is_documented(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = re.findall(r"^    (\w+) +\w", capsys.readouterr().out, re.M)
    assert len(commands) >= 6
    assert re.findall(r"generated/(\w+)\.txt", PAGES[DOCS / "cli.md"]) == commands


def test_every_example_is_shown():
    shown = {file for _, file, _ in quotes()}
    assert set((ROOT / "examples").glob("*.py")) <= shown


@pytest.mark.parametrize(
    ("page", "file", "options"), list(quotes()), ids=lambda value: getattr(value, "name", "")
)
def test_what_is_quoted_is_there(page, file, options):
    if file.parent == DOCS / "generated":
        return
    text = file.read_text(encoding="utf-8")
    for option in ("start-after", "start-at", "end-before", "end-at"):
        assert options.get(option, "") in text, (
            f"{page.name}: {file.name} lacks {options[option]!r}"
        )
    assert f"\ndef {options.get('pyobject', '')}" in f"\ndef \n{text}"


QUOTED = sorted({file for _, file, _ in quotes() if file.suffix == ".md"})


@pytest.mark.parametrize("path", [*PAGES, *QUOTED], ids=lambda path: path.name)
def test_no_line_is_a_comment_to_the_site(path):
    """A line of prose that begins with a percent sign would be left out."""
    assert not re.findall(r"^%.*", path.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: path.name)
def test_code_is_narrow_enough_for_a_page(path):
    text = path.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(.*?)\n(.*?)^```$", text, re.M | re.S):
        assert language[:1] == "{" or not [line for line in block.splitlines() if len(line) > 88]


def test_no_page_names_a_path_of_one_machine():
    sources = [*PAGES.values(), *(path.read_text(encoding="utf-8") for path in DOCS.glob("*.py"))]
    assert not [
        found
        for text in sources
        for found in re.findall(r"(?:^|[\s\"'`(=])(?:/\w+){2,}|file://\S*", text)
    ]


class Assets(HTMLParser):
    """What a page makes the browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon", "shortcut icon"):
            self.loaded.append(given["href"])
        if tag in ("script", "img", "iframe", "source", "video") and given.get("src"):
            self.loaded.append(given["src"])


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    for needed in ("sphinx", "furo", "myst_parser"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed; the extra fmkernels[docs] brings it")
    site = tmp_path / "site"
    options = (
        "--fail-on-warning",
        "--keep-going",
        "--quiet",
        "--doctree-dir",
        str(tmp_path / "doctrees"),
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(DOCS), str(site)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        built = (site / page.relative_to(DOCS)).with_suffix(".html")
        text = built.read_text(encoding="utf-8")
        assets = Assets()
        assets.feed(text)
        assert len(assets.loaded) > 3 and not [
            asset for asset in assets.loaded if re.match(r"\w+:|//", asset)
        ]
        for asset in assets.loaded:
            assert (built.parent / asset.partition("?")[0]).is_file(), asset
        assert "<math" in text or page.parent.name != "operations"
    for picture in (site / "_images").glob("*.png"):
        assert picture.stat().st_size > 5000, picture
