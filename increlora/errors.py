"""The one exception that is addressed to the person at the keyboard."""


class UserError(Exception):
    """Bad input, said in one or two lines: what is wrong, where, and what to do about it.

    A class names its own arguments in backquotes: `top_h`. Where a configuration describes the object, the message
    that a person sees has the key instead: method.top_h.

    `run.py` and the scripts print the message and leave with exit code 2; `HYDRA_FULL_ERROR=1` shows the traceback.
    Any other exception that reaches the user is a defect of this project.
    """

    exit_code = 2


class Busy(UserError):
    """Another process does this at the moment; the exit code is that of a temporary failure (sysexits.h)."""

    exit_code = 75


class Interrupted(UserError):
    """The run was asked to stop by a signal; the exit code is that of a process the signal ended."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
        self.exit_code = 128 + signal


def first_line(error: Exception) -> str:
    """The first line of what an error says, at most 200 characters; its type if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
