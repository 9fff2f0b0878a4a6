"""A set that a negative radius or side leaves empty: one error everywhere, with the figure."""

import pytest
import torch
from torch.func import grad, vmap

from hypergrad import projections

F64 = torch.float64
V = torch.tensor([0.5, -2.0, 1.5], dtype=F64)

OF_RADIUS = {
    "l1_ball": projections.l1_ball,
    "l1_sphere": projections.l1_sphere,
    "l2_ball": projections.l2_ball,
    "l2_sphere": projections.l2_sphere,
    "linf_ball": projections.linf_ball,
    "simplex": projections.simplex,
    "sparse_simplex": lambda v, radius: projections.sparse_simplex(v, 2, radius),
}
of_radius = pytest.mark.parametrize("project", OF_RADIUS.values(), ids=OF_RADIUS)
NEGATIVE = r"radius must not be negative; got -0\.25\."


@of_radius
@pytest.mark.parametrize("make", [float, lambda x: torch.tensor(x, dtype=F64), torch.tensor])
def test_a_negative_radius_is_an_error_with_the_figure(project, make):
    with pytest.raises(ValueError, match=NEGATIVE):
        project(V, make(-0.25))
    assert project(V, make(0.0)).abs().max() == 0
    assert project(V, make(0.25)).isfinite().all()


@of_radius
def test_a_negative_radius_is_seen_beneath_transforms(project):
    radii = torch.tensor([0.5, -0.25, 1.0], dtype=F64)
    with pytest.raises(ValueError, match=NEGATIVE):
        vmap(project, in_dims=(None, 0))(V, radii)
    with pytest.raises(ValueError, match=NEGATIVE):
        grad(lambda radius: project(V, radius).sum())(radii[1])
    with pytest.raises(ValueError, match=NEGATIVE):
        project(V, radii[1:2])


@of_radius
def test_a_radius_that_is_nan_gives_nan(project):
    assert project(V, torch.tensor(torch.nan, dtype=F64)).isnan().any()


def test_bounds_that_leave_a_box_empty_are_an_error_with_the_figure():
    for side in (-1.0, torch.tensor(-1.0), torch.tensor([1.0, -1.0, 2.0], dtype=F64)):
        with pytest.raises(ValueError, match=r"side must not be negative; got -1\."):
            projections.hypercube(V, side)
        with pytest.raises(ValueError, match=r"lower must not exceed upper; upper - lower is -1:"):
            projections.box({"a": V}, 0.0, side)
    assert projections.box(V, 0.5, 0.5).tolist() == [0.5] * 3
    with pytest.raises(ValueError, match=r"upper - lower is -2:"):
        vmap(lambda low: projections.box(V, low, 1.0))(torch.tensor([0.0, 3.0], dtype=F64))


@pytest.mark.parametrize("name", ["l2_ball", "linf_ball", "simplex"])
def test_compiled_it_is_nan_since_nothing_is_read(name, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = OF_RADIUS[name](V, torch.tensor(-0.25, dtype=F64))
    assert x.isnan().any()
