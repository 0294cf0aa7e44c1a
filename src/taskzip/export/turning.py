"""Weights of linear layers, laid as products read them in an ONNX graph.

torch keeps them as [units, inputs]; `MatMul` wants [inputs, units], and the exporter puts a `Transpose` in between.
Quantisers take what `MatMul` and `Gemm` read from the file itself, and leave in floats what lies behind an operator.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def turn_weights(model: Any) -> None:
    """Turn every matrix that is only read turned, in place, and remove the `Transpose`.

    Equal nodes have to be one and no node unused. What something else reads as it is, as `Gather` reads embeddings, is
    left alone: it would be in the file twice.
    """
    import onnx_ir

    for value in list(model.graph.initializers.values()):
        readers = {use.node for use in value.uses()}
        turning = {node for node in readers if node.op_type == "Transpose" and len(value.shape) == 2}
        read = [value, *(node.outputs[0] for node in turning)]
        others = readers - turning
        if not turning or any(each.is_graph_output() for each in read) or not all(map(_turns_weight, others)):
            continue
        turned = np.ascontiguousarray(value.const_value.numpy().T)
        value.const_value = onnx_ir.Tensor(turned, dtype=value.dtype, name=value.name)
        value.shape = value.const_value.shape
        for node in others:
            del node.attributes["transB"]
        for node in turning:
            node.outputs[0].replace_all_uses_with(value)
            model.graph.remove(node, safe=True)


def _turns_weight(node: Any) -> bool:
    """Whether it turns the only matrix of the file that it reads."""
    turns = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].value == 1
    return turns and not any(each.is_initializer() and len(each.shape) == 2 for each in node.inputs[::2])
