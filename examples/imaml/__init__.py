"""Implicit MAML (Rajeswaran et al. 2019) on sinusoid regression and on Omniglot."""
