"""Tables that torch reads anew for every export, which is half of the time, here once; and what several tests need."""

from functools import cache

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture
def task_b_gives_more(monkeypatch):
    """A hundredth more, in PyTorch, than what was exported for it."""
    from taskzip.export import agreement

    right = agreement.outputs

    def off(*args):
        return {task: {n: y + 0.01 * (task == "b") for n, y in each.items()} for task, each in right(*args).items()}

    monkeypatch.setattr(agreement, "outputs", off)


@pytest.fixture(scope="session", autouse=True)
def _one_table():
    from torch._export import utils
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        of_namespace = utils._collect_all_valid_cia_ops_for_namespace
        patch.setattr(utils, "_collect_all_valid_cia_ops_for_namespace", cache(of_namespace))
        yield
