"""One Hypothesis profile for all tests, fast compilation for those that compile, and interrupts that arrive."""

import os
import signal

from hypothesis import HealthCheck, settings

# Integers come out the same at any level of optimisation, and the programs here are compiled once and run
# for milliseconds. Set XLA_FLAGS (to nothing, say) to test another level.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

settings.register_profile(
    "intlm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("intlm")

# A shell starts what runs in the background with interrupts ignored, and commands that tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
