"""Whether TensorRT knows the operators of an ONNX file, on paper: by the list of its ONNX parser.

Nothing is run, as that takes a GPU: restrictions on types, shapes and attributes are in the list's
own page, docs/operators.md of github.com/onnx/onnx-tensorrt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator, List

LIST = "onnx-tensorrt 10.1"
OPSETS = range(9, 21)  # that this list is about
OPERATORS = frozenset("""
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast
CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
DeformConv DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike
Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax
Identity If ImageScaler InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu
Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean
MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad
ParametricSoftplus Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform
RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence
RoiAlign Round ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign
Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh
ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
""".split())


def unsupported(path: Path) -> List[str]:
    """The operators of an ONNX file that are not in the list, and its opset if that is not."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    found = {node.op_type for node in _nodes(model.graph)} - OPERATORS
    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return sorted(found) + [f"opset {opset}" for opset in opsets if opset not in OPSETS]


def _nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph and of the graphs in their attributes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
