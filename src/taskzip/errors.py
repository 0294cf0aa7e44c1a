"""The errors of taskzip: every message names what was given, where it does not fit, and the way out."""


class TaskzipError(Exception):
    """Base of all errors that taskzip raises on purpose; the command line prints it as one sentence."""


class InputError(TaskzipError, ValueError):
    """Tasks, data or settings that cannot be used as given."""


class GraphError(TaskzipError):
    """A network whose structure could not be read, or was read wrongly."""


class CheckpointError(TaskzipError):
    """A checkpoint that cannot be written, read, or matched to the networks it is loaded into."""
