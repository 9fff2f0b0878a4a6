"""Configuration of the documentation: `make docs` builds it and runs its snippets."""

import os
import sys
from pathlib import Path

from sphinx.pycode.parser import VariableCommentPicker

import hypergrad
from hypergrad import _public

# Sphinx reads an object's source, and looks for it in the module that the object names.
for public in [f"hypergrad.{name}" for name in hypergrad.__all__] + list(_public.WRITTEN_IN):
    home, _, name = public.rpartition(".")
    thing = getattr(sys.modules[home], name)  # some are imported when they are asked for
    thing.__module__ = _public.WRITTEN_IN[public]

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from inventory import PYTHON, TORCH, write_inventory  # noqa: E402

project = "hypergrad"
author = "The hypergrad authors"
copyright = f"2026, {author}"
version = release = hypergrad.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "matplotlib.sphinxext.plot_directive",  # the picture of the idea
    "sphinx.ext.intersphinx",
    "sphinx-mathjax-offline",  # the formulae without the network
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.bibtex",
    "sphinx_copybutton",
    "sphinx_design",
    "links",  # docs/links.py: no link inside the site leads nowhere
]
exclude_patterns = ["_build"]
nitpicky = True
# In prose, as types of fields.
PROSE = ("Tensor", "pytree", "Solver", "callable", "optional", '{"warn"', '"raise"', '"ignore"}')
OF_A_SYSTEM = ("Layout", "Tree", "NewtonStep", "Probe", "State", "Watch", "Memory")
nitpick_ignore = [("py:class", name) for name in (*PROSE, *OF_A_SYSTEM)]
# Where signatures name a class of torch by the module that defines it.
nitpick_ignore += [
    ("py:class", f"torch.{name}")
    for name in (
        "_C.Generator",
        "nn.modules.module.Module",
        "nn.parameter.Parameter",
        "optim.optimizer.Optimizer",
    )
]
# A default that is made anew ends what Sphinx can parse of a signature.
nitpick_ignore += [("py:class", "dict[str")]
nitpick_ignore_regex = [("py:class", r"hypergrad\.(.+\.)?_.*")]  # private names in signatures
default_role = "literal"

html_theme = "furo"
html_title = f"hypergrad {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = False  # tables of names alone: a page has a family
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# One signature for each function: overloads are for type checkers.
VariableCommentPicker.is_overload = lambda self, decorators: False
napoleon_google_docstring = False
viewcode_line_numbers = True
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "alpha"
bibtex_reference_style = "author_year"
# The types in docstrings are for reading ("pytree of tensors"); those in signatures are links.
napoleon_use_param = False
napoleon_use_rtype = False

plot_formats = [("svg", 90)]
plot_html_show_formats = plot_html_show_source_link = False
plot_rcparams = {"svg.fonttype": "path"}

# Where the links lead is read from lists kept here, not from the network.
INVENTORIES = HERE / "_build" / "inventories"
write_inventory(INVENTORIES / "python.inv", "Python", PYTHON)
write_inventory(INVENTORIES / "torch.inv", "PyTorch", TORCH)
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", str(INVENTORIES / "python.inv")),
    "torch": ("https://docs.pytorch.org/docs/stable", str(INVENTORIES / "torch.inv")),
}

extensions += ["sphinx_gallery.gen_gallery", "gallery_runs"]
# Every script of both runs here, two at a time; an error or a warning in one is fatal.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sphinx_gallery_conf = {
    "examples_dirs": ["../examples/howto", "../examples/gallery"],
    "gallery_dirs": ["howto", "gallery"],
    "filename_pattern": r"(?<!hugging_face)\.py$",  # which `make test-models` runs
    "within_subsection_order": "gallery_runs.order",
    "reset_modules": ("matplotlib", "gallery_runs.reset"),
    "reset_modules_order": "both",
    "abort_on_example_error": True,
    "parallel": 2,
    "capture_repr": (),  # what is printed, and no more
    "doc_module": ("hypergrad",),
    "reference_url": {"hypergrad": None},
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 600,  # a page says what a script does, not how busy the machine was
}

# The snippets of a page run in order and share their names; a warning fails them.
# What autodoc brings in is left out: pytest runs the examples in the docstrings.
doctest_test_doctest_blocks = ""
doctest_global_setup = """
import warnings
warnings.simplefilter("error", UserWarning)
import importlib.util
found = lambda name: importlib.util.find_spec(name) is not None
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_default_dtype(torch.float32)
"""
