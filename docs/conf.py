from __future__ import annotations

from ast_plugin.version import __version__

project = "ast_plugin"
author = "the ast_plugin authors"
project_copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
# Thousands of members of the reference would stand in the contents of every page, and take two fifths of the build.
toc_object_entries = False
html_title = f"ast_plugin {version}"

# Single backticks in docstrings mark code, as in Markdown.
default_role = "code"
# Two hosts have an `ASTCallback`, and signatures have its bare name: "more than one target found".
suppress_warnings = ["ref.python"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Types stand in signatures alone: "Returns: The controller: sub-nets, ..." is text, not a type and a description.
napoleon_custom_sections = ["Returns", "Yields"]
