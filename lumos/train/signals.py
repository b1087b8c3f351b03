"""Stopping a run from outside: the first SIGTERM or SIGINT asks, the second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

# sysexits.h: a temporary failure; the same command goes on from the checkpoint.
EXIT_STOPPED = 75
# torchrun hands on a signal that its processes may have had from the terminal already.
SAME_REQUEST_SECONDS = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(RuntimeError):
    """A run that ended before its last step because it was asked to; its state is in `checkpoint` (None without)."""

    def __init__(self, message: str, checkpoint: object = None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class StopRequest:
    """A context in which SIGTERM and SIGINT only note that the run shall stop.

    name: of the signal, "" while there was none. A second signal, more than a second later, has its usual effect at
    once. Outside the main thread, where Python handles no signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.name = ""
        self._at = 0.0
        self._earlier: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.name:
            self.name, self._at = signal.Signals(number).name, time.monotonic()
            os.write(2, f"{self.name}: stopping after this step; once more stops at once\n".encode())
        elif time.monotonic() - self._at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
