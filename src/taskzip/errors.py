"""The errors of taskzip: every message names what was given, where it does not fit, and the way out."""

import re
import sysconfig
import traceback
from pathlib import Path

import torch

_EXPORTERS = {"taskzip", "torch", "functorch", "sympy", "onnx", "onnx_ir", "onnxscript", "executorch", "torchao"}


class TaskzipError(Exception):
    """Base of all errors that taskzip raises on purpose; the command line prints it as one sentence."""


class TaskzipWarning(UserWarning):
    """What went on, and is likely not what was wanted."""


class InputError(TaskzipError, ValueError):
    """Tasks, data or settings that cannot be used as given."""


class GraphError(TaskzipError):
    """A network whose structure could not be read, or was read wrongly."""


class CheckpointError(TaskzipError):
    """A checkpoint that cannot be written, read, or matched to the networks it is loaded into."""


class ExportError(TaskzipError):
    """A joint network that cannot be exported, or a file of it that cannot be written."""


_FRAME = re.compile(r'File "(.+?)", line (\d+).*\n {4}(.+)')


def first_line(error: BaseException) -> str:
    """What an error says, without what else it says and without a full stop; its class if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]).rstrip(".")


def place_in_code(error: BaseException) -> str:
    """The line of the user's own code where an error came up, to be added to a message; "" if there is none."""
    return line_in_code("".join(traceback.format_tb(error.__traceback__)))


def line_in_code(trace: str) -> str:
    """The innermost line of the user's own code in the text of a stack trace, as above."""
    for file, number, line in reversed(_FRAME.findall(trace)):
        if not file.startswith("<") and not _is_library(Path(file)):  # that is code which torch has written
            return f', at "{line.strip()}" ({file}:{number})'
    return ""


def _is_library(file: Path) -> bool:
    """Whether a file belongs to Python, to taskzip, or to what torch exports by; networks may lie in packages too."""
    packages = Path(torch.__file__).parents[1]
    if packages in file.parents:
        return file.relative_to(packages).parts[0] in _EXPORTERS
    return any(Path(each) in file.parents for each in (sysconfig.get_path("stdlib"), Path(__file__).parent))
