"""The XLA engine on several devices, and an engine's part of a population among several processes."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from test_evolution import CONFIGS, MODEL, contents, segments, start

from intlm import checkpoint, noise
from intlm.engine.distributed import DistributedEngine, from_limbs, share, to_limbs
from intlm.engine.engine import make_engine
from intlm.engine.native import available_isas
from intlm.evolution import Evolution

ENGINES = ["reference", "xla", *(["native"] if available_isas() else [])]
UNEVEN = {name: replace(config, population=22, pairs_per_lane=1) for name, config in CONFIGS.items()}
"""11 pairs divide into nothing."""


def evaluated(engine, config, rows=slice(None), kinds=(True, False)):
    """A step's evaluation of some pairs, with votes (True) and without (False)."""
    state = start(config)
    tokens, shape = segments(config)[0][rows], state.recurrent.shape
    recurrent = (np.arange(state.recurrent.size).reshape(shape).astype(np.int8) // 2)[rows]
    parameters = Evolution(engine, MODEL, config, 3).parameters(state.masters, state.head_bias)
    values = parameters, noise.seed_key(5), state.scales, tokens, recurrent, 0
    return jax.tree.map(np.asarray, [engine.population_step(*values, votes) for votes in kinds])


# --- devices ------------------------------------------------------------------------------------------------


def check_devices(estimator, count, kinds=(True,)):
    """What a process with several devices is asked to do."""
    from intlm.engine.xla import XlaEngine

    config = UNEVEN[estimator]
    found = evaluated(XlaEngine(MODEL, config, devices=jax.devices()[:count]), config, kinds=kinds)
    expected = evaluated(make_engine("reference", MODEL, config), config, kinds=kinds)
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


def check_checkpoint(estimator, count):
    """The bytes of a checkpoint after two steps on so many devices, and on the reference engine.

    What the first step has compiled serves the second.
    """
    from intlm.engine.xla import XlaEngine

    config, made, compiled = UNEVEN[estimator], [], []

    def listen(event, _, **__):
        compiled.extend([event] * ("backend_compile" in event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    for engine in (
        make_engine("reference", MODEL, config),
        XlaEngine(MODEL, config, devices=jax.devices()[:count]),
    ):
        evolution, state = Evolution(engine, MODEL, config, 3), start(config)
        for tokens in segments(config)[:2]:
            before = len(compiled)
            state, _ = evolution.step(state, tokens)
        assert len(compiled) == before
        made.append(b"".join(checkpoint.encode(checkpoint.Checkpoint(contents(state), {"step": 2}))))
    assert made[0] == made[1]
    assert compiled


def on_devices(*checks):
    """Run checks in a process with 8 devices: their number cannot be changed in this one."""
    script = "import sys, test_devices as t; [getattr(t, f)(*c) for f, *c in eval(sys.argv[1])]"
    flags = {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, repr(checks)], env=os.environ | flags, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()


COUNTS = (1, 2, 3, 4, 8)


def test_devices_change_no_bit():
    """One estimator or the other: each number of devices is compiled for anew."""
    estimators = ("weight", "weight", "activation", "weight", "activation")
    on_devices(*(("check_checkpoint", *which) for which in zip(estimators, COUNTS, strict=True)))


@pytest.mark.long
def test_devices_change_no_bit_of_any_estimator():
    on_devices(
        *(("check_devices", estimator, count, (True, False)) for estimator in CONFIGS for count in COUNTS)
    )


# --- processes ----------------------------------------------------------------------------------------------


def parts():
    for estimator, exchange in (("activation", "votes"), ("weight", "votes"), ("weight", "fitness")):
        for engine in ENGINES:
            # It compiles for each size of a part.
            slow = [pytest.mark.long] if engine == "xla" else []
            yield pytest.param(engine, estimator, exchange, marks=slow)


@pytest.mark.parametrize(("engine", "estimator", "exchange"), list(parts()))
def test_parts_of_a_population_add_up(engine, estimator, exchange):
    """Three processes, whose sums are made one after another: the first two calls only say what they have."""
    config, processes = UNEVEN[estimator], 3
    inner = make_engine(engine, MODEL, config)
    spoken, found = [[], []], []
    for process in range(2 * processes):
        first, count = share(config.lanes, processes, process % processes)
        calls = []

        def total(parts, process=process, calls=calls):
            values = np.concatenate(parts)
            calls.append(values)
            if process < processes:
                spoken[len(calls) - 1].append(values)
                return values
            return np.sum(spoken[len(calls) - 1], axis=0, dtype=np.int32)

        own = slice(first, first + count)
        found.append(evaluated(DistributedEngine(inner, total, first, config.pairs, exchange), config, own))
    expected = evaluated(make_engine("reference", MODEL, config), config)
    states = [np.concatenate([part[kind][2] for part in found[processes:]]) for kind in range(2)]
    for part in found[processes:]:
        for kind in range(2):
            assert_same(expected[kind][:2], part[kind][:2])
            assert_same(expected[kind][2], states[kind])


def test_a_run_of_one_process_of_one():
    config = CONFIGS["activation"]
    inner = make_engine("reference", MODEL, config)
    states = []
    for engine in (inner, DistributedEngine(inner, np.concatenate, 0, config.pairs)):
        evolution, state = Evolution(engine, MODEL, config, 3), start(config)
        for tokens in segments(config):
            state, _ = evolution.step(state, tokens)
        states.append(contents(state))
    assert_same(*states)


@given(st.integers(1, 100), st.data())
def test_shares_are_contiguous_and_even(lanes, data):
    processes = data.draw(st.integers(1, lanes))
    shares = [share(lanes, processes, process) for process in range(processes)]
    assert [first for first, _ in shares] == [sum(n for _, n in shares[:i]) for i in range(processes)]
    counts = [count for _, count in shares]
    assert sum(counts) == lanes
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.lists(st.integers(-(2**62), 2**62), min_size=3, max_size=3), min_size=1, max_size=9))
def test_sums_of_limbs_are_exact(rows):
    limbs = sum(to_limbs(np.array(row, np.int64)) for row in rows)
    assert limbs.dtype == np.int32
    exact = [(sum(column) + 2**63) % 2**64 - 2**63 for column in zip(*rows, strict=True)]
    assert from_limbs(limbs).tolist() == exact


def test_limbs_of_the_most_processes_do_not_overflow():
    from intlm.engine.distributed import LIMB_BITS, MOST_PROCESSES

    assert MOST_PROCESSES * ((1 << LIMB_BITS) - 1) < 1 << 31
