"""The pieces of a graph: few that differ, and together the graph."""

import pytest
import torch

from hypergrad._compiled.pieces import Pieces, graph_of_piece, is_alone, uniform
from hypergrad._compiled.run import runner
from tests.compiled_programs import graph_of, graph_of_a_hypergradient

aten = torch.ops.aten


def unrolled(steps):
    """Gradient steps, between a start and an end of other operations."""

    def function(A, x, c):
        x, velocity = torch.cumsum(x, 0), torch.zeros_like(x)
        for _ in range(steps):
            slope = A.T @ torch.tanh(A @ x) + torch.sin(x) * torch.cos(c) + torch.exp(-x.abs())
            velocity = 0.9 * velocity - slope / (1 + slope.square().sum().sqrt())
            x = torch.where(velocity > x, x + 0.1 * velocity, x.clamp(-2, 2) + velocity)
        return [x.sort().values, velocity.flip(0)]

    return function


def inputs_of_the_loop(seed=0):
    torch.manual_seed(seed)
    A = torch.randn(7, 5, dtype=torch.float64)
    return A, torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)


def assembled(graph, pieces, inputs):
    def call_of(piece, given):
        run = runner(graph_of_piece(piece, graph.constants), {})
        return lambda values: run(*values)

    return pieces.assembled(inputs, call_of)


def pieces_of(graph, **choices):
    return Pieces(graph.graph, graph.forms, graph.constants, **choices)


def test_steps_of_a_loop_are_one_piece_whatever_their_number():
    share = []
    for steps in (20, 40):
        pieces = pieces_of(graph_of(unrolled(steps), *inputs_of_the_loop()))
        sizes = {piece.key: len(piece.nodes) for piece in pieces.order}
        share.append(sum(sizes.values()) / sum(len(piece.nodes) for piece in pieces.order))
    assert share[0] < 0.5
    assert share[1] < 0.3


def test_a_few_short_steps_are_not_worth_a_piece():
    pieces = pieces_of(graph_of(unrolled(3), *inputs_of_the_loop()))
    assert len(pieces.order) == 1


def test_pieces_in_a_row_compute_what_the_graph_does():
    graph = graph_of(unrolled(20), *inputs_of_the_loop())
    run = assembled(graph, pieces_of(graph), inputs_of_the_loop())
    new = inputs_of_the_loop(seed=1)
    for ours, theirs in zip(run(*new), unrolled(20)(*new), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_pieces_of_a_hypergradient_compute_what_its_graph_does():
    graph, inputs = graph_of_a_hypergradient()
    pieces = pieces_of(graph, apart=frozenset({aten.dot.default, aten.where.self}))
    assert len(pieces.order) > 20
    whole = runner(graph.graph, graph.constants)
    _, new = graph_of_a_hypergradient(seed=1)
    for ours, theirs in zip(assembled(graph, pieces, inputs)(*new), whole(*new), strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_the_same_operations_on_other_tensors_are_another_piece():
    def function(x, y):
        for _ in range(40):  # what is read and what is kept changes places
            a = torch.sin(x) * y + torch.exp(-x) - torch.cos(y) * torch.tanh(x) + x.abs().sqrt()
            b = torch.sin(y) * x + torch.exp(-x) - torch.cos(x) * torch.tanh(y) + x.abs().sqrt()
            x, y = (a / 3).clamp(-1, 1), (b / 3).clamp(-1, 1)
        return [x, y]

    inputs = inputs_of_the_loop()[1:]
    graph = graph_of(function, *inputs)
    run = assembled(graph, pieces_of(graph), inputs)
    new = inputs_of_the_loop(seed=1)[1:]
    for ours, theirs in zip(run(*new), function(*new), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_a_graph_is_one_piece_on_request():
    graph = graph_of(unrolled(6), *inputs_of_the_loop())
    (piece,) = pieces_of(graph, whole=True).order
    calls = [n for n in graph.graph.nodes if n.op == "call_function" and n not in graph.constants]
    assert piece.nodes == calls


def test_named_operations_are_pieces_of_their_own():
    graph = graph_of(unrolled(6), *inputs_of_the_loop())
    pieces = pieces_of(graph, apart=frozenset({aten.sort.default}))
    targets = [[node.target for node in piece.nodes] for piece in pieces.order]
    assert [aten.sort.default in names for names in targets] == [False, True, False]
    run = assembled(graph, pieces, inputs_of_the_loop())
    new = inputs_of_the_loop(seed=1)
    torch.testing.assert_close(run(*new)[0], unrolled(6)(*new)[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("values", "number"),
    [
        ([2.0, 2.0], 2.0),
        ([2.0, 3.0], None),
        ([0.0, -0.0], None),
        ([float("nan")] * 2, None),
        ([True, True], True),
        ([], None),
    ],
)
def test_a_constant_of_one_number_is_known_by_it(values, number):
    seen = uniform(torch.tensor(values))
    assert (None if seen is None else seen[1]) == number


def test_what_is_checked_is_a_piece_of_its_own():
    x = torch.eye(3, dtype=torch.float64)
    graph = graph_of(lambda x: [torch.linalg.cholesky(x).exp()], x)
    pieces = pieces_of(graph, whole=True)
    assert [len(piece.outputs) for piece in pieces.order if is_alone(piece.nodes[0])] == [0]
    run = assembled(graph, pieces, [x])
    torch.testing.assert_close(run(4 * x), [torch.exp(2 * x)])
    with pytest.raises(torch.linalg.LinAlgError):
        run(-x)
