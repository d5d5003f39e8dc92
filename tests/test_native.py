"""The native engine gives the reference's bits, for every instruction set that this machine has."""

import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same, extremes, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engines import CASES, corruptions, inputs

from intlm.config import EggrollConfig, ModelConfig
from intlm.engine import native
from intlm.engine.engine import make_engine
from intlm.engine.reference import ReferenceEngine
from intlm.errors import InputError

ISAS = native.available_isas()

pytestmark = pytest.mark.skipif(
    not ISAS, reason="installed without a native engine: there was no C++ compiler"
)

cases = pytest.mark.parametrize("case", CASES)
isas = pytest.mark.parametrize("isa", ISAS)


@cache
def native_engine(case, isa, threads=2, chunk=0):
    config, eggroll_config, _ = CASES[case]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTLM_ISA", isa)
        return native.NativeEngine(config, eggroll_config, chunk, threads)


@cache
def reference(case):
    return ReferenceEngine(*CASES[case][:2])


@isas
@cases
@settings(max_examples=25)
@given(seed=seeds, corruption=corruptions, first_pair=st.sampled_from([0, 1, 5, 2**23 - 6]))
def test_population_step_gives_the_same_bits(case, isa, seed, corruption, first_pair):
    arguments = inputs(case, seed, corruption)
    expected = reference(case).population_step(*arguments, first_pair)
    assert_same(expected, native_engine(case, isa).population_step(*arguments, first_pair), case)


@isas
@cases
@settings(max_examples=15)
@given(seed=seeds, corruption=corruptions)
def test_forward_gives_the_same_bits(case, isa, seed, corruption):
    parameters, _, _, tokens, state = inputs(case, seed, corruption)
    engine = native_engine(case, isa)
    assert_same(reference(case).forward(parameters, tokens, state), engine.forward(parameters, tokens, state))
    assert_same(reference(case).score(parameters, tokens, state), engine.score(parameters, tokens, state))


def votes_of_fitness(engine, arguments, fitness, first_pair):
    _, key, _, tokens, _ = arguments
    votes = engine.fitness_votes(key, fitness, first_pair)
    return votes | {"embedding": engine.embedding_votes(key, fitness, tokens, first_pair)}


@isas
@pytest.mark.parametrize(
    "case", [case for case, (_, config, _) in CASES.items() if config.estimator == "weight"]
)
@settings(max_examples=25)
@given(seed=seeds, first_pair=st.sampled_from([0, 1, 5, 2**23 - 6]))
def test_votes_of_any_fitness_are_the_same(case, isa, seed, first_pair):
    arguments = inputs(case, seed, 0)
    fitness = extremes(np.random.default_rng(seed), (CASES[case][1].pairs,)).astype(np.int8)
    expected, found = (
        votes_of_fitness(engine, arguments, fitness, first_pair)
        for engine in (reference(case), native_engine(case, isa))
    )
    assert_same(expected, found, case)


@pytest.mark.parametrize("estimator", ["activation", "weight"])
def test_blocks_chunks_and_threads_change_nothing(estimator):
    # More pairs than a block holds, and a last block that is not full; more rows than a group in forward.
    config = ModelConfig(layers=1, vocabulary=70)
    eggroll_config = EggrollConfig(estimator=estimator, population=74, segment=9)
    CASES[f"many pairs, {estimator}"] = (config, eggroll_config, 0)
    try:
        arguments = inputs(f"many pairs, {estimator}", 3, 0)
    finally:
        del CASES[f"many pairs, {estimator}"]
    expected = ReferenceEngine(config, eggroll_config).population_step(*arguments)
    for chunk, threads in ((0, 1), (0, 2), (0, 5), (1, 2), (7, 1), (16, 2)):
        engine = native.NativeEngine(config, eggroll_config, chunk, threads)
        found = engine.population_step(*arguments)
        assert_same(expected, found, f"chunk {chunk}, threads {threads}")
        if estimator == "weight":
            assert_same(expected[0], votes_of_fitness(engine, arguments, found[1]["fitness"], 0))
    parameters, _, _, tokens, state = arguments
    for what in ("forward", "score"):
        expected, found = (
            getattr(made(config, eggroll_config), what)(parameters, tokens, state)
            for made in (ReferenceEngine, native.NativeEngine)
        )
        assert_same(expected, found, what)


def test_parameters_are_packed_again_when_they_are_others():
    case = "activation"
    engine = native_engine(case, ISAS[-1])
    for seed in (1, 2, 1):
        parameters, _, _, tokens, state = inputs(case, seed, 0)
        expected = reference(case).forward(parameters, tokens, state)
        assert_same(expected, engine.forward(parameters, tokens, state), f"seed {seed}")


def test_auto_takes_the_native_engine_where_it_is_fast(monkeypatch):
    config, eggroll_config, _ = CASES["activation"]
    monkeypatch.delenv("INTLM_ISA", raising=False)
    fast = make_engine("auto", config, eggroll_config).name
    assert fast == ("native" if native.is_fast() else "xla")
    monkeypatch.setattr(native, "library", lambda: None)
    assert make_engine("auto", config, eggroll_config).name == "xla"
    assert "C++ compiler" in native.why_not_fast()
    with pytest.raises(InputError, match="no C\\+\\+ compiler"):
        make_engine("native", config, eggroll_config)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("INTLM_ISA", "avx215")
    with pytest.raises(InputError, match="INTLM_ISA: unknown 'avx215'"):
        native.choose_isa()


AVX512 = [*[f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")], "-mbmi2"]


def build(folder, flags):
    """The library of the sources named in `flags`, each compiled with its flags; skips without a compiler."""
    compiler = shutil.which("g++") or pytest.skip("there is no g++")
    sources = Path(native.__file__).parent / "native"
    common = ["-std=c++17", "-fPIC", "-fwrapv", "-Wno-psabi", "-Og", "-pthread"]
    objects = []
    for name, own in flags.items():
        objects.append(str(folder / f"{name}.o"))
        command = [compiler, *common, *own, "-c", str(sources / f"{name}.cc"), "-o", objects[-1]]
        subprocess.run(command, check=True)
    library = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    sanitize = [flag for flag in next(iter(flags.values())) if flag.startswith("-fsanitize")]
    subprocess.run([compiler, "-shared", *sanitize, *objects, "-o", str(library), "-pthread"], check=True)
    return library


def compare_in_a_process(library, isa, environment, examples, sampler=True):
    """Runs the library beside the reference in a process of its own, which any error of memory ends."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from intlm.engine import native
native.__file__ = {str(library.parent / "native.py")!r}
import test_native as t
import test_native_sampling as s
import test_whitening as w
for config in s.MODELS.values() if {sampler} else ():
    for corruption in range(3):
        parameters = s.extreme_parameters(config, 1, corruption)
        for count in (2, 35):
            sampling = s.SamplingConfig(top_k=30, top_p=60000, seed=count)
            s.check(config, {isa!r}, parameters, sampling, [1, 0, 1], count, 9)
if {sampler}:
    s.test_nothing_overflows_at_the_largest_vocabulary({isa!r})
for case in t.CASES:
    for seed in range({examples}):
        arguments = t.inputs(case, seed, seed)
        expected = t.reference(case).population_step(*arguments, 5)
        engine = t.native_engine(case, {isa!r})
        t.assert_same(expected, engine.population_step(*arguments, 5), case)
        if "fitness" in expected[1]:
            found = t.votes_of_fitness(engine, arguments, expected[1]["fitness"], 5)
            t.assert_same(expected[0], found, case)
        parameters, _, _, tokens, state = arguments
        for what in ("forward", "score"):
            engines = t.reference(case), engine
            expected, found = (getattr(engine, what)(parameters, tokens, state) for engine in engines)
            t.assert_same(expected, found, case)
for shape in w.MODELS:
    for case in w.CONFIGS:
        for seed in range({examples}):
            w.check(shape, case, seed, 32, native.NativeEngine(w.MODELS[shape], w.CONFIGS[case], threads=2))
print("all agree")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "all agree" in done.stdout, done.stderr[-3000:]


EMULATED = "-DINTLM_EMULATED_TILES"
# The matmul of AMX, with its eight tile instructions in plain C++; without AVX512 all else is too.
TILES = "amx" if "avx512" in ISAS else "scalar"


def flags_of(isa, emulated, *every):
    """Of each source that an instruction set needs."""
    own = {"avx2": ["-mavx2"], "avx512": AVX512, "amx": AVX512}.get(isa, [])
    tiles = [EMULATED] if emulated else []
    others = [*every, *(tiles if isa == "amx" else [])]
    return {isa: [*every, *tiles, *own], "peak": others, "dispatch": others}


def test_tiles_give_the_same_bits_where_the_processor_has_none(tmp_path):
    library = build(tmp_path, flags_of(TILES, emulated=True))
    compare_in_a_process(library, TILES, {"INTLM_ISA": TILES}, 2, sampler=TILES == "amx")


SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]


@pytest.mark.long
@pytest.mark.parametrize("isa", [*[isa for isa in ISAS if isa != "amx"], "tiles"])
def test_under_the_address_and_undefined_behaviour_sanitizers(isa, tmp_path):
    """Tiles are emulated: sanitizers do not see what real ones read and write."""
    emulated, isa = isa == "tiles", TILES if isa == "tiles" else isa
    library = build(tmp_path, flags_of(isa, emulated, *SANITIZE))
    ask = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libubsan.so")]
    runtime = [
        subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip() for words in ask
    ]
    environment = {"LD_PRELOAD": ":".join(runtime), "ASAN_OPTIONS": "detect_leaks=0", "INTLM_ISA": isa}
    compare_in_a_process(library, isa, environment, 3)
