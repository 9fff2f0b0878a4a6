"""Public objects say that they live where a user finds them."""

import doctest
import importlib
import inspect
import pickle
import traceback
import typing

import pytest

import hypergrad
from hypergrad import bilevel, estimators, inner_solvers, projections, prox, solvers
from hypergrad._public import WRITTEN_IN, written_in

MODULES = (hypergrad, bilevel, estimators, inner_solvers, projections, prox, solvers)
HOMES = {}
for module in MODULES:
    for name in module.__all__:
        thing = getattr(module, name)
        HOMES.setdefault(f"{module.__name__}.{name}", thing)
# A name of `hypergrad` itself lives there, and is no further one where else it can be imported.
PUBLIC = {
    full: thing
    for full, thing in HOMES.items()
    if full.count(".") == 1 or full.rpartition(".")[2] not in hypergrad.__all__
}


@pytest.mark.parametrize("full", PUBLIC)
def test_a_public_object_lives_where_it_is_imported_from(full):
    thing = PUBLIC[full]
    assert f"{thing.__module__}.{thing.__qualname__}" == full
    if inspect.isclass(thing) and type(thing) is type:
        assert repr(thing) == f"<class '{full}'>"


@pytest.mark.parametrize("full", HOMES)
def test_it_can_be_pickled(full):
    assert pickle.loads(pickle.dumps(HOMES[full])) is HOMES[full]


@pytest.mark.parametrize("full", HOMES)
def test_its_types_can_be_looked_up(full):
    typing.get_type_hints(HOMES[full])


@pytest.mark.parametrize(
    "value",
    [
        hypergrad.CG(rtol=1e-3),
        hypergrad.Status.SINGULAR,
        inner_solvers.LBFGS(maxiter=3),
        hypergrad.SOBA(),
        hypergrad.Minimum(print),
    ],
    ids=repr,
)
def test_values_can_be_pickled(value):
    assert pickle.loads(pickle.dumps(value)) == value


def test_a_traceback_names_the_public_class():
    error = hypergrad.NotConverged("no")
    assert traceback.format_exception_only(error) == [
        "hypergrad.NotConverged: no See docs/errors.md#notconverged.\n"
    ]


@pytest.mark.parametrize("full", WRITTEN_IN)
def test_its_example_is_run_in_the_file_that_it_is_written_in(full):
    thing = HOMES[full]
    assert written_in(thing) == WRITTEN_IN[full]
    if not doctest.DocTestParser().get_examples(thing.__doc__ or ""):
        pytest.skip("it has none")  # those that must have one: test_documentation
    written = importlib.import_module(WRITTEN_IN[full])
    tests = doctest.DocTestFinder(exclude_empty=True).find(written)
    assert f"{WRITTEN_IN[full]}.{thing.__qualname__}" in [test.name for test in tests]
    home = importlib.import_module(full.rpartition(".")[0])
    assert full not in [test.name for test in doctest.DocTestFinder().find(home)]


def test_the_source_of_a_function_can_be_read():
    assert inspect.getsource(hypergrad.implicit_grad).startswith("@")
    assert "def step" in inspect.getsource(hypergrad.Bilevel.step)
