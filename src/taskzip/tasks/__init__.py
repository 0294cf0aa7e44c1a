"""What is given: a name, a network, data; how the network is run, and what its outputs mean."""

from taskzip.tasks.batches import Kept
from taskzip.tasks.calls import Call, as_call, by_task
from taskzip.tasks.labels import are_probabilities, class_axis, is_cross_entropy, is_one_of, label_loss
from taskzip.tasks.outputs import ROUNDING, answers, is_logits, named_tensors, own_loss, same_outputs, tensors
from taskzip.tasks.running import counted_calls, evaluating, in_eval_mode, keeping_modes, run_batch, version
from taskzip.tasks.suitability import Suitability, is_classes
from taskzip.tasks.task import Batch, Task, call, device_of, has_numbers, input_tensors, samples_in

__all__ = [
    "ROUNDING",
    "Batch",
    "Call",
    "Kept",
    "Suitability",
    "Task",
    "answers",
    "are_probabilities",
    "as_call",
    "by_task",
    "call",
    "class_axis",
    "counted_calls",
    "device_of",
    "evaluating",
    "has_numbers",
    "in_eval_mode",
    "input_tensors",
    "is_classes",
    "is_cross_entropy",
    "is_logits",
    "is_one_of",
    "keeping_modes",
    "label_loss",
    "named_tensors",
    "own_loss",
    "run_batch",
    "same_outputs",
    "samples_in",
    "tensors",
    "version",
]
