"""Calls that may take for ever: libvirt's can be waited for, but not broken off."""

import threading
import time
from collections.abc import Callable


class Call:
    """A call in a thread of its own, which begins at once."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._function = function
        self._thread = threading.Thread(target=self._run, name="libvirt-call", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._function()
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            self._error = error

    def ended_within(self, timeout: float) -> bool:
        """Wait; a Ctrl-C is kept until the call has ended, since nothing else can be done then.

        So is what a signal raises else: pytest-timeout fails a test that way.
        """
        end = time.monotonic() + timeout
        interrupt: BaseException | None = None
        while self._thread.is_alive() and time.monotonic() < end:
            try:
                self._thread.join(end - time.monotonic())
            except BaseException as raised:  # noqa: BLE001 - raised again below
                interrupt = raised
        if interrupt is not None:
            raise interrupt
        return not self._thread.is_alive()

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error
