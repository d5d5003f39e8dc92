"""A run in memory: masters, recurrent states, scales and the step, and how one step leads to the next."""

from dataclasses import dataclass

import numpy as np

from intlm import eggroll, model, noise, whitening
from intlm.config import EggrollConfig, ModelConfig
from intlm.eggroll import Scales, Statistics
from intlm.engine.engine import Engine
from intlm.fixedpoint import Array
from intlm.whitening import Whitening

FIRST_MEASUREMENTS = 8
"""Dry evaluations at most before the first step, until the scales of B stand still."""


@dataclass(frozen=True)
class EvolutionState:
    """All that a step reads and writes. Arrays are as the engine keeps them.

    masters: int16 by parameter name; head_bias: int16 [V]; recurrent: int8 [P, L, D], one state a pair;
    scales: int32, from the step before; whitening: see `Whitening`; step: steps done.
    """

    masters: dict[str, Array]
    head_bias: Array
    recurrent: Array
    scales: Scales
    whitening: Whitening
    step: int = 0


def initial(model_config: ModelConfig, config: EggrollConfig, counts_V: np.ndarray) -> EvolutionState:
    """The state before the first step. counts_V: how often each token occurs in the training text."""
    return EvolutionState(
        model.initial_masters(model_config, noise.seed_key(config.seed)),
        model.head_bias(counts_V),
        model.initial_state(model_config, config.pairs),
        eggroll.first_scales(config, model_config),
        whitening.initial(model_config) if config.whitens else {},
    )


def zeros(model_config: ModelConfig, config: EggrollConfig) -> EvolutionState:
    """A state of nothing but zeros: the shapes and dtypes, without the noise of `initial` and without memory.

    Each array is a single zero that cannot be written to, whatever sizes a configuration from a file has.
    """

    def nothing(dtype: type, *shape: int) -> np.ndarray:
        return np.broadcast_to(dtype(0), shape)

    return EvolutionState(
        {name: nothing(np.int16, *shape) for name, shape in model.shapes(model_config).items()},
        nothing(np.int16, model_config.vocabulary),
        nothing(np.int8, config.pairs, model_config.layers, model_config.width),
        eggroll.first_scales(config, model_config),
        {
            name: nothing(dtype, *shape)
            for name, (shape, dtype) in whitening.arrays(model_config).items()
            if config.whitens
        },
    )


class Evolution:
    """Steps a state through a run of `steps` steps on an engine."""

    def __init__(self, engine: Engine, model_config: ModelConfig, config: EggrollConfig, steps: int):
        self.engine, self.model, self.config, self.steps = engine, model_config, config, steps
        self._root = noise.seed_key(config.seed)
        self._parameters = engine.compile(model.parameters)
        self._next_scales = engine.compile(lambda *values: eggroll.next_scales(config, model_config, *values))
        self._weights_of: tuple[dict[str, Array], model.Parameters] | None = None
        self._next_key: tuple[int, Array] | None = None

    def parameters(self, masters: dict[str, Array], head_bias: Array) -> model.Parameters:
        """The int8 weights of `masters`, and the head bias: made with the masters, where a step made those."""
        if self._weights_of is None or self._weights_of[0] is not masters:
            self._weights_of = masters, self._parameters(masters, head_bias)
        return self._weights_of[1]

    def step(self, state: EvolutionState, tokens_LxT1: np.ndarray) -> tuple[EvolutionState, Statistics]:
        """One step on one segment of every lane: int32 [lanes, T + 1].

        The statistics may still be on their way from the device; reading them waits for the step.
        """
        tokens = tokens_LxT1
        if self.config.pairs_per_lane > 1:
            tokens = np.repeat(tokens_LxT1, self.config.pairs_per_lane, axis=0)
        if self._next_key is None or self._next_key[0] != state.step:
            self._next_key = state.step, eggroll.step_key(self._root, np.uint32(state.step))
        key, parameters = self._next_key[1], self.parameters(state.masters, state.head_bias)
        scales = state.scales if state.step else self._measure(state, parameters, key, tokens)
        votes, statistics, recurrent = self.engine.population_step(
            parameters, key, scales, tokens, state.recurrent
        )
        size, quantile = eggroll.schedule(self.config, self.model, state.step, self.steps)
        step = state.step + 1
        masters, scales, known, parameters, key = self.engine.advance(
            state.masters, state.head_bias, votes, statistics, scales, state.whitening, np.int64(size),
            np.int64(quantile), self._root, np.uint32(step),
        )  # fmt: skip
        self._weights_of, self._next_key = (masters, parameters), (step, key)
        return EvolutionState(masters, state.head_bias, recurrent, scales, known, step), statistics

    def _measure(self, state: EvolutionState, parameters: Array, key: Array, tokens: np.ndarray) -> Scales:
        """Scales for the first step: from evaluations of its own segment that change nothing else."""
        scales = state.scales
        for _ in range(FIRST_MEASUREMENTS):
            before = scales
            _, statistics, _ = self.engine.population_step(parameters, key, before, tokens, state.recurrent)
            scales = self._next_scales(before, statistics)
            if all(np.array_equal(scales[name], before[name]) for name in scales):
                break
        return scales
