"""One Hypothesis profile for all tests, little compilation for those that compile, and interrupts that arrive."""

import atexit
import os
import shutil
import signal
import tempfile

from hypothesis import HealthCheck, settings

# Integers come out the same at any level of optimisation, and the programs here are compiled once and run
# for milliseconds. Set XLA_FLAGS (to nothing, say) to test another level.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# What one test has compiled, another need not compile again, in whatever process it runs. The first process of
# the tests makes the cache, and removes it. With a bound on its size JAX locks it, so that nobody reads a half.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="intlm-tests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(1 << 32),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

settings.register_profile(
    "intlm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("intlm")

# A shell starts what runs in the background with interrupts ignored, and commands that tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
