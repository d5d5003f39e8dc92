"""TensorBoard events: curves, samples of text and histograms of weights, beside the baselines."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from intlm.errors import InputError
from intlm.trouble import Trouble, Warn, warn_plainly

# Every curve whose tag starts so is drawn in one chart, to be compared with the baselines.
BITS_PER_BYTE = "bits_per_byte/"
FLUSH_SECONDS = 10
RETRY_SECONDS = 30

INT8_VALUES = range(-128, 128)


class Tracker:
    """Writes TensorBoard events. `tensorboard --logdir runs` shows them; nothing here needs TensorBoard.

    Tags are paths such as `bits_per_byte/held_out`; those under `bits_per_byte/` (`BITS_PER_BYTE`) appear
    together in the chart "bits per byte" of the page Custom Scalars, and each in the page Time Series.
    Events reach the disk every 10 seconds and on `close`, or at the end of a `with`. A file that cannot be
    written any more does not end training: events are dropped, and a new file is begun every 30 seconds until
    one can be.
    """

    def __init__(self, directory: Path, from_step: int, warn: Warn = warn_plainly) -> None:
        """Write into `directory`, made if need be. Raises `InputError` where that cannot be done.

        `from_step` is the step of the checkpoint to go on from: TensorBoard then hides what an earlier
        process wrote for later steps. A new run passes -1.
        """
        # Slow to import, and only training needs it. Its SummaryWriter hands events to a thread, which a full
        # disk kills, and then the process hangs at its end; its record writer reports the error here.
        from tensorboardX import RecordWriter, summary
        from tensorboardX.proto import event_pb2

        self.directory = directory
        self._summary: Any = summary
        self._event: Any = event_pb2.Event
        self._open_records: Any = RecordWriter
        self._trouble = Trouble(warn)
        self._records: Any = None
        self._failed = 0.0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._open(from_step + 1)
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._put(from_step + 1, session_log=start)
        except OSError as error:
            self._abandon()
            raise InputError(f"{directory}: cannot be written: {error.strerror or error}") from error

    def _open(self, step: int) -> None:
        """Begin a file. Raises `OSError`."""
        # Read in the order of names. The step keeps a quick restart from overwriting the file.
        name = f"events.out.tfevents.{int(time.time()):010d}.{step:08d}"
        while (self.directory / name).is_file():
            name += "-"
        self._records = self._open_records(str(self.directory / name))
        self._flushed = time.monotonic()
        # The chart takes its curves by a regular expression, so it needs no list of the baselines.
        layout = {"intlm": {"bits per byte": ["Multiline", [f"{BITS_PER_BYTE}.*"]]}}
        self._put(0, file_version="brain.Event:2")
        self._put(0, summary=self._summary.custom_scalars(layout))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point at `step` for each curve: tag -> value (stored as 32-bit floats, for display only)."""
        for tag, value in values.items():
            self._write(step, summary=self._summary.scalar(tag, value))

    def reference_lines(self, step: int, values: Mapping[str, float]) -> None:
        """One point at `step` for each baseline: name -> bits per byte.

        Called with the same values at every evaluation, this draws horizontal lines in the chart "bits per
        byte", as long as the curves are.
        """
        self.scalars(step, {BITS_PER_BYTE + name: value for name, value in values.items()})

    def text(self, step: int, name: str, text: str) -> None:
        """Show `text` verbatim. What is no valid Unicode in it becomes question marks."""
        # TensorBoard renders Markdown, in which indented lines are code.
        lines = text.encode(errors="replace").decode().splitlines()
        self._write(step, summary=self._summary.text(name, "\n".join(f"    {line}" for line in lines)))

    def histogram(self, step: int, name: str, counts: np.ndarray) -> None:
        """Show how often each int8 value occurs. `counts`: integers `[256]` for the values -128 to 127.

        Nothing is written where all counts are 0. Raises `ValueError` for another shape.
        """
        if counts.shape != (256,):
            raise ValueError(f"counts have the shape {counts.shape}; 256 int8 values are counted")
        count_of = {value: int(count) for value, count in zip(INT8_VALUES, counts, strict=True) if count}
        if not count_of:
            return
        # A bin reaches from the limit before it to its own, so each run of empty bins between two others is
        # kept as one; without it the bin after it would be drawn across the gap.
        limits: list[float] = []
        bins: list[int] = []
        for value, count in count_of.items():
            if limits and limits[-1] != value - 0.5:
                limits.append(value - 0.5)
                bins.append(0)
            limits.append(value + 0.5)
            bins.append(count)
        histogram = self._summary.histogram_raw(
            name,
            min=min(count_of) - 0.5,
            max=max(count_of) + 0.5,
            num=sum(count_of.values()),
            sum=sum(value * count for value, count in count_of.items()),
            sum_squares=sum(value * value * count for value, count in count_of.items()),
            bucket_limits=limits,
            bucket_counts=bins,
        )
        self._write(step, summary=histogram)

    def close(self) -> None:
        """Write out what is pending and close the file. A second call does nothing."""
        try:
            if self._records is not None:
                self._records.close()
        except OSError as error:
            self._fails(error)

    def __enter__(self) -> "Tracker":
        """Return the tracker itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def _write(self, step: int, **content: Any) -> None:
        try:
            if self._records is None:
                if abs(time.monotonic() - self._failed) < RETRY_SECONDS:
                    return
                self._failed = time.monotonic()
                self._open(step)
            self._put(step, **content)
        except OSError as error:
            self._fails(error)
            return
        self._trouble.ends(f"{self.directory}: can be written again")

    def _put(self, step: int, **content: Any) -> None:
        """Write an event. Raises `OSError`."""
        event = self._event(wall_time=time.time(), step=step, **content)
        self._records.write(event.SerializeToString())
        if self._trouble.now or abs(time.monotonic() - self._flushed) > FLUSH_SECONDS:
            self._records.flush()
            self._flushed = time.monotonic()

    def _fails(self, error: OSError) -> None:
        self._abandon()
        self._trouble.begins(
            f"{self.directory}: cannot be written: {error.strerror or error}; training goes on without its events"
        )

    def _abandon(self) -> None:
        """Give up the file: it may end in half an event, after which nothing could be read."""
        records, self._records, self._failed = self._records, None, time.monotonic()
        if records is not None:
            with contextlib.suppress(OSError):
                records.close()
