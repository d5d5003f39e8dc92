"""What signals ask of a training run."""

import os
import signal
import time
from types import FrameType

PATIENCE = 1.0

STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2")
SAVES = "SIGUSR1"


class StopSignal:
    """Turns signals into flags that the loop looks at after each step.

    `requested`: SIGINT, SIGTERM, SIGUSR2 (what a batch system can be told to send before it takes the machine
    away) or SIGHUP, unless that is ignored, has come: the run is to be saved and left. `save_requested`: SIGUSR1
    has come: it is to be saved. A second SIGINT ends the process at once, and so does a second one of the others,
    `PATIENCE` seconds later or more: the first may wait for a network.
    """

    def __init__(self) -> None:
        self.requested = self.save_requested = False
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        """Take the signals over."""
        for name in (*STOPS, SAVES):
            number = getattr(signal, name, None)  # not every system has all of them
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                continue  # started by nohup, to outlive its terminal
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since this was called last."""
        asked, self.save_requested = self.save_requested, False
        return asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if signal.Signals(number).name == SAVES:
            self.save_requested = True
            return
        if self.requested and (number == signal.SIGINT or time.monotonic() - self._since >= PATIENCE):
            os._exit(130)
        if not self.requested:
            self._since = time.monotonic()
        self.requested = True


class GroupStop(StopSignal):
    """Of several processes: `asked` and `save_asked` where somebody asked one of them, `requested` and
    `save_requested` when all have heard of it, after the same step.

    A second signal is the business of `train.cluster`, which hears it also while this thread waits for others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = self.save_asked = False

    def ask_save(self) -> None:
        """Ask all for a checkpoint; the next step's sums tell them."""
        self.save_asked = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if signal.Signals(number).name == SAVES:
            self.save_asked = True
        else:
            self.asked = True
