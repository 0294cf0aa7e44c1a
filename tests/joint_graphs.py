"""Networks as graphs, for the tests of what exporters do with these."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taskzip.export.example import Example
from taskzip.export.graphs import JointGraph
from taskzip.export.joint import Joint


def graph_of(networks: dict[str, nn.Module], x: Tensor) -> JointGraph:
    joint = Joint({name: net.eval() for name, net in networks.items()}, Example(x, list(networks), x.device))
    program = torch.export.export(joint, ([x],), strict=False)
    return JointGraph(program, ["input"], list(networks))


def count(graph: JointGraph, target: object) -> int:
    return sum(node.target is target for node in graph.operators())
