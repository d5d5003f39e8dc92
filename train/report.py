"""What a run tells people: the progress line, samples, metrics.jsonl and TensorBoard."""

import contextlib
import sys
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from eval.activity import activity
from eval.bits import bits_per_byte
from eval.sampling import Sampler, SamplingConfig, Utf8Stream
from intlm.eggroll import Statistics
from intlm.evolution import EvolutionState
from intlm.model import Parameters
from train.job import Job
from train.metrics import HELD_OUT, MetricsFile
from train.tracking import BITS_PER_BYTE, Tracker
from train.watch import Watch

LOG_SECONDS = 2.0
"""Metrics are written this often at most, and with each evaluation."""
SAMPLE_TOKENS = 240
SAMPLE_EVERY = 4
"""Evaluations between two samples."""
CONTEXT_TOKENS = 16
CONTEXT_LANES = 4
"""How much held-out text the histograms of activations are taken from."""


class Report:
    """Writes what happens. On a terminal it shows a progress line and samples; elsewhere it keeps quiet."""

    def __init__(self, job: Job, quiet: bool = False):
        """Open the metrics file and the events of `job`'s run, and drop what later steps left there."""
        # Before the first step nothing has been written that is not written again.
        came_from = job.state.step or -1
        self.metrics = MetricsFile.open(job.run.metrics_path, came_from, self.warn)
        self.tracker = Tracker(job.run.tensorboard_directory, came_from, self.warn)
        self.terminal = sys.stderr.isatty() and not quiet
        self.progress = tqdm(
            total=job.config.steps,
            initial=job.state.step,
            unit="step",
            disable=not self.terminal,
            dynamic_ncols=True,
            smoothing=0.05,
        )
        self.held_out: float | None = None
        self.watch = Watch(job.config.eggroll, job.config.model, job.config.steps)
        self._evaluations = self._taken = 0
        self._rate = 0.0
        self._since = self._at = time.perf_counter()
        self._clear()

    def __enter__(self) -> "Report":
        """Return the report itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the progress line and the files."""
        self.progress.close()
        self.metrics.close()
        self.tracker.close()

    def _clear(self) -> None:
        self._score = self._steps = self._ties = self._saturated = 0

    @property
    def scores(self) -> dict[int, float]:
        """Held-out bits per byte by step."""
        return self.metrics.scores

    def say(self, line: str) -> None:
        """A line above the progress line; nothing where there is no terminal."""
        if self.terminal:
            self.progress.write(line, file=sys.stderr)

    def warn(self, line: str) -> None:
        """A line about something wrong, in any case; from any thread."""
        with contextlib.suppress(OSError, ValueError):  # nobody is told where standard error is closed
            tqdm.write(f"intlm: {' '.join(line.splitlines())}", file=sys.stderr)

    def _warn_of(self, step: int, signs: list[str]) -> None:
        """Tell what `watch` has seen, wherever a person may look."""
        for sign in signs:
            self.warn(f"step {step}: {sign}")
            self.metrics.append(step, warning=sign)
            self.tracker.text(step, "warning", sign)

    def taken(self) -> None:
        """A step has been taken; its statistics come later, and speed is not theirs."""
        self._taken += 1
        self._at = time.perf_counter()

    def step(self, job: Job, step: int, statistics: Statistics) -> None:
        """Take in a step's statistics, and log now and then. Reading them waits for the step."""
        self._score += int(statistics["score"])
        self._ties += int(statistics["ties"])
        self._saturated += int(statistics["saturated"])
        self._steps += 1
        self.progress.update(1)
        if self._at - self._since >= LOG_SECONDS:
            self.log(job, step)

    def log(self, job: Job, step: int) -> None:
        """Write out what the steps since the last time came to; nothing where there were none."""
        config = job.config.eggroll
        tokens = self._steps * config.population * config.segment
        if not tokens:
            return
        pairs = self._steps * config.pairs
        comparisons = pairs * (config.segment if config.estimator == "activation" else 1)
        train = bits_per_byte(self._score, 1) / (tokens * job.lanes.bytes_per_token)
        if self._taken:
            taken = self._taken * config.population * config.segment
            self._rate = taken / max(1e-9, self._at - self._since)
            self._taken, self._since = 0, self._at
        rate = self._rate
        values: dict[str, Any] = {
            "member_tokens": step * config.population * config.segment,
            "train_bits_per_byte": train,
            "member_tokens_per_second": rate,
            "ties": self._ties / comparisons,
            "epochs": job.lanes.epochs(),
        } | job.lanes.progress()
        self.metrics.append(step, **values)
        self.tracker.scalars(
            step,
            {
                f"{BITS_PER_BYTE}train": train,
                "speed/member_tokens_per_second": rate,
                "fitness/ties": values["ties"],
                "fitness/saturated_factors_per_pair": self._saturated / pairs,
                **{f"data/{name}": float(value) for name, value in job.lanes.progress().items()},
            },
        )
        self._warn_of(step, self.watch.compared(self._ties, comparisons))
        shown = {"train": f"{train:.3f}", "held-out": f"{self.held_out:.3f}" if self.held_out else "-"}
        self.progress.set_postfix_str(f"{rate:,.0f} member-tokens/s, bits/byte {_join(shown)}")
        self._clear()

    def evaluate(self, job: Job, state: EvolutionState) -> None:
        """Score held-out text, look at weights and activations, and now and then write a sample."""
        self.log(job, state.step)
        parameters = job.evolution.parameters(state.masters, state.head_bias)
        self.held_out = job.evaluator.bits_per_byte(parameters)
        start, before = self.metrics.start, self.metrics.scores.values()
        self._warn_of(state.step, self.watch.scored(self.held_out, min(before, default=start), start))
        self.metrics.append(state.step, **{HELD_OUT: self.held_out})
        self.tracker.scalars(state.step, {f"{BITS_PER_BYTE}held_out": self.held_out})
        lines = {name: value for name, value in job.baselines.items() if name != "bytes"}
        self.tracker.reference_lines(state.step, lines)
        self._histograms(job, state.step, parameters)
        if self._evaluations % SAMPLE_EVERY == 0 or state.step == job.config.steps:
            text = sample_text(job, parameters)
            self.tracker.text(state.step, "sample", text)
            self.say(f"step {state.step}: {self.held_out:.3f} bits per byte held out; a sample:\n{text}\n")
        self._evaluations += 1
        self._since = time.perf_counter()

    def _histograms(self, job: Job, step: int, parameters: Parameters) -> None:
        weights = {name: np.asarray(value) for name, value in parameters.items() if name != "head_bias"}
        seen = activity(
            job.config.model,
            {name: np.asarray(value) for name, value in parameters.items()},
            job.evaluator.held_out.inputs_NxS[:CONTEXT_LANES, :CONTEXT_TOKENS],
        )
        saturation: dict[str, float] = {}
        saturated: dict[str, tuple[int, int]] = {}
        for group, arrays in (("weights", weights), ("activations", seen)):
            for name, values in arrays.items():
                counts = np.bincount(values.reshape(-1).astype(np.int64) + 128, minlength=256)
                self.tracker.histogram(step, f"{group}/{name}", counts)
                at_ends = int(counts[1] + counts[255])
                saturation[f"saturation_{group}/{name}"] = at_ends / values.size
                if group == "weights":
                    saturated[name] = at_ends, values.size
        self.tracker.scalars(step, saturation)
        self._warn_of(step, self.watch.weighed(saturated))


def sample_text(job: Job, parameters: Parameters) -> str:
    """A sample from the model, the same random numbers every time, so that samples can be compared."""
    sampler = Sampler(job.engine, job.config.model, parameters, SamplingConfig(temperature=205))
    prompt = np.array([job.tokenizer.separator])
    tokens = np.concatenate(list(sampler.tokens(prompt, 1, SAMPLE_TOKENS)), axis=1)[0]
    stream = Utf8Stream()
    return stream.feed(job.tokenizer.decode(tokens)) + stream.end()


def _join(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
