"""Stopping a run by a signal without losing it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

__all__ = ["StopSignals", "TrainingInterrupted"]

#: What ``signal.signal`` takes and gives back.
type _Handler = Callable[[int, FrameType | None], object] | int | None


class TrainingInterrupted(KeyboardInterrupt):
    """A run that was stopped by a signal, after it wrote a checkpoint.

    Args:
        message: says how to go on.
        number: of the signal.

    Attributes:
        exit_code: what a command line should return, 130 after Ctrl-C and 143 after
            SIGTERM.

    Examples:
        >>> TrainingInterrupted("Go on with resume=True.", signal.SIGTERM).exit_code
        143
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopSignals:
    """Notes SIGTERM and Ctrl-C in place of obeying them; a second one acts at once.

    Outside the main thread Python takes no handlers, and nothing is noted. A signal
    that is ignored (by ``nohup``, say) stays so.

    Args:
        enabled: False leaves all signals as they are.

    Attributes:
        received: number of the first signal; None so far.

    Examples:
        >>> with StopSignals() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.received == signal.SIGTERM
        True
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.received: int | None = None
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        if self.enabled and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._put_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._put_back()  # so that a second one does what it did before

    def _put_back(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None: set by something other than Python, which cannot set it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
