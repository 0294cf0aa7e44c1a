"""The errors of taskzip: every message names what was given, where it does not fit, and the way out."""

import traceback
from pathlib import Path

import torch


class TaskzipError(Exception):
    """Base of all errors that taskzip raises on purpose; the command line prints it as one sentence."""


class InputError(TaskzipError, ValueError):
    """Tasks, data or settings that cannot be used as given."""


class GraphError(TaskzipError):
    """A network whose structure could not be read, or was read wrongly."""


class CheckpointError(TaskzipError):
    """A checkpoint that cannot be written, read, or matched to the networks it is loaded into."""


class ExportError(TaskzipError):
    """A joint network that cannot be exported, or a file of it that cannot be written."""


def place_in_code(error: Exception) -> str:
    """The line of the user's own code where an error came up, to be added to a message; "" if there is none."""
    libraries = [Path(torch.__file__).parent, Path(__file__).parent]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.line and not any(library in Path(frame.filename).parents for library in libraries):
            return f', at "{frame.line}" ({frame.filename}:{frame.lineno})'
    return ""
