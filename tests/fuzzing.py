"""Hostile files for every loader: seeded mutations of valid ones, and a process that loads them within bounds.

`python tests/fuzzing.py HOME FIRST COUNT LOADER…` loads inputs FIRST to FIRST + COUNT - 1 (0: as many as in the
long form) of the files in HOME, see `make_home`, and prints what came of them, a JSON line each. An input is a
function of the loader's name and its number, so that a failure can be repeated.
"""

import copy
import faulthandler
import io
import json
import os
import re
import resource
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random as Source

import numpy as np
import sentencepiece
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from eval.sampling import SamplingConfig, draw_rule
from intlm import checkpoint, eggroll, model, noise
from intlm.cli import main
from intlm.engine.native import NativeEngine, available_isas
from intlm.engine.reference import ReferenceEngine
from intlm.errors import InputError
from intlm.evolution import zeros
from intlm.history import COUNTS, FRAME, frame, zstd
from tokenizer import SentencePieceTokenizer, load_tokenizer
from tokenizer.model_file import MOST_PIECES, _fields
from tokenizer.trainer import train
from train.config import RunConfig
from train.job import (
    Request,
    _read_baselines,
    kept_config,
    load_model,
    prepare,
    restore,
    write_checkout,
)
from train.metrics import MetricsFile, read_metrics
from train.replay import tracks
from train.run import Run
from train.text import load_text

MEMORY = 192 << 20
"""Bytes that loading and using an input may take beyond what the valid files took."""
LONGEST_INPUT = 1 << 20
SECONDS = 5
LONGEST_MESSAGE = 1000

RUN = Path("runs/good")
CHECKPOINT = RUN / "checkpoints/step-00000002.safetensors"

# --- mutations of bytes -------------------------------------------------------------------------------------

INTEGERS = [0, 1, 7, 8, 64, 127, 128, 255, 256, 4096, 8192, 1 << 24]
INTEGERS += [sign + (1 << bits) for bits in (15, 16, 31, 32, 53, 62, 63, 64) for sign in (-1, 0, 1)]


def mutated_bytes(source: Source, good: bytes, others: list[bytes]) -> bytes:
    """Flips, cuts, splices, extreme lengths, in any place or near the start."""
    content = bytearray(good)
    for _ in range(source.choice([1, 1, 1, 2, 4, 16, 64])):
        content += bytes(not content)
        place = source.choice([source.randrange(len(content)), source.randrange(min(len(content), 200))])
        size = source.choice([1, 2, 8, 64, 1024, source.randrange(1, len(content) + 1)])
        match source.randrange(10):
            case 0:
                content[place] ^= 1 << source.randrange(8)
            case 1:
                content[place] = source.choice([0, 1, 127, 128, 255, *b'"\\[]{}:,-0e\n\r'])
            case 2:
                del content[place : place + size]
            case 3:
                content[place:place] = source.randbytes(min(size, 1024))
            case 4:
                del content[place + 1 :]
            case 5:
                number = source.choice(INTEGERS) % (1 << 64)
                width = source.choice([1, 2, 4, 8])
                start = source.choice([0, place])
                content[start : start + width] = struct.pack("<Q", number)[:width]
            case 6:
                other = source.choice(others)
                start = source.randrange(len(other) + 1)
                content[place : place + size] = other[start : start + size]
            case 7:
                content[place:place] = content[place : place + size]
            case 8:
                content[place : place + size] = bytes([source.choice([0, 255, 32])]) * size
            case 9:
                content += source.randbytes(size) if size < 4096 else bytes(size)
        del content[LONGEST_INPUT:]
    return bytes(content)


# --- mutations of JSON --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """Text that stands in JSON as it is."""

    text: str


NASTY = [
    None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 1e300, "", "x", "1", "0", "nan", "bytes", "\0", "\n", "\ud800",
    "\x1b[31m", "x" * 100_000, "é\u2028", "../../x", [], {}, [[]], {"": {}}, [0], [0, 1], [1, 0], ["I8"],
    *INTEGERS, *(-number for number in INTEGERS), 10**30, 10**400,
    Raw("1e400"), Raw("-1e400"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("9" * 5000),
    Raw("1" + "0" * 999), Raw("-0"), Raw("01"), Raw("'x'"), Raw(""), Raw("[" * 100_000), Raw('{"a":' * 100_000),
    Raw('"\\ud800"'), Raw("[" * 40 + "]" * 40), Raw('{"a":' * 31 + "0" + "}" * 31), Raw("[" * 900 + "]" * 900),
    Raw("[" + "[]," * 50_000 + "0]"), Raw('{"a":1,"a":2}'), Raw('"' + "\\u0000" * 1000 + '"'), Raw('"\x00"'),
    Raw("{" + ",".join(f'"{i}":0' for i in range(20_000)) + "}"),
]  # fmt: skip


def nasty(source: Source) -> object:
    """A value of its own, which may be changed further."""
    return copy.deepcopy(source.choice(NASTY))


def dumped(value: object) -> bytes:
    """The JSON of a value in which `Raw` may stand."""
    raw: list[str] = []

    def keep(item: object) -> str:
        assert isinstance(item, Raw)
        raw.append(item.text)
        return f"@raw{len(raw) - 1}@"

    text = json.dumps(value, default=keep)
    text = re.sub('"@raw([0-9]+)@"', lambda match: raw[int(match[1])], text)
    return text.encode(errors="surrogatepass")


def mutated_value(source: Source, value: object) -> object:
    """A JSON value with some of its parts replaced, dropped, renamed, swapped or added."""
    value = json.loads(json.dumps(value, default=lambda raw: None))
    for _ in range(source.choice([1, 1, 1, 2, 3])):
        holders = [([value], 0)]
        for holder, key in holders:
            inner = holder[key]
            if isinstance(inner, dict):
                holders += [(inner, name) for name in inner]
            elif isinstance(inner, list):
                holders += [(inner, index) for index in range(len(inner))]
        holder, key = source.choice(holders[1:] or holders)
        match source.randrange(8):
            case 0 | 1 | 2 | 3:
                holder[key] = nasty(source)
            case 4:
                del holder[key]
            case 5 if isinstance(holder, dict):
                holder[source.choice(["", "x", key + key, "\ud800", "x" * 100_000, key.upper()])] = (
                    holder.pop(key)
                )
            case 6 if isinstance(holder, dict):
                holder[source.choice(["", "y", "\ud800", "x" * 100_000])] = nasty(source)
            case 7:
                other, at = source.choice(holders[1:] or holders)
                holder[key] = copy.deepcopy(other[at])
            case _:
                holder[key] = [holder[key]]
    return value


def mutated_json(source: Source, good: bytes, others: list[bytes]) -> bytes:
    if source.random() < 0.3:
        return mutated_bytes(source, good, others)
    try:
        value = json.loads(good)
        content = dumped(mutated_value(source, value))
    except (RecursionError, ValueError):  # a line that was mutated before
        return mutated_bytes(source, good, others)
    match source.randrange(12):
        case 0:  # the first key once more, at the end
            name = next(iter(value), "x")
            content = content.rstrip()[:-1] + b"," + json.dumps(name).encode() + b":0}"
        case 1:
            content = source.choice(
                [
                    b"\xef\xbb\xbf" + content,
                    content.decode("latin-1").encode("utf-16"),
                    b" " * 70_000 + content,
                ]
            )
    return content


def mutated_lines(source: Source, good: bytes, others: list[bytes]) -> bytes:
    """As JSON, a line of it."""
    if source.random() < 0.3:
        return mutated_bytes(source, good, others)
    lines = good.splitlines()
    for _ in range(source.choice([1, 1, 2, 5])):
        index = source.randrange(len(lines))
        lines[index] = mutated_json(source, lines[index], others)
        if source.random() < 0.2:
            source.shuffle(lines)
    return source.choice([b"\n", b"\n", b"\r\n", b"\r", b"\0"]).join(lines) + source.choice([b"", b"\n"])


# --- mutations of checkpoints -------------------------------------------------------------------------------


def header_of(content: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def file_of(header: object, data: bytes) -> bytes:
    text = dumped(header)
    return struct.pack("<Q", len(text)) + text + data


def signed(header: object, data: bytes) -> bytes:
    """A checkpoint file with the digest that its content has, where it can be read at all."""
    content = file_of(header, data)
    try:
        assert isinstance(header, dict)
        arrays = load_safetensors(content)
        header["__metadata__"]["sha256"] = checkpoint._digest(header["__metadata__"]["meta"], arrays)
    except (AssertionError, KeyError, OverflowError, SafetensorError, TypeError, ValueError):
        return content
    return file_of(header, data)


def mutated_header(source: Source, header: dict, data: bytes) -> tuple[object, bytes]:
    """Offsets that overlap, other dtypes, shapes of the same size and of others, arrays renamed and dropped."""
    names = [name for name in header if name != "__metadata__"]
    for _ in range(source.choice([1, 1, 2, 4])):
        name, other = source.choice(names), source.choice(names)
        if source.random() < 0.1:
            return mutated_value(source, header), data
        if name not in header or other not in header:
            continue
        entry, offsets = header[name], header[other]["data_offsets"]
        match source.randrange(8):
            case 0:
                entry["dtype"] = source.choice(
                    ["I8", "U8", "I16", "U16", "I64", "U64", "F32", "BF16", "F8_E4M3", "BOOL", "", 0]
                )
            case 1:
                entry["data_offsets"] = offsets
            case 2:
                entry["data_offsets"] = [nasty(source), nasty(source)]
            case 3:
                entry["data_offsets"] = [
                    end + source.choice([-2, -1, 0, 1]) for end in offsets if isinstance(end, int)
                ]
            case 4:
                shapes = ([], [0], [1], [1] * 65, [0, 1 << 63], [1 << 32, 1 << 32], [-1], [nasty(source)])
                entry["shape"] = source.choice([entry["shape"][::-1], [1, *entry["shape"]], *shapes])
            case 5:
                header[name + "x"] = header.pop(name)
            case 6:
                del header[name]
            case 7:
                new = "x" * source.choice([1, 100, 100_000])
                header[new] = {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}
    return header, data


LIMITS = (31, 127, 128, 2047, 32512, 32639, 32767, 1 << 28, (1 << 31) - 1)
EXTREMES = [0, *(sign * limit + more for limit in LIMITS for sign in (-1, 1) for more in (-1, 0, 1))]


def mutated_arrays(source: Source, header: dict, data: bytes) -> tuple[dict, bytes]:
    """Numbers at the ends of what is allowed, and beyond."""
    changed = bytearray(data)
    names = sorted(name for name in header if name != "__metadata__")
    # Half the time inside of what is allowed, so that a model of nothing but extremes is used.
    tame = source.random() < 0.5
    for _ in range(source.choice([1, 2, 4, 13])):
        name = source.choice(names)
        start, end = header[name]["data_offsets"]
        dtype = np.dtype({"I8": "i1", "I16": "<i2", "I32": "<i4"}[header[name]["dtype"]])
        values = np.frombuffer(changed, dtype, (end - start) // dtype.itemsize, start)
        limits = np.iinfo(dtype)
        if tame:
            low, high = {"I8": (-127, 127), "I16": (-32512, 32512), "I32": (0, 30)}[header[name]["dtype"]]
            own = {"head_bias": 2047, "whitening.inverse": 8191, "whitening.covariance": 1 << 30}
            if name in own:
                low, high = -own[name], own[name]
        else:
            low, high = limits.min, limits.max
        first = source.randrange(len(values))
        last = source.choice([first + 1, len(values)])
        rng = np.random.default_rng(source.randrange(1 << 32))
        match source.randrange(3):
            case 0:
                values[first:last] = min(max(source.choice(EXTREMES), low), high)
            case 1:
                values[first:last] = rng.choice(np.array([low, low, 0, high], dtype), last - first)
            case 2:
                values[first:last] = rng.integers(low, high, last - first, endpoint=True).astype(dtype)
    return header, bytes(changed)


def mutated_signed(source: Source, good: bytes, others: list[bytes]) -> bytes:
    """Past the digest: whatever is changed, the digest is that of the content."""
    header, data = header_of(good)
    kind = source.randrange(10)
    if kind == 0:
        return signed(*mutated_header(source, header, data))
    if kind > 3:
        return signed(*mutated_arrays(source, header, data))
    meta = mutated_value(source, json.loads(header["__metadata__"]["meta"]))
    header["__metadata__"]["meta"] = dumped(meta).decode(errors="replace")
    return signed(header, data)


def mutated_numbers(source: Source, good: bytes, others: list[bytes]) -> bytes:
    """A signed checkpoint in which nothing but its arrays' numbers is changed."""
    return signed(*mutated_arrays(source, *header_of(good)))


def mutated_position(source: Source, good: bytes, others: list[bytes]) -> bytes:
    """A checkpoint in which all but the lanes' position, and the text's digests, is as it was."""
    header, data = header_of(good)
    meta = json.loads(header["__metadata__"]["meta"])
    name = source.choice(["position", "position", "position", "text"])
    meta[name] = mutated_value(source, meta[name])
    header["__metadata__"]["meta"] = dumped(meta).decode(errors="replace")
    return signed(header, data)


def mutated_checkpoint(source: Source, good: bytes, others: list[bytes]) -> bytes:
    """Not signed."""
    if source.random() < 0.7:
        return mutated_bytes(source, good, others)
    return file_of(*mutated_header(source, *header_of(good)))


# --- mutations of the history -------------------------------------------------------------------------------


def mutated_history(source: Source, good: bytes, others: list[bytes]) -> bytes:
    """Records of other lengths, orders and contents, most with the checksum of what they hold."""
    if source.random() < 0.2:
        return mutated_bytes(source, good, others)
    records = []
    while good:
        size, _, step = FRAME.unpack_from(good)
        records.append((step, good[FRAME.size : FRAME.size + size]))
        good = good[FRAME.size + size :]
    framed = [frame(*record) for record in records]
    for _ in range(source.choice([1, 1, 2])):
        index = source.randrange(len(records))
        step, payload = records[index]
        match source.randrange(6):
            case 0:
                framed[index] = frame(source.choice(INTEGERS) % (1 << 64), payload)
            case 1:
                framed[index] = mutated_bytes(source, framed[index], others)
            case 2:
                source.shuffle(framed)
            case 3 if index:
                counts = list(COUNTS.unpack_from(payload))
                counts[source.randrange(4)] = source.choice(
                    [*INTEGERS, *(count + source.choice([-1, 1]) for count in counts)]
                ) % (1 << 32)
                framed[index] = frame(step, COUNTS.pack(*counts) + payload[COUNTS.size :])
            case 4 if index:
                # Packed again, so that what is inside of it is read.
                signs = COUNTS.size + (COUNTS.unpack_from(payload)[0] + 7) // 8
                inner = mutated_bytes(source, zstd.decompress(payload[signs:]), others)
                framed[index] = frame(step, payload[:signs] + zstd.compress(inner, 1))
            case _ if index:
                framed[index] = frame(step, mutated_bytes(source, payload, others))
            case _:
                framed[0] = frame(step, mutated_signed(source, payload, others))
    return b"".join(framed)


# --- mutations of SentencePiece's models --------------------------------------------------------------------


def varint(value: int) -> bytes:
    made = b""
    while value > 127:
        made += bytes([value & 127 | 128])
        value >>= 7
    return made + bytes([value])


def field_of(number: int, value: object, wire: int | None = None) -> bytes:
    """A field of Protocol Buffers: a number, or bytes."""
    if isinstance(value, int):
        return varint(number << 3 | (wire or 0)) + varint(value % (1 << 64))
    assert isinstance(value, bytes)
    size = b"" if wire in (1, 5) else varint(len(value))
    return varint(number << 3 | (2 if wire is None else wire)) + size + value


def mutated_fields(source: Source, content: bytes, others: list[bytes], depth: int = 0) -> bytes:
    fields = [(number, value, raw) for number, value, raw in _fields(content, 2 * MOST_PIECES)]
    raws = [raw for _, _, raw in fields]
    for _ in range(source.choice([1, 1, 2, 8])):
        if not raws:
            break
        # The settings stand at the end and are few.
        index = source.choice([source.randrange(len(raws)), max(0, len(raws) - 1 - source.randrange(4))])
        number, value, _ = fields[index]
        match source.randrange(9):
            case 0:
                raws[index] = b""
            case 1:
                most = LONGEST_INPUT // (len(raws[index]) + 1)
                raws[index] *= min(source.choice([2, 3, 1000]), most)
            case 2:
                other = source.randrange(len(raws))
                raws[index], raws[other] = raws[other], raws[index]
            case 3 if isinstance(value, int):
                raws[index] = field_of(number, source.choice([*range(8), *INTEGERS]))
            case 4 if isinstance(value, bytes) and len(value) == 4:
                score = source.choice([0.0, -1.0, 1e38, float("nan"), float("inf"), float("-inf")])
                raws[index] = field_of(number, struct.pack("<f", score), 5)
            case 5:
                raws[index] = field_of(number, source.choice([0, 1, b"", b"x" * 300, b"\xff", bytes(8)]))
            case 6 if isinstance(value, bytes):
                raws[index] = field_of(number, mutated_bytes(source, value, others))
            case 7:
                raws[index] = field_of(
                    source.choice([1, 2, 3, 4, 24, 35, 41, 46, 99]), source.choice([0, 1, 3, 1 << 31, b"<s>"])
                )
            case _ if isinstance(value, bytes) and depth < 2 and number < 5:
                try:
                    raws[index] = field_of(number, mutated_fields(source, value, others, depth + 1))
                except (ValueError, IndexError):
                    raws[index] = field_of(number, mutated_bytes(source, value, others))
            case _:
                raws[index] = mutated_bytes(source, raws[index], others)
    return b"".join(raws)[:LONGEST_INPUT]


def mutated_model(source: Source, good: bytes, others: list[bytes]) -> bytes:
    return (mutated_bytes if source.random() < 0.3 else mutated_fields)(source, good, others)


# --- what is done with each file ----------------------------------------------------------------------------

TEXTS = (b"def f(x):\n    return  x", "ﬁ½ \u3000 漢字".encode(), b"\xff\0\xe2\x96\x81", b"")


def use_model(config: RunConfig, parameters: dict, tokens: np.ndarray) -> None:
    """Sample and score, with native code where there is any, which has the bits of the definition."""
    reference = ReferenceEngine(config.model, config.eggroll)
    state = np.zeros((1, config.model.layers, config.model.width), np.int8)
    logits, after = reference.forward(parameters, tokens[None], state)
    assert np.abs(logits.astype(np.int32)).max() <= 2047 and np.abs(after.astype(np.int32)).max() <= 127
    if not available_isas():
        return
    native = NativeEngine(config.model, config.eggroll, threads=1)
    found, native_after = native.forward(parameters, tokens[None], state)
    assert np.array_equal(found, logits) and np.array_equal(native_after, after)
    rule = draw_rule(SamplingConfig(seed=1), config.model.vocabulary)
    for drawn in native.sample(parameters, tokens[:1], rule, 1, 3):
        assert drawn.min() >= 0 and drawn.max() < config.model.vocabulary


def use_state(run: Run, path: Path, config: RunConfig) -> None:
    """Take a step from the state, on two engines."""
    tokenizer = load_tokenizer(run.directory)
    state, _ = restore(path, config, tokenizer, zeros(config.model, config.eggroll))
    tokens = (
        np.arange(config.eggroll.lanes * (config.eggroll.segment + 1), dtype=np.int32)
        % config.model.vocabulary
    )
    tokens = tokens.reshape(config.eggroll.lanes, -1)
    parameters, key = (
        model.parameters(state.masters, state.head_bias),
        eggroll.step_key(noise.seed_key(0), np.uint32(state.step)),
    )
    engines = [ReferenceEngine(config.model, config.eggroll)]
    if available_isas():
        engines.append(NativeEngine(config.model, config.eggroll, threads=1))
    results = [
        engine.population_step(parameters, key, state.scales, tokens, state.recurrent) for engine in engines
    ]
    votes, statistics, recurrent = results[0]
    after = [
        engine.advance(
            state.masters, state.head_bias, votes, statistics, state.scales, state.whitening, np.int64(1 << 14),
            np.int64(1 << 8), noise.seed_key(0), np.uint32(32),
        )
        for engine in engines
    ]  # fmt: skip
    pairs = [(after[0][0], other[0]) for other in after[1:]] + [
        (after[0][2], other[2]) for other in after[1:]
    ]
    for other in results[1:]:
        assert np.array_equal(recurrent, other[2])
        pairs += [(votes, other[0]), (statistics, other[1])]
    for one, other in pairs:
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def load_checkpoint(path: Path) -> None:
    content = checkpoint.read(path)
    assert isinstance(content.meta, dict)


def load_signed(path: Path) -> None:
    config, _, parameters, meta = load_model(Run.open(RUN), [path])
    use_model(config, parameters, np.array([0, 65, 255, 1]))
    assert 0 <= meta["step"] <= config.steps


def load_state(path: Path) -> None:
    use_state(Run.open(RUN), path, RunConfig.from_dict(Run.open(RUN).config, ""))


def load_position(path: Path) -> None:
    job = prepare(Request(run="good", engine="reference"), lambda line: None)
    try:
        tokens = job.lanes.next_segment()
        assert tokens.shape == (job.config.eggroll.lanes, job.config.eggroll.segment + 1)
        json.dumps(job.lanes.position)
        assert all(float(value) >= 0 for value in job.lanes.progress().values())
    finally:
        job.lanes.close()
        for aside in path.parent.glob("*.damaged*"):  # then it went on from the checkpoint before
            aside.rmdir() if aside.is_dir() and not aside.is_symlink() else aside.unlink()


def load_history(path: Path) -> None:
    """The weights that it leads to are used as `intlm checkout` writes them."""
    run = Run.open(RUN)
    _, config = kept_config(run)
    engine = ReferenceEngine(config.model, config.eggroll)
    for reached, track in tracks(path, config, engine):
        step, parameters, meta = reached, track.parameters(), track.meta | {"step": reached}
    out = run.checkout_path(step)
    out.parent.mkdir(exist_ok=True)
    write_checkout(out, parameters, meta)
    config, _, parameters, _ = load_model(run, [out])
    use_model(config, parameters, np.array([0, 65, 255, 1]))


def load_config(path: Path) -> None:
    load_model(Run.open(RUN), [CHECKPOINT])


def load_config_and_checkpoint(path: Path) -> None:
    """With a checkpoint that says the same of itself."""
    good, run = checkpoint.read(CHECKPOINT), Run.open(RUN)
    said = RunConfig.from_dict(run.config, str(path)).shown()
    other = CHECKPOINT.with_name("other.safetensors")
    checkpoint.write(other, checkpoint.Checkpoint(good.arrays, good.meta | {"config": said}))
    config, _, parameters, _ = load_model(run, [other])
    use_model(config, parameters, np.array([0, 65, 255, 1]))


def load_data(path: Path) -> None:
    """Damaged fingerprints are as good as none: the text may have changed."""
    found = Run.open(RUN).fingerprints
    text = load_text(RunConfig.from_dict(Run.open(RUN).config, "").text)
    for line in text.changes(found, text.digests):
        assert "\n" not in line and len(line) < 3 * LONGEST_MESSAGE


def load_baselines(path: Path) -> None:
    """Damaged baselines are not shown."""
    for name, value in _read_baselines(path).items():
        assert name.isidentifier() and 0 <= float(value) < 1e19


def load_metrics(path: Path) -> None:
    before = read_metrics(path)
    with MetricsFile.open(path, 1) as metrics:
        metrics.append(2, loss=1)
    after = read_metrics(path)
    assert after == [values for values in before if values["step"] <= 1] + [{"step": 2, "loss": 1}]


def load_tokenizer_json(path: Path) -> None:
    load_tokenizer(path.parent)


def load_pieces(path: Path) -> None:
    tokenizer = SentencePieceTokenizer.read(path)
    lengths = tokenizer.byte_lengths()
    for text in TEXTS:
        tokens, aligned = tokenizer.encode_aligned(text)
        assert aligned.sum() == (len(text) if len(tokens) else 0)
        assert (tokens != 0).all() and (tokens < tokenizer.vocabulary).all()
        decoded = tokenizer.decode(tokens)
        assert tokenizer.loss or decoded == text
        assert len(decoded) == lengths[tokens].sum()


Mutation = Callable[[Source, bytes, list[bytes]], bytes]


@dataclass(frozen=True)
class Loader:
    """A kind of file. path: where it stands in the home; valid: further valid ones, by path.

    load: reads it and uses what it says; `InputError` that names the file, or one that is `blamed` as well, is
    the one way to refuse it. inputs: in the long form.
    """

    path: Path
    mutate: Mutation
    load: Callable[[Path], None]
    inputs: int
    valid: tuple[str, ...] = ()
    blamed: tuple[str, ...] = ()


LOADERS = {
    "checkpoint": Loader(CHECKPOINT, mutated_checkpoint, load_checkpoint, 20_000),
    "checkpoint, signed again": Loader(CHECKPOINT, mutated_signed, load_signed, 12_000),
    "its numbers": Loader(CHECKPOINT, mutated_numbers, load_state, 4_000),
    "its position": Loader(CHECKPOINT, mutated_position, load_position, 5_000, blamed=("text.txt",)),
    "history": Loader(
        RUN / "history/step-00000000.history", mutated_history, load_history, 8_000, blamed=("checkouts",)
    ),
    "config.json": Loader(RUN / "config.json", mutated_json, load_config, 15_000),
    "config.json and checkpoint": Loader(RUN / "config.json", mutated_json, load_config_and_checkpoint, 8_000,
        blamed=("other.safetensors",)),
    "data.json": Loader(RUN / "data.json", mutated_json, load_data, 5_000),
    "baselines.json": Loader(RUN / "baselines.json", mutated_json, load_baselines, 12_000),
    "metrics.jsonl": Loader(RUN / "metrics.jsonl", mutated_lines, load_metrics, 12_000),
    "tokenizer.json": Loader(Path("runs/pieces/tokenizer.json"), mutated_json, load_tokenizer_json, 12_000),
    "tokenizer.model": Loader(
        Path("pieces.model"), mutated_model, load_pieces, 10_000, ("folded.model", "unigram.model")
    ),
}  # fmt: skip
"""Another kind of file is one entry more."""


def make_home(home: Path) -> None:
    """Valid files of every kind, below the current directory, which is `home`."""
    words = Source(1).choices(("one", "two", "three", "four", "five"), k=1200)
    text = "\n".join(" ".join(words[i : i + 8]) for i in range(0, len(words), 8))
    (home / "text.txt").write_text(text)
    small = ["--set", "population=4", "--set", "segment=8", "--engine", "reference", "--steps", "2"]
    assert main(["train", "tiny", "--data", "text.txt", "--run", "good", *small]) == 0
    source = [(Path(os.__file__).with_name("textwrap.py")).read_bytes(), "Größe, δοκιμή ½ ﬁ\n".encode() * 20]
    for kind, name in (("bpe", "pieces"), ("unigram", "unigram")):
        (home / f"{name}.model").write_bytes(train(source, 600, kind).model)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(b"".join(source).splitlines()), model_writer=written, vocab_size=300,
        hard_vocab_limit=False, minloglevel=3,
    )  # fmt: skip
    (home / "folded.model").write_bytes(written.getvalue())
    SentencePieceTokenizer.read(home / "pieces.model").save(home / "runs/pieces")


def input_of(name: str, number: int, valid: list[bytes]) -> bytes:
    """Input number `number` of a loader, made of its valid files."""
    source = Source(f"{name} {number}")
    return LOADERS[name].mutate(source, source.choice(valid), valid)


# --- the process that loads them ----------------------------------------------------------------------------


def complaint(name: str, path: Path) -> str:
    """What is wrong with how an input was treated; "accepted" or "refused" where nothing is."""
    try:
        LOADERS[name].load(path)
    except InputError as error:
        text = str(error)
        named = any(word in text for word in (path.name, *LOADERS[name].blamed))
        if "\n" in text or len(text) > LONGEST_MESSAGE or not named or "memory" in text:
            return f"said: {text[:2000]!r} ({len(text)} characters)"
        return "refused"
    except BaseException:
        return traceback.format_exc()
    return "accepted"


def put(kind: str, path: Path) -> None:
    """Something else in the place of a file."""
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "holes":
            with path.open("wb") as file:
                file.truncate(1 << 42)
        case _:
            path.symlink_to(kind)


PLACES = ("pipe", "directory", "loop", "holes", "/dev/zero", "/dev/full", "/dev/tty", "/nowhere")


def memory(field: str) -> int:
    """`VmSize` (address space), `VmHWM` (the most that was in memory) or `VmRSS` of this process, in bytes."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) << 10


class Watched:
    """Loads what stands at a loader's place; too long a time ends the process."""

    def __init__(self, name: str):
        """Note the memory that this process has now; from now on there is `MEMORY` more."""
        self._name = name
        self.count = {"accepted": 0, "refused": 0}
        self.slowest = (0.0, "")
        self.failures: list[tuple[str, str]] = []
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + MEMORY, resource.RLIM_INFINITY))
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self._before = memory("VmRSS")

    def load(self, what: str) -> None:
        """Load it; `what` is what messages call it."""
        print(json.dumps(["now", self._name, what]), flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        started = time.perf_counter()
        found = complaint(self._name, LOADERS[self._name].path)
        self.slowest = max(self.slowest, (time.perf_counter() - started, what))
        faulthandler.cancel_dump_traceback_later()
        if found in self.count:
            self.count[found] += 1
        else:
            self.failures.append((what, found))

    def told(self) -> dict[str, object]:
        """What came of it; bytes and seconds."""
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        peak = max(0, memory("VmHWM") - self._before)
        return self.count | {"slowest": self.slowest, "peak": peak, "failures": self.failures[:10]}


def load_all(name: str, first: int, count: int) -> dict[str, object]:
    """Load inputs in the current directory, then what is no file."""
    loader = LOADERS[name]
    valid = [path.read_bytes() for path in (loader.path, *map(Path, loader.valid))]
    for content in valid:
        loader.path.write_bytes(content)
        if (found := complaint(name, loader.path)) != "accepted":
            raise AssertionError(f"{name}: a valid file was not accepted: {found}")
    watched = Watched(name)
    for number in range(first, first + count):
        loader.path.write_bytes(input_of(name, number, valid))
        watched.load(str(number))
    for kind in PLACES:
        put(kind, loader.path)
        watched.load(kind)
        if not loader.path.is_symlink() and loader.path.is_dir():
            loader.path.rmdir()
        loader.path.unlink(missing_ok=True)
        loader.path.write_bytes(valid[0])
    return watched.told()


if __name__ == "__main__":
    home, first, count, *names = sys.argv[1:]
    os.chdir(home)
    faulthandler.enable()
    for name in names:
        told = load_all(name, int(first), int(count) or LOADERS[name].inputs)
        print(json.dumps(["done", name, told]), flush=True)
