"""One process's part of a population that is spread over many.

Each process evaluates its own pairs; votes and statistics are summed over all processes, and everything else
happens in each of them alike. Integers add in any order, so that the number of processes changes no bit.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from intlm.config import FITNESS_UNIT
from intlm.eggroll import Scales, Statistics, Votes
from intlm.engine.engine import Engine
from intlm.fixedpoint import Array
from intlm.model import Parameters

EXCHANGES = ("votes", "fitness")
"""What processes add up: the votes of all parameters; or, under the estimator `weight`, those of the embedding
and the fitness of each pair, from which every process makes all other votes itself."""

LIMB_BITS = 16
LIMBS = 4
_SHIFTS = np.arange(LIMBS, dtype=np.int64) * LIMB_BITS
MOST_PROCESSES = 1 << 15
"""Sums of so many limbs of 16 bits, each from 0 to 65535, stay inside of 31 bits."""


def share(lanes: int, processes: int, process: int) -> tuple[int, int]:
    """The first lane of a process, and how many it has: contiguous, and no two processes differ by more than 1.

    1 <= processes <= lanes, 0 <= process < processes.
    """
    each, more = divmod(lanes, processes)
    return process * each + min(process, more), each + (process < more)


def to_limbs(sums_N: np.ndarray) -> np.ndarray:
    """int64 [N] as int32 [N * 4]: limbs of 16 bits, 0 to 65535, the lowest first."""
    limbs = (sums_N[:, None] >> _SHIFTS) & ((1 << LIMB_BITS) - 1)
    return limbs.astype(np.int32).reshape(-1)


def from_limbs(limbs: np.ndarray) -> np.ndarray:
    """int64 [N] from sums of limbs of up to `MOST_PROCESSES` processes: exact where it fits 64 bits."""
    return np.asarray(np.sum(limbs.reshape(-1, LIMBS).astype(np.int64) << _SHIFTS, axis=1, dtype=np.int64))


class DistributedEngine:
    """An engine whose votes and statistics are those of the whole population, in NumPy.

    `population_step` takes the tokens and states of this process's pairs, and returns their states. All
    processes have to call it alike; the rest is the inner engine's.
    """

    def __init__(
        self,
        engine: Engine,
        total: Callable[[Sequence[np.ndarray]], np.ndarray],
        first_pair: int,
        pairs: int,
        exchange: str = "votes",
    ):
        """total: parts of an int32 [n] to its sum over all processes.

        first_pair: of this process; pairs: of all of them.

        exchange: what is summed over the processes, one of `EXCHANGES`; it changes no bit.
        """
        self.name = engine.name
        self.engine, self.first_pair, self.pairs, self.exchange = engine, first_pair, pairs, exchange
        self.advance, self.forward, self.score = engine.advance, engine.forward, engine.score
        self.compile = engine.compile
        self.fitness_votes, self.embedding_votes = engine.fitness_votes, engine.embedding_votes
        self._total = total

    def population_step(
        self,
        parameters: Parameters,
        key: Array,
        scales: Scales,
        tokens_PxT1: Array,
        state_PxLxD: Array,
        first_pair: int = 0,
        votes: bool = True,
    ) -> tuple[Votes, Statistics, Array]:
        """See `Engine.population_step`; `first_pair` counts from this process's first one."""
        begin = self.first_pair + first_pair
        by_fitness = votes and self.exchange == "fitness"
        made, statistics, after = self.engine.population_step(
            parameters, key, scales, tokens_PxT1, state_PxLxD, begin, votes and not by_fitness
        )
        if by_fitness:
            own = statistics["fitness"]
            made = {"embedding": self.engine.embedding_votes(key, own, tokens_PxT1, begin)}
            statistics |= fitness_statistics(np.asarray(own), np.asarray(tokens_PxT1))
        made, statistics = self._sum(made, statistics, begin)
        if by_fitness:
            made = self.engine.fitness_votes(key, statistics["fitness"]) | made
        return made, statistics, after

    def _sum(self, made: Votes, statistics: Statistics, begin: int) -> tuple[Votes, Statistics]:
        """Votes and statistics of all processes, in one sum; `begin`: the first pair of these."""
        names = sorted(made)
        parts = [np.asarray(made[name]) for name in names]
        fitness = statistics.get("fitness")
        if fitness is not None:
            # A sum in which each process has the places of its own pairs.
            places = np.zeros(self.pairs, np.int32)
            places[begin : begin + len(fitness)] = fitness
            parts.append(places)
        sums = {
            name: np.asarray(statistics[name], np.int64) for name in sorted(statistics) if name != "fitness"
        }
        limbs = to_limbs(np.concatenate([value.reshape(-1) for value in sums.values()]))
        summed = self._total([*(part.reshape(-1) for part in parts), limbs])
        added = _split(summed[: -limbs.size], [part.shape for part in parts])
        shapes = [value.shape for value in sums.values()]
        totals = dict(zip(sums, _split(from_limbs(summed[-limbs.size :]), shapes), strict=True))
        if fitness is not None:
            totals["fitness"] = added.pop().astype(np.int8)
        return dict(zip(names, added, strict=True)), totals


def fitness_statistics(fitness_P: np.ndarray, tokens_PxT1: np.ndarray) -> Statistics:
    """What a step's statistics have beside those of scores, under the estimator `weight`."""
    wide = fitness_P.astype(np.int64)
    inputs = np.sort(tokens_PxT1[:, :-1], axis=1)
    return {
        "square": np.sum(wide * wide),
        "saturated": np.sum(np.abs(wide) == 3 * FITNESS_UNIT, dtype=np.int64),
        "seen": np.int64(len(inputs)) + np.sum(np.diff(inputs, axis=1) != 0, dtype=np.int64),
    }


def _split(joined: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Arrays of these shapes from one behind another."""
    parts, begin = [], 0
    for shape in shapes:
        end = begin + math.prod(shape)
        parts.append(joined[begin:end].reshape(shape))
        begin = end
    return parts
