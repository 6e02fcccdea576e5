"""Reasons to stop a run in good order: Ctrl-C, SIGTERM, a time budget."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType


class StopRequest:
    """While open, turns SIGINT and SIGTERM into a request that the loop reads between two steps.

    A second signal interrupts at once (KeyboardInterrupt). Outside the main thread, where Python cannot
    handle signals, only the time budget counts.
    """

    def __init__(self, max_seconds: float = 0.0) -> None:
        """max_seconds: time budget in seconds from the opening on; 0: none."""
        self._max_seconds = max_seconds
        self._signal = 0
        self._process = os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._opened = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def reason(self) -> str:
        """Why the run should stop, or "" while it should go on."""
        if self._signal:
            return f"stopped by {signal.Signals(self._signal).name}"
        if self._max_seconds and time.monotonic() - self._opened >= self._max_seconds:
            return f"stopped after its {self._max_seconds:g} s"
        return ""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A loader's worker, forked with this handler. Ctrl-C reaches it too, and is the main process's
            # business.
            if number == signal.SIGTERM:
                raise SystemExit
            return
        if self._signal:
            raise KeyboardInterrupt
        self._signal = number
