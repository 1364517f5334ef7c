"""Being asked to stop: SIGINT and SIGTERM are remembered, and the loop ends after the current step."""

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, `signal` is the number of the SIGINT or SIGTERM that came, 0 before; a second SIGINT is let go.

    A cluster sends SIGTERM to every process of a job, so it may come from several sides.
    """

    def __enter__(self) -> "StopRequest":
        self.signal = 0
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if signal.SIGINT in self.before:
            signal.signal(signal.SIGINT, self.before.pop(signal.SIGINT))

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *error: Any) -> None:
        self._restore()
