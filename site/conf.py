"""How the executed notebooks become pages (Sphinx, myst-nb).

`normflow-vi report` copies this file beside them.
"""

project = "Variational inference with normalizing flows"
author = "The normflow_vi authors"
extensions = ["myst_nb"]
html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["static"]
html_css_files = ["report.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
}

nb_execution_mode = "off"  # the notebooks were executed, and checked, before
nb_merge_streams = True
# Markdown that a cell displays is read like the prose: tables, equations
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "misc.highlighting_failure"]

# Equations without a network: MathJax 3.2.2 in one file (all TeX extensions inside, so that nothing
# is fetched later).
mathjax_path = "tex-svg-full.js"
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "global"}}
