"""How the gallery is made: the order of its scripts, what is set anew, what must come out."""

import logging
import re
import warnings
from pathlib import Path

import torch

#: The scripts in their order, each with what it prints, `#` for a figure, and the least and most
#: that the figures may be: wide enough for another rounding, too narrow for another claim.
FIGURES = {
    "data_cleaning": [(r"learnt weight below 1/2 +# +# +#", 0.85, 1.0)],
    "penalty_for_each_feature": [
        (r"one penalty: .* test error #,", 4.4, 5.2),
        (r"a hundred: .* test error #,", 2.6, 3.8),
    ],
    "class_imbalance": [
        (r"no weights: accuracy over classes #,", 0.8, 0.88),
        (r"learnt weights: accuracy over classes #,", 0.89, 1.0),
    ],
    "few_shot_sinusoids": [
        (r"before adaptation +#", 2.5, 4.0),
        (r"adapted, the hypergradient +#", 0.0, 0.07),
        (r"adapted, adaptation constant +#", 0.02, 0.15),
    ],
    "equilibrium_layer": [
        (r"100 applications: # apart", 0.0, 1e-3),
        (r"equilibrium: test accuracy #", 0.93, 1.0),
    ],
    "svm_layer": [
        (r"best of the grid: .* accuracy #", 0.7, 0.82),
        (r"learnt: .* accuracy #", 0.84, 0.9),
    ],
    "scikit_learn_inside": [
        (r"at their best scale #", 0.8, 0.95),
        (r"learnt waves #", 0.98, 1.0),
    ],
    "dataset_distillation": [
        (r"ten mean pictures +#", 0.8, 0.92),
        (r"ten learnt pictures +#", 0.94, 1.0),
    ],
    "learnt_loss": [
        (r"learnt loss: error #", 0.0, 0.05),
        (r"absolute values: error #", 0.06, 0.1),
    ],
    "three_levels": [
        (r"one penalty #", 5.0, 6.0),
        (r"three levels #", 3.4, 3.7),
    ],
    "choice_of_operations": [
        (r"search: sin 3x, \|x\|, zero, sign; test error #", 0.08, 0.11),
    ],
    "mixing_texts": [
        (r"shares: \S+, \S+, #, #, #, #", 0.0, 0.05),
        (r"held-out loss: equal #,", 2.65, 2.8),
        (r"learnt #", 2.5, 2.65),
    ],
    "weights_of_texts": [
        (r"of the 50 most harmful lines # are shuffled", 34, 50),
        (r"test loss, equal: #", 2.77, 2.83),
        (r"test loss, learnt: #", 2.73, 2.79),
    ],
}
#: The same of the pages that answer "how do I".
HOWTO_FIGURES = {
    "weight_decay": [
        (r"test loss with it #, without", 0.2, 0.285),
        (r"without decay #", 0.295, 0.4),
    ],
    "noisy_labels": [
        (r"all labels #, checked", 0.5, 0.75),
        (r"checked #, learnt", 0.78, 0.86),
        (r"learnt weights #", 0.865, 1.0),
    ],
    "few_shot": [
        (r"rate 0.1: residual #, success True", 0.0, 1e-3),
        (r"rate 0.3: .*, success False", 0.0, 0.0),
        (r"strength 0.5: success #%", 80, 100),
        (r"strength 3.0: success 100%, unseen loss #", 0.2, 0.6),
    ],
    "influence": [(r"# of the 20 most harmful", 13, 20)],
    "own_solver": [
        (r"by the log of the scale -#", 0.0124, 0.0128),
        (r"the central difference: -#", 0.0124, 0.0128),
    ],
    "several_processes": [(r"at the start #,", 1.5, 1.8), (r"at the end #", 0.9, 1.0)],
    "scikit_learn": [(r"at the end: logistic #, SVC #", 0.28, 0.37)],
    "gaussian_process": [(r"at the start #,", 0.5, 0.7), (r"at the end #", 0.05, 0.12)],
    "in_lightning": [
        (r"learnt decay #, test loss", 0.001, 0.01),
        (r"learnt decay .*, test loss #", 0.2, 0.275),
        (r"without decay: test loss #", 0.28, 0.4),
    ],
    "in_skorch": [
        (r"decay learnt: test loss #,", 0.2, 0.275),
        (r"decay none: test loss #,", 0.3, 0.45),
    ],
}
#: Run by `make test-models`: the build has no transformers.
HOWTO_ELSEWHERE = ["hugging_face"]
GALLERIES = {"gallery": FIGURES, "howto": HOWTO_FIGURES}
ORDER = [script for figures in GALLERIES.values() for script in figures] + HOWTO_ELSEWHERE

_filters = list(warnings.filters)


def order(filename):
    """The place of a script; one that is not in the list is an error."""
    return ORDER.index(filename.removesuffix(".py"))


def reset(gallery_conf, fname, when):
    """Give every script what a fresh process has; warnings of its own are errors."""
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.set_num_threads(1)
    if when == "before":
        _filters[:] = warnings.filters
        warnings.simplefilter("error")
        # Where the machine is busy, whatever the amount of data.
        warnings.filterwarnings("ignore", "Creating legend with loc=.best. can be slow")
        # What Lightning says of torch, of the machine, and of itself.
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"pytorch_lightning\.|typing_extensions")
        # torch 2.13 itself, at the first use of forward mode.
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated", DeprecationWarning)
    else:
        warnings.filters[:] = _filters


def misses(script, page):
    """What the page of a script should say and does not."""
    found = []
    figures = HOWTO_FIGURES.get(script) or FIGURES[script]
    for pattern, low, high in figures:
        said = re.search(pattern.replace("#", r"(\d[\d.e-]*|nan)"), page)
        if said is None:
            found.append(f"{script}: nothing printed matches {pattern!r}")
        elif not all(low <= float(figure) <= high for figure in said.groups()):
            found.append(f"{script}: {said[0]!r} is not within {low} and {high}")
    return found


def check_figures(app):
    root = Path(app.srcdir)
    pages = [(s, root / home / f"{s}.rst") for home, each in GALLERIES.items() for s in each]
    wrong = [miss for script, page in pages for miss in misses(script, page.read_text())]
    if wrong:
        raise ValueError("The gallery does not show what it claims:\n" + "\n".join(wrong))


def setup(app):
    app.connect("builder-inited", check_figures, priority=900)  # after the scripts have run
    return {"parallel_read_safe": True}
