"""What several processes on this machine make of a run, beside one process, with few threads and with as many."""

import contextlib
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.throughput import Case
from eval.trial import try_out
from intlm.errors import InputError
from train.job import Request

ROUNDS = 3
LEAST_STEPS = 4
NEVER = str(1 << 20)


@dataclass(frozen=True)
class Scaling:
    """Member-tokens/s of `intlm train`, and how many times as many the same run makes of more cores.

    one: of one process with `threads` threads. by_processes: of `processes` such; by_threads: of one process with
    as many threads as these have together. Each is the median over rounds of runs in turn; ranges are of rounds.
    All of them ended with the same bytes.
    """

    engine: str
    estimator: str
    processes: int
    threads: int
    population: int
    segment: int
    steps: int
    one: float
    by_processes: float
    by_processes_range: tuple[float, float]
    by_threads: float
    by_threads_range: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def line(self) -> str:
        """For a terminal."""
        many, low, high = self.by_processes, *self.by_processes_range
        threads, least, most = self.by_threads, *self.by_threads_range
        return (
            f"scaling, {self.engine}, {self.estimator}, population {self.population:,}, segment {self.segment}: "
            f"one process, threads {self.threads}: {self.one:,.0f} member-tokens/s; {self.processes} processes: "
            f"{many:.2f} times that ({low:.2f} to {high:.2f}); one process, threads "
            f"{self.threads * self.processes}: {threads:.2f} times ({least:.2f} to {most:.2f}); "
            f"{ROUNDS} rounds of {self.steps} steps, all to the same bytes"
        )


def measure_scaling(
    preset: str, settings: tuple[str, ...], case: Case, seconds: float, processes: int
) -> Scaling:
    """Train on the standard library, as `intlm train` does, for about `seconds` on `case.threads` threads.

    preset, settings: those that `case.config` was made of. Raises `InputError` where a run fails.
    """
    with tempfile.TemporaryDirectory() as home:
        request = Request(
            preset,
            f"{home}/tried",
            steps=1 << 20,
            engine=case.engine,
            settings=settings,
            threads=case.threads,
        )
        job, _, step = try_out(request)
        job.lanes.close()
        config = case.config
        steps = max(LEAST_STEPS, int(seconds / step))
        words = ["train", preset, "--engine", case.engine, "--steps", str(2 * steps + 1)]
        words += [word for setting in settings for word in ("--set", setting)]
        words += ["--evaluate-every", NEVER, "--checkpoint-every", str(steps)]
        tokens = steps * config.population * config.segment
        rates: list[list[float]] = []
        for number in range(ROUNDS):
            layouts = [(1, case.threads), (processes, case.threads), (1, case.threads * processes)]
            names = [f"round{number}-{layout}" for layout in range(len(layouts))]
            found = [_train(home, words, name, *layout) for name, layout in zip(names, layouts, strict=True)]
            _compare([second for _, second in found])
            rates.append([tokens / _seconds_between(*pair) for pair in found])
    by_processes, by_threads = ([rate[kind] / rate[0] for rate in rates] for kind in (1, 2))
    return Scaling(
        case.engine, config.estimator, processes, case.threads, config.population, config.segment, steps,
        statistics.median(rate[0] for rate in rates),
        statistics.median(by_processes), (min(by_processes), max(by_processes)),
        statistics.median(by_threads), (min(by_threads), max(by_threads)),
    )  # fmt: skip


def _train(home: str, words: list[str], name: str, processes: int, threads: int) -> tuple[Path, Path]:
    """Run it; its first two checkpoints."""
    command = [sys.executable, "-m", "intlm", *words, "--run", name, "--threads", str(threads)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = ["--coordinator", f"127.0.0.1:{probe.getsockname()[1]}", "--processes", str(processes)]
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, *where, "--process", str(process)],
                    cwd=home,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                )
            )
            for process in range(processes)
        ]
        try:
            for child in children:
                _, said = child.communicate()
                if child.returncode:
                    lines = said.decode(errors="replace").strip().splitlines() or ["it said nothing"]
                    raise InputError(f"--processes {processes}: a run failed: {lines[-1]}")
        finally:
            for child in children:
                child.kill()
    first, second, *_ = sorted((Path(home) / f"runs/{name}/checkpoints").iterdir())
    return first, second


def _seconds_between(first: Path, second: Path) -> float:
    """The time of the steps between two checkpoints, which is free of what comes before the first."""
    return (second.stat().st_mtime_ns - first.stat().st_mtime_ns) / 1e9


def _compare(paths: list[Path]) -> None:
    first, *others = (path.read_bytes() for path in paths)
    if any(other != first for other in others):
        raise RuntimeError(f"the checkpoints {', '.join(map(str, paths))} differ")
