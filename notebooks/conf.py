"""Sphinx: ``python -m sphinx -W notebooks html`` builds the documentation, offline."""

import jaxgrad

project, author, version = "jaxgrad", "the jaxgrad authors", jaxgrad.__version__
project_copyright = "the jaxgrad authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.katex"]

html_theme = "alabaster"
html_theme_options = {
    "description": "JAX kernels whose backward rules are derived by hand",
    "page_width": "1100px",
}
myst_enable_extensions = ["amsmath", "dollarmath"]
nb_execution_mode = "off"  # the tests run the notebooks

add_module_names = False
autodoc_typehints = "none"  # the docstrings tell shapes, too
autodoc_member_order = "bysource"
napoleon_custom_sections = ["Source"]
