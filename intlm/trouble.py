"""What fails while a run goes on: said once when it begins, and once when it works again."""

import contextlib
import sys
from collections.abc import Callable

Warn = Callable[[str], None]
"""Tells a person one line."""


def warn_plainly(line: str) -> None:
    """A line on standard error; nobody is told where that is closed."""
    with contextlib.suppress(OSError, ValueError):
        print(f"intlm: {' '.join(line.splitlines())}", file=sys.stderr, flush=True)


class Trouble:
    """One thing that may fail. `now`: whether it does."""

    def __init__(self, warn: Warn = warn_plainly):
        self.now = False
        self._warn = warn

    def begins(self, line: str) -> None:
        """Say `line`, unless it has failed before and not worked since."""
        if not self.now:
            self.now = True
            self._warn(line)

    def ends(self, line: str) -> None:
        """Say `line`, if it has failed so far."""
        if self.now:
            self.now = False
            self._warn(line)
