"""Euclidean projections onto convex sets: ``argmin over x in the set of ||x - v||``.

In a lambda, or by themselves where their further arguments are the hyperparameters, they are the
`project` of `hypergrad.ProjectedGradient`. First and second derivatives are right wherever they
exist, by the point and by what describes the set. At a kink a bound counts as active.

The arrays that describe a set follow `v` one by one. A set that they leave empty, as a negative
radius does, is an error that names one of them. Where the host would have to wait for an
accelerator to see it, and with dependent rows in `affine_set`, it gives NaN. Numbers and tensors
of integers are projected as tensors of floating point. `l1_sphere`, `l2_sphere` and
`sparse_simplex` are not convex, and `kl_transport` and `kl_birkhoff` project by the divergence of
Kullback and Leibler.
"""

from __future__ import annotations

from ._bounds import box, hypercube, linf_ball, non_negative
from ._box_section import box_section
from ._linear import affine_set, halfspace, hyperplane
from ._norms import l2_ball, l2_sphere, second_order_cone
from ._polyhedron import polyhedron
from ._simplex import l1_ball, l1_sphere, simplex, sparse_simplex
from ._transport import birkhoff, kl_birkhoff, kl_transport, transport

__all__ = [
    "affine_set",
    "birkhoff",
    "box",
    "box_section",
    "halfspace",
    "hypercube",
    "hyperplane",
    "kl_birkhoff",
    "kl_transport",
    "l1_ball",
    "l1_sphere",
    "l2_ball",
    "l2_sphere",
    "linf_ball",
    "non_negative",
    "polyhedron",
    "second_order_cone",
    "simplex",
    "sparse_simplex",
    "transport",
]
