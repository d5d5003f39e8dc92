"""What the model's units do on a piece of text: the int8 inputs of every matrix."""

import numpy as np

from intlm.config import ModelConfig
from intlm.engine.reference import token_step
from intlm.model import LAYER_MATRICES, Parameters, initial_state

_INPUTS = {
    "gate_input": "residual_normalized",
    "gate_recurrent": "state",
    "mlp_in": "mlp_input",
    "mlp_out": "mlp_hidden",
    "head": "output_normalized",
}


def activity(model: ModelConfig, parameters: Parameters, tokens_NxT: np.ndarray) -> dict[str, np.ndarray]:
    """Every value of the inputs of the matrices, by a name people know: int8, 1-D.

    parameters: NumPy arrays; tokens: int32 [N, T]. Layers are numbered: `layer0_state`.
    """
    seen: dict[str, list[np.ndarray]] = {}

    def watch(name: str, layer: int, x: np.ndarray) -> int:
        if name in _INPUTS:
            prefix = f"layer{layer}_" if name in LAYER_MATRICES else ""
            seen.setdefault(prefix + _INPUTS[name], []).append(x.reshape(-1))
        return 0

    state = initial_state(model, tokens_NxT.shape[0])
    for t in range(tokens_NxT.shape[1]):
        _, state = token_step(model, parameters, tokens_NxT[:, t], state, watch)
    return {name: np.concatenate(values) for name, values in seen.items()}
