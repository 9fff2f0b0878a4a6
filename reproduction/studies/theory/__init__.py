"""The table of Rajeswaran et al. 2019, measured on quadratics."""
