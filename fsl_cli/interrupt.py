"""Ctrl-C and SIGTERM as a request to stop after the current step, not in the middle of it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interrupt:
    """In its context, SIGINT or SIGTERM sets `signal`; a Ctrl-C after that raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._wish) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _wish(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
