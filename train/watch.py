"""Signs that a run goes wrong, in its own statistics, each with its likely cause and the knob to turn."""

from collections.abc import Mapping

from intlm.config import EggrollConfig, ModelConfig
from intlm.eggroll import first_step_size

WORSE_BITS = 0.5
"""Bits per byte of held-out text above the best so far, from which a run has clearly got worse."""
ABOVE_START_BITS = 0.1
"""The same above the model before its first step."""
SATURATED_TENTHS = 1
"""Tenths of a matrix at -127 or 127 that are too many."""
TIED_PERCENT = 99
FEWEST_COMPARISONS = 1000
"""Comparisons of pairs before anything is made of their ties."""
LARGEST_SIGMA = 5


class Watch:
    """Looks at what is handed to it. Each sign is told once, and again only when it has been gone."""

    def __init__(self, config: EggrollConfig, model: ModelConfig, steps: int):
        self._config, self._model, self._steps = config, model, steps
        self._told: set[str] = set()

    def scored(self, bits: float, best: float | None, start: float | None) -> list[str]:
        """What to tell of a held-out score in bits per byte; `best` and `start`: before this one, if known."""
        worse = best is not None and bits > best + WORSE_BITS
        above = start is not None and bits > start + ABOVE_START_BITS
        against = f"after {best:.3f} at best" if worse else f"{start or 0:.3f} before the first step"
        return self._sign(
            "score",
            worse or above,
            f"held-out text takes {bits:.3f} bits per byte, {against}: the steps are probably too large; "
            f"{self._smaller_steps()}",
        )

    def weighed(self, saturated: Mapping[str, tuple[int, int]]) -> list[str]:
        """What to tell of weights: by matrix, how many are at -127 or 127, and how many there are."""
        told = []
        for name, (count, size) in saturated.items():
            told += self._sign(
                f"weights {name}",
                10 * count >= SATURATED_TENTHS * size,
                f"{100 * count // size}% of the weights of {name} are at -127 or 127 and cannot grow: the steps "
                f"are probably too large; {self._smaller_steps()}",
            )
        return told

    def compared(self, ties: int, comparisons: int) -> list[str]:
        """What to tell of comparisons of two members of a pair, of which `ties` found no difference."""
        if comparisons < FEWEST_COMPARISONS:
            return []
        return self._sign(
            "ties",
            100 * ties >= TIED_PERCENT * comparisons,
            f"{100 * ties // comparisons}% of the comparisons find no difference between two members, so "
            "that nothing is learnt: the perturbations are probably too small; "
            f"{self._larger_perturbations()}",
        )

    def _sign(self, name: str, seen: bool, line: str) -> list[str]:
        if not seen:
            self._told.discard(name)
            return []
        if name in self._told:
            return []
        self._told.add(name)
        return [line]

    def _smaller_steps(self) -> str:
        if self._config.update == "threshold":
            name, now = "alpha", self._config.alpha
        else:
            # In 1/256 of an int8 step, as the key has it.
            name, now = "step_size", first_step_size(self._config, self._model, self._steps) >> 8
        return f"try a new run with --set {name}={max(1, now // 2)} (this one has {now})"

    def _larger_perturbations(self) -> str:
        config = self._config
        names = ["sigma_weight", "sigma_norm"]
        if config.estimator == "activation":
            names = ["sigma_mlp", "sigma_candidate", "sigma_gate", "sigma_embedding"]
        values = {name: getattr(config, name) for name in names if getattr(config, name) < LARGEST_SIGMA}
        if not values:
            return "try a new run with another --set seed"
        name = next(iter(values))
        return f"try a new run with --set {name}={values[name] + 1} (this one has {values[name]})"
