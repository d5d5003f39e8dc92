"""How fast engines sample: tokens/s of a few samples, measured in one run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.sampling import Sampler, SamplingConfig
from intlm.config import EggrollConfig, ModelConfig
from intlm.engine.engine import make_engine
from intlm.evolution import initial
from intlm.model import parameters

ROUNDS = 5
SAMPLES = (1, 32, 1024)
TEMPERATURE = 205
"""In 1/256: the 0.8 of `intlm sample`."""


@dataclass(frozen=True)
class SamplingSpeed:
    """What one engine samples with an untrained model. rate: tokens/s of all samples, a median of `ROUNDS`."""

    engine: str
    samples: int
    rate: float

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def measure(
    model_config: ModelConfig,
    config: EggrollConfig,
    engines: Sequence[str],
    samples: Sequence[int],
    seconds: float,
    say: Callable[[str], None],
) -> list[SamplingSpeed]:
    """Time every engine with every number of samples, about `seconds` for each figure and round.

    Up to 31 samples the native engine computes in one thread; everything else takes the cores that it gets.
    """
    state = initial(model_config, config, np.ones(model_config.vocabulary, np.int64))
    weights = parameters(state.masters, state.head_bias)
    streams = {}
    for name in engines:
        engine = make_engine(name, model_config, config)
        sampler = Sampler(engine, model_config, weights, SamplingConfig(temperature=TEMPERATURE))
        for count in samples:
            say(f"preparing {name}, samples {count:,}")
            # Never read to its end. What comes first is compiled, packed and of small calls.
            streams[name, count] = sampler.tokens(np.array([0]), count, 1 << 30)
            _rate(streams[name, count], 0.1)
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in streams}
    for number in range(ROUNDS):
        say(f"sampling, round {number + 1} of {ROUNDS}")
        for key, stream in streams.items():
            rates[key].append(_rate(stream, seconds))
    return [SamplingSpeed(*key, float(np.median(found))) for key, found in rates.items()]


def _rate(stream: Any, seconds: float) -> float:
    """Tokens/s of what comes within the time, and at least one piece of it."""
    started, tokens = time.perf_counter(), 0
    while True:
        tokens += next(stream).size
        if (passed := time.perf_counter() - started) >= seconds:
            return tokens / passed


def table(results: Sequence[SamplingSpeed]) -> str:
    """For a terminal."""
    lines = [f"{'engine':10s} {'samples':>10s} {'sampling':>12s}", f"{'':10s} {'':>10s} {'tokens/s':>12s}"]
    lines += [f"{result.engine:10s} {result.samples:10,d} {result.rate:12,.0f}" for result in results]
    return "\n".join(lines)
