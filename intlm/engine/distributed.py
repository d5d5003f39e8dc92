"""One process's part of a population that is spread over many.

Each process evaluates its own pairs; votes and statistics are summed over all processes, and everything else
happens in each of them alike. Integers add in any order, so that the number of processes changes no bit.
"""

import math
from collections.abc import Callable

import numpy as np

from intlm.eggroll import Scales, Statistics, Votes
from intlm.engine.engine import Engine
from intlm.fixedpoint import Array
from intlm.model import Parameters

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
        self, engine: Engine, total: Callable[[np.ndarray], np.ndarray], first_pair: int, pairs: int
    ):
        """total: int32 [n] to its sum over all processes; first_pair: of this process; pairs: of all of them."""
        self.name = engine.name
        self.engine, self.first_pair, self.pairs = engine, first_pair, pairs
        self.advance, self.forward, self.compile = engine.advance, engine.forward, engine.compile
        self.fitness_votes = engine.fitness_votes
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
        made, statistics, after = self.engine.population_step(
            parameters, key, scales, tokens_PxT1, state_PxLxD, self.first_pair + first_pair, votes
        )
        names = sorted(made)
        parts = [np.asarray(made[name]) for name in names]
        fitness = statistics.pop("fitness", None)
        if fitness is not None:
            # A sum in which each process has the places of its own pairs.
            places = np.zeros(self.pairs, np.int32)
            begin = self.first_pair + first_pair
            places[begin : begin + len(fitness)] = fitness
            parts.append(places)
        sums = {name: np.asarray(statistics[name], np.int64) for name in sorted(statistics)}
        limbs = to_limbs(np.concatenate([value.reshape(-1) for value in sums.values()]))
        summed = self._total(np.concatenate([*(part.reshape(-1) for part in parts), limbs]))
        added = _split(summed[: -limbs.size], [part.shape for part in parts])
        totals = dict(
            zip(
                sums, _split(from_limbs(summed[-limbs.size :]), [v.shape for v in sums.values()]), strict=True
            )
        )
        if fitness is not None:
            totals["fitness"] = added.pop().astype(np.int8)
        return dict(zip(names, added, strict=True)), totals, after


def _split(joined: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Arrays of these shapes from one behind another."""
    parts, begin = [], 0
    for shape in shapes:
        end = begin + math.prod(shape)
        parts.append(joined[begin:end].reshape(shape))
        begin = end
    return parts
