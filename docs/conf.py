"""The site. From the root of a checkout, with `pip install -c constraints.txt -e ".[docs]"`:

    sphinx-build -W --keep-going -c docs . build/site

The source folder is the root, so that a link from page to page is the same link in a checkout and on the site. Any
warning fails the build: a link or anchor that leads nowhere, a page in no menu, a public name without an entry on the
page of the API or without a docstring.
"""

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import fact_peft

project = "fact_peft"
version = release = fact_peft.__version__
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "benchmarks/README.md",
    "benchmarks/**/README.md",
    "benchmarks/**/MEASURED.md",
    "examples/**/README.md",
    "examples/notebooks/*.ipynb",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = [".*", "build", "dist", "outputs"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are executed by tests/test_notebooks.py, and committed with their outputs
nb_merge_streams = True
autoclass_content = "both"  # of the class and of its __init__
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
add_module_names = False
default_role = "py:obj"
nitpicky = True
# Names of other packages have no page here; ours must have one.
nitpick_ignore_regex = [(r"py:.*", r"(?!fact_peft).*")]

html_theme = "furo"
html_title = "fact_peft"
html_extra_path = ["root"]
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"


def check_public_names(app: Sphinx, environment: BuildEnvironment) -> None:
    """Warn of every name of ``fact_peft.__all__`` that no page documents."""
    documented = environment.domaindata["py"]["objects"]
    for name in fact_peft.__all__:
        if f"fact_peft.{name}" not in documented:
            logging.getLogger(__name__).warning(f"fact_peft.{name} is public and has no entry in docs/api.md.")


def check_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Warn of an entry without a docstring."""
    if not any(lines) and what != "attribute":
        logging.getLogger(__name__).warning(f"{name} is public and has no docstring.")


def leave_out_of_menu(app: Sphinx, doctree: object) -> None:
    """Keep the pages of everything measured out of the sidebar; the page of each benchmark links to its own."""
    if app.env.docname.endswith("MEASURED"):
        app.env.metadata[app.env.docname]["orphan"] = True


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", leave_out_of_menu)
    app.connect("env-check-consistency", check_public_names)
    app.connect("autodoc-process-docstring", check_docstring)
