"""A process that runs `intlm` command lines in children, in which what a test asks for goes wrong.

Orders come as JSON lines on standard input, and so do the answers on standard output. A child is a fork, so that
an attempt costs no imports. What it does to the files below its directory passes through `Faults.point`, before
and after each call and in the middle of each write.
"""

import builtins
import contextlib
import io
import itertools
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CALLS = ("open", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "pwrite", "ftruncate")


class Faulty:
    """The server, from the side of a test. `whole`: what undisturbed runs came to, for tests to keep."""

    def __init__(self) -> None:
        self.whole: dict[tuple[str, ...], Any] = {}
        # What is killed must not leave half of something in a cache that others read.
        environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, home: Path, words: list[str], **fault: Any) -> dict[str, Any]:
        """Run a command line in `home`; see `Faults` for what may go wrong.

        `code`: exit code, or minus the signal; `steps`: training steps done; `out`, `err`: what it showed;
        `points`: what it did to files, where `record` is true.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"home": str(home), "words": words, "fault": fault}) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


class Faults:
    """What goes wrong in a child.

    kill: SIGKILL at the `count`-th point that this pattern matches; fail: `OSError(errno)` there, and at the
    `length` - 1 points after it that match; remove: the directory of runs goes away after so many steps; signals:
    (step, signal) to send to itself; clock: jumps of the clocks in seconds, one after the other; record: write
    down the points; fill: from one step to another the disk is full; full: the disk seems to have no room for a
    checkpoint until so many steps are done.
    """

    def __init__(self, home: Path, steps: mmap.mmap, fault: dict[str, Any]):
        self.home, self.steps, self.fault = home, steps, fault
        self.matches = 0
        self.log = os.open(home.with_name(home.name + ".points"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def point(self, what: str, path: Any) -> None:
        name = self.name(path)
        if name is None:
            return
        text = f"{what} {name}"
        if self.fault.get("record"):
            os.write(self.log, text.encode() + b"\n")
        pattern = self.fault.get("kill") or self.fault.get("fail")
        if not pattern or not re.search(pattern, text):
            return
        self.matches += 1
        first = self.fault.get("count", 1)
        if self.fault.get("kill") and self.matches == first:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault.get("fail") and first <= self.matches < first + self.fault.get("length", 1):
            raise OSError(self.fault["errno"], os.strerror(self.fault["errno"]))

    def name(self, path: Any) -> str | None:
        """The path below the directory of runs; None for what is elsewhere."""
        if isinstance(path, int):
            try:
                path = Path(f"/proc/self/fd/{path}").readlink()
            except OSError:
                return None
        try:
            return str((self.home / os.fspath(path)).relative_to(self.home / "runs"))
        except (TypeError, ValueError):
            return None

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.around(name, getattr(os, name)))
        opened = io.open
        faults = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                faults.point("write", self.name)
                data = memoryview(data).cast("B")
                half = super().write(data[: len(data) // 2]) if len(data) > 1 else 0
                try:
                    faults.point("half", self.name)
                except OSError:
                    if half:
                        return half  # as systems do: the next write tells why
                    raise
                written = half + super().write(data[half:])
                faults.point("written", self.name)
                return written

        def open_(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
            if "b" not in mode or not set(mode) & set("wax+") or faults.name(file) is None:
                return opened(file, mode, buffering, *rest, **more)
            faults.point("before open", file)
            raw = Raw(file, mode.replace("b", ""))
            return raw if buffering == 0 else io.BufferedWriter(raw)

        io.open = builtins.open = open_  # type: ignore[assignment]
        from intlm.evolution import Evolution

        step = Evolution.step

        def counted(evolution: Any, state: Any, tokens: Any) -> Any:
            done = int.from_bytes(self.steps[:8], "little") + 1
            self.steps[:8] = done.to_bytes(8, "little")
            for when, number in self.fault.get("signals", ()):
                if when == state.step:
                    os.kill(os.getpid(), number)
            if "fill" in self.fault:
                self.fill(state.step, *self.fault["fill"])
            if self.fault.get("remove") == state.step:
                (self.home / "runs").rename(self.home / "gone")
            return step(evolution, state, tokens)

        Evolution.step = counted  # type: ignore[method-assign]
        if "full" in self.fault:
            usage = shutil.disk_usage

            def full(path: Any) -> Any:
                done = int.from_bytes(self.steps[:8], "little")
                return usage(path)._replace(free=5000) if done < self.fault["full"] else usage(path)

            shutil.disk_usage = full
        if "clock" in self.fault:
            jumps = itertools.cycle(self.fault["clock"])
            for clock in ("time", "monotonic", "perf_counter"):
                original = getattr(time, clock)
                setattr(time, clock, lambda original=original: original() + next(jumps))

    def fill(self, step: int, start: int, end: int) -> None:
        """Leave no byte on the disk from one step to another."""
        path = self.home / "fill"
        if step == start:
            with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                for size in (1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)):
                            pass
        if step == end:
            path.unlink()

    def around(self, what: str, function: Any) -> Any:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            self.point(f"before {what}", path)
            result = function(path, *rest, **more)
            self.point(f"after {what}", rest[0] if what in ("replace", "rename") else path)
            return result

        return call


def attempt(order: dict[str, Any], steps: mmap.mmap) -> dict[str, Any]:
    """Fork, and see how it ends."""
    home, fault = Path(order["home"]), order["fault"]
    steps[:8] = bytes(8)
    shown = [home.with_name(f"{home.name}.{name}") for name in ("out", "err", "points")]
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for number, path in enumerate(shown[:2], 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.chdir(home)
            Faults(home, steps, fault).install()
            from intlm.cli import main

            code = main(order["words"])
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = 0
    if "after" in fault:
        # A random moment, counted from the first step.
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            if steps[0] or steps[1]:
                time.sleep(fault["after"])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                done = os.waitpid(child, 0)
                break
            time.sleep(0.001)
        status = done[1]
    else:
        status = os.waitpid(child, 0)[1]
    out, err, points = (path.read_text() if path.exists() else "" for path in shown)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "steps": int.from_bytes(steps[:8], "little"),
        "out": out,
        "err": err,
        "points": points.splitlines(),
    }


def serve() -> None:
    """Load what training needs, and do as orders say."""
    import tensorboardX  # noqa: F401

    import eval.baselines
    import eval.sampling
    import intlm.cli  # noqa: F401
    import train.check
    import train.job
    import train.loop
    import train.report

    # What takes long and is not looked at here.
    train.report.SAMPLE_TOKENS = 1
    figures = eval.baselines.baselines([b"ab"], [b"ab"])
    train.job.baselines = lambda *_: figures
    steps = mmap.mmap(-1, 8)
    for line in sys.stdin:
        print(json.dumps(attempt(json.loads(line), steps)), flush=True)


if __name__ == "__main__":
    serve()
