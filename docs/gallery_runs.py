"""How the gallery is made: the order of its scripts, and what is set anew before each."""

import warnings

import torch

ORDER = [
    "data_cleaning",
    "penalty_for_each_feature",
    "class_imbalance",
    "few_shot_sinusoids",
    "equilibrium_layer",
    "svm_layer",
    "scikit_learn_inside",
    "dataset_distillation",
    "learnt_loss",
    "three_levels",
    "choice_of_operations",
    "mixing_texts",
]


def order(filename):
    """The place of a script; one that is not in the list is an error."""
    return ORDER.index(filename.removesuffix(".py"))


def reset(gallery_conf, fname, when):
    """Give every script what a fresh process has; warnings of its own are errors."""
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.set_num_threads(1)
    if when == "before":
        warnings.simplefilter("error")
        # torch 2.13 itself, at the first use of forward mode.
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated", DeprecationWarning)
    else:
        warnings.resetwarnings()
