"""One process's part of a population that is spread over many.

Each process evaluates its own pairs; votes and statistics are summed over all processes, and everything else
happens in each of them alike. Integers add in any order, so that the number of processes changes no bit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from intlm.eggroll import Scales, Statistics, Votes
from intlm.engine.engine import Engine
from intlm.fixedpoint import Array, namespace
from intlm.model import Parameters

LIMB_BITS = 16
LIMBS = 4
MOST_PROCESSES = 1 << 15
"""Sums of so many limbs of 16 bits, each from 0 to 65535, stay inside of 31 bits."""


def share(lanes: int, processes: int, process: int) -> tuple[int, int]:
    """The first lane of a process, and how many it has: contiguous, and no two processes differ by more than 1.

    1 <= processes <= lanes, 0 <= process < processes.
    """
    each, more = divmod(lanes, processes)
    return process * each + min(process, more), each + (process < more)


def to_limbs(sums_N: Array) -> Array:
    """int64 [N] as int32 [N * 4]: limbs of 16 bits, 0 to 65535, the lowest first."""
    xp = namespace(sums_N)
    shifts = xp.arange(LIMBS, dtype=xp.int64) * LIMB_BITS
    return ((sums_N[:, None] >> shifts) & 0xFFFF).astype(xp.int32).reshape(-1)


def from_limbs(limbs: Array) -> Array:
    """int64 [N] from sums of limbs of up to `MOST_PROCESSES` processes: the exact sum, modulo 2**64."""
    xp = namespace(limbs)
    shifts = xp.arange(LIMBS, dtype=xp.int64) * LIMB_BITS
    return xp.sum(limbs.reshape(-1, LIMBS).astype(xp.int64) << shifts, axis=1, dtype=xp.int64)


class DistributedEngine:
    """An engine whose votes and statistics are those of the whole population.

    `population_step` takes the tokens and states of this process's pairs, and returns their states. All
    processes have to call it alike; the rest is the inner engine's.
    """

    def __init__(self, engine: Engine, total: Callable[[Array], Array], first_pair: int):
        """total: int32 [n] to its sum over all processes; first_pair: of the pairs of this process."""
        self.name = engine.name
        self.engine, self.first_pair = engine, first_pair
        self.advance, self.forward, self.compile = engine.advance, engine.forward, engine.compile
        self._total = total
        self._pack = engine.compile(_pack)
        self._unpack: dict[bool, Callable[..., Any]] = {}

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
        on_host = isinstance(statistics["score"], np.ndarray | np.generic)
        summed = self._total((_pack if on_host else self._pack)(made, statistics))
        if on_host:
            return *_unpack(made, statistics, np.asarray(summed)), after
        if votes not in self._unpack:
            shapes = {name: np.empty(value.shape, np.int8) for name, value in made.items()}
            sums = {name: np.empty(value.shape, np.int8) for name, value in statistics.items()}
            self._unpack[votes] = self.compile(partial(_unpack, shapes, sums))
        return *self._unpack[votes](summed), after


def _pack(votes: Votes, statistics: Statistics) -> Array:
    """All votes, and behind them the limbs of all statistics: int32 [n]."""
    xp = namespace(statistics["score"])
    sums = [xp.reshape(statistics[name], -1) for name in sorted(statistics)]
    parts = [xp.reshape(votes[name], -1) for name in sorted(votes)]
    return xp.concatenate([*parts, to_limbs(xp.concatenate(sums).astype(xp.int64))])


def _unpack(votes: Votes, statistics: Statistics, summed: Array) -> tuple[Votes, Statistics]:
    """The inverse of `_pack`, with the shapes of `votes` and `statistics`."""
    total, begin = {}, 0
    for name in sorted(votes):
        end = begin + int(np.prod(votes[name].shape))
        total[name] = summed[begin:end].reshape(votes[name].shape)
        begin = end
    sums, statistic = from_limbs(summed[begin:]), {}
    begin = 0
    for name in sorted(statistics):
        end = begin + int(np.prod(np.shape(statistics[name])))
        statistic[name] = sums[begin:end].reshape(np.shape(statistics[name]))
        begin = end
    return total, statistic
