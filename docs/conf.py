"""The documentation site: `make docs` builds it into build/site and fails on a broken link or a missing reference."""

import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training"), str(Path(__file__).parent)]

import modeling_charformer  # noqa: E402


project = "Charformer"
author = "The Charformer authors"
copyright = "2026, the Charformer authors"
version = release = modeling_charformer.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "site_extension",
]
exclude_patterns = ["_static"]
suppress_warnings = ["config.cache"]

# Links to headings are checked too: `evidence.md#little-text`.
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "attrs_inline"]
nitpicky = True
# Other projects' classes, for which no inventory is downloaded, and what Python and Transformers leave unnamed.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(torch|transformers|numpy|np|datasets|matplotlib|pathlib|collections|huggingface_hub|tokenizers|typing|nn|plt)\b.*",
    ),
    (
        "py:.*",
        r"(os\.PathLike|charformer_training\.\w+\.Model|Tensor|Path|Any|Callable|Sequence|Iterable|Module|optional|PreTrained\w+|Trainer\w*|Figure|CommitInfo)",
    ),
]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "literal"  # single backquotes in docstrings, as in Markdown
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = "Charformer"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_context = {"default_mode": "auto"}
html_math_renderer = "mathml"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True
