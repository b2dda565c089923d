"""What happens when somebody wants a run to stop.

While training, a signal only raises a flag: the step is finished, the state saved, and then the run ends. In every
other stage the signal ends the stage at once; what is done is on disk and is not done again. A second Ctrl-C never
waits. While the end of the run is written down, nothing interrupts it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

from ftrun.errors import FtrunError, Interrupted, Preempted


class StopSignals:
    """Handlers for SIGINT, SIGTERM and SIGUSR1 while in use as a context."""

    def __init__(self) -> None:
        self.asked: type[FtrunError] | None = None
        self.raised = False  # an error that follows may be a library's wording of ours
        self._deferred = self._closing = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def defer(self, deferred: bool) -> None:
        """Collect signals (True) or act on them at once (False); one that came meanwhile is acted on now."""
        self._deferred = deferred
        if not deferred:
            self.check()

    def check(self) -> None:
        """Raise what was asked for. Raises Interrupted or Preempted."""
        if self.asked:
            raise error_for(self.asked)

    def close(self) -> None:
        """From here on signals are only noted: the last files of the run are being written."""
        self._closing = True

    def _handle(self, number: int, _: FrameType | None) -> None:
        again = self.asked is Interrupted and number == signal.SIGINT
        self.asked = stop_of(number)
        if not self._closing and (again or not self._deferred):
            self.raised = True
            raise error_for(self.asked)


def stop_of(number: int) -> type[FtrunError]:
    """What a signal asks for."""
    return Interrupted if number == signal.SIGINT else Preempted


def error_for(kind: type[FtrunError]) -> FtrunError:
    return Interrupted("interrupted") if kind is Interrupted else Preempted("asked to stop")
