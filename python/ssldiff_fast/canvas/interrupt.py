# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C that waits for the micro-batch under way."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class Interrupted(KeyboardInterrupt):
    """A run that was stopped on request; the message says how to go on."""


class StopRequest:
    """While it is entered, the first Ctrl-C is noted instead of raised; a second one raises.

    Python delivers signals to the main thread only: entered elsewhere, or where the application
    handles SIGINT itself, it changes nothing.
    """

    def __init__(self) -> None:
        self.made = False
        self._before: Any = None
        self._installed = False

    def __enter__(self) -> Self:
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._before)
            self._installed = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.made:
            signal.default_int_handler(number, frame)
        self.made = True

    def check(self) -> None:
        """Raises `Interrupted` where a stop was requested."""
        if self.made:
            raise Interrupted
