"""Settings of Sphinx. `make docs` builds the site in site/, without the network."""

import contextlib
import io
import os
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import images  # noqa: E402

import fmkernels  # noqa: E402
from fmkernels.focalmix import cli  # noqa: E402

project, version = "fmkernels", fmkernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["generated"]

nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|numpy|monai)\..*|Tensor|BoxMode|StandardMode")
]
autodoc_mock_imports = ["monai"]
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_use_rtype = False
add_module_names = False

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_title = f"fmkernels {version}"
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False
html_math_renderer = "mathml"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}

COMMANDS = ("phantom", "train", "compare", "detect", "evaluate", "check", "doctor", "warmup")


def generate(_: Sphinx) -> None:
    """Pictures, and what every command says of itself."""
    folder = DOCS / "generated"
    images.draw(folder)
    os.environ["COLUMNS"] = "90"
    for command in COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
        (folder / f"{command}.txt").write_text(said.getvalue(), encoding="utf-8")


def write_math(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """A formula as MathML, which browsers know: no script and no font to fetch."""
    translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("builder-inited", generate)
