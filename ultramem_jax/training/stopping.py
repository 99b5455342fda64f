"""Turns SIGTERM into a request that a run follows in good order."""

import signal


class EvaluationStopped(Exception):
    """Ends an evaluation during which SIGTERM arrived."""


class StopOnSigterm:
    """Turns SIGTERM into a request that the loop reads; several processes ask about every two seconds."""

    def __init__(self) -> None:
        """Prepares to handle the signal, in a `with`."""
        self.requested = False

    def __enter__(self) -> "StopOnSigterm":
        try:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        except ValueError:  # only the main thread may handle signals; elsewhere they are the caller's
            self._previous = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _request(self, *_: object) -> None:
        self.requested = True
