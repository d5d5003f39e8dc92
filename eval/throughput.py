"""Throughput of the engines, measured in one run, so that ratios hold where absolute times are noise."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from intlm import model
from intlm.config import EggrollConfig, ModelConfig
from intlm.engine.engine import make_engine
from intlm.evolution import Evolution, initial

ROUNDS = 5


@dataclass(frozen=True)
class Throughput:
    """What one engine does with one population. Rates are medians over `ROUNDS` rounds.

    training: member-tokens/s of whole steps, update included; evaluation: of the population's evaluation and
    votes alone; inference: tokens/s of the unperturbed model on as many rows and tokens; gmacs: multiply-adds
    of the model's matrices that training makes, in 10^9/s; perturbations and votes not counted.
    """

    engine: str
    population: int
    training: float
    evaluation: float
    inference: float
    gmacs: float

    def as_dict(self) -> dict[str, Any]:
        """For --json, with the two ratios that people ask for."""
        return asdict(self) | {
            "update_share": 1 - self.training / self.evaluation,
            "evaluation_over_inference": self.evaluation / self.inference,
        }


def multiply_adds(config: ModelConfig) -> int:
    """Multiply-adds of the model's matrices for one token."""
    return config.layers * 12 * config.width**2 + config.vocabulary * config.width


def measure(
    model_config: ModelConfig,
    config: EggrollConfig,
    engines: Sequence[str],
    populations: Sequence[int],
    seconds: float,
    say: Callable[[str], None],
) -> list[Throughput]:
    """Time every engine with every population, about `seconds` for each figure and round.

    Rounds go over all engines in turn, so that a drift of the machine's speed meets all of them.
    """
    timed: dict[tuple[int, str], tuple[Callable[[], Any], ...]] = {}
    for population in populations:
        sized = dataclasses.replace(config, population=population, pairs_per_lane=1)
        for name in engines:
            say(f"preparing {name}, population {population:,}")
            timed[population, name] = _tasks(model_config, sized, name)
            for task in timed[population, name]:
                task()
    rates: dict[tuple[int, str], list[list[float]]] = {key: [[], [], []] for key in timed}
    for number in range(ROUNDS):
        say(f"round {number + 1} of {ROUNDS}")
        for (population, name), tasks in timed.items():
            for task, rate in zip(tasks, rates[population, name], strict=True):
                rate.append(population * config.segment / _seconds_of(task, seconds))
    results = []
    for (population, name), lists in rates.items():
        training, evaluation, inference = (float(np.median(rate)) for rate in lists)
        gmacs = training * multiply_adds(model_config) / 1e9
        results.append(Throughput(name, population, training, evaluation, inference, gmacs))
    return results


def _tasks(model_config: ModelConfig, config: EggrollConfig, name: str) -> tuple[Callable[[], Any], ...]:
    """A whole training step, the population's evaluation, and plain inference on as many tokens."""
    engine = make_engine(name, model_config, config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, model_config.vocabulary, (config.lanes, config.segment + 1)).astype(np.int32)
    evolution = Evolution(engine, model_config, config, 1 << 20)
    state = initial(model_config, config, np.ones(model_config.vocabulary, np.int64))
    state, _ = evolution.step(state, tokens)
    parameters = evolution.parameters(state.masters, state.head_bias)
    key = np.array([1, 2], np.uint32)
    rows = np.repeat(tokens[:, :-1], 2, axis=0)
    start = model.initial_state(model_config, config.population)

    def step() -> None:
        after, statistics = evolution.step(state, tokens)
        np.asarray(statistics["score"])
        np.asarray(after.masters["head"])

    def evaluate() -> None:
        votes, _, _ = engine.population_step(parameters, key, state.scales, tokens, state.recurrent)
        np.asarray(votes["head"])

    def infer() -> None:
        np.asarray(engine.forward(parameters, rows, start)[1])

    return step, evaluate, infer


def _seconds_of(task: Callable[[], Any], seconds: float) -> float:
    """Seconds of one call, from as many as fill the time."""
    started, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - started < seconds:
        task()
        calls += 1
    return (time.perf_counter() - started) / calls


def table(results: Sequence[Throughput]) -> str:
    """For a terminal; speeds relative to the slowest engine of the same population come last."""
    lines = [
        f"{'engine':10s} {'population':>10s} {'training':>12s} {'GMAC/s':>8s} {'update':>7s} "
        f"{'inference':>12s} {'evaluation':>11s} {'relative':>9s}",
        f"{'':10s} {'':>10s} {'member-tok/s':>12s} {'':>8s} {'share':>7s} "
        f"{'tokens/s':>12s} {'/ inference':>11s} {'training':>9s}",
    ]
    for result in results:
        values = result.as_dict()
        slowest = min(other.training for other in results if other.population == result.population)
        lines.append(
            f"{result.engine:10s} {result.population:10,d} {result.training:12,.0f} {result.gmacs:8.1f} "
            f"{values['update_share']:7.1%} {result.inference:12,.0f} "
            f"{values['evaluation_over_inference']:11.2f} {result.training / slowest:8.1f}x"
        )
    return "\n".join(lines)
