"""The list of autograd nodes whose second derivatives have been tested."""

import inspect

from benchmarks import second_derivatives
from hypergrad._autograd import tested_nodes

SAMPLE = [
    "Linear, train", "Conv2d, strided, train", "BatchNorm2d, train", "LayerNorm, train",
    "LSTM, train", "GELU, train", "MaxPool2d, train", "cross_entropy", "attention, MATH",
    "write a row", "solve", "weight_norm, fused",
    "multi_margin_loss",
]  # fmt: skip


def test_the_list_of_nodes_is_what_the_comparison_finds():
    outcomes = second_derivatives.compared(SAMPLE)
    found = second_derivatives.tested(outcomes)
    wrong = {name for name, outcome in outcomes.items() if outcome.wrong}
    assert wrong == {"weight_norm, fused"}
    assert "not implemented" in outcomes["multi_margin_loss"].refused
    of_networks = {
        "AddmmBackward0", "ConvolutionBackward0", "ConvolutionBackwardBackward0",
        "NativeBatchNormBackward0", "NativeLayerNormBackward0", "GeluBackward0",
        "MaxPool2DWithIndicesBackward0", "LogSoftmaxBackward0", "NllLossBackward0",
        "torch::autograd::CopySlices", "LinalgSolveExBackward0",
    }  # fmt: skip
    assert of_networks <= found
    assert found <= tested_nodes.TESTED_NODES
    fused = "WeightNormInterfaceBackward0"
    assert fused in outcomes["weight_norm, fused"].suspects - tested_nodes.TESTED_NODES


def test_the_list_of_nodes_is_made_from_the_figures():
    assert inspect.getsource(tested_nodes) == second_derivatives.source()
