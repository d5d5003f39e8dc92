"""The command `intlm`: the face of the package, and the only module here that imports the rooms above.

Every subcommand is a parser and a short function; what they do lives in `train` and `eval`. Imports that cost
time wait until a command needs them.
"""

import argparse
import io
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from intlm.errors import InputError, unknown

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 130


# What the numbers of a command line are held to, so that none asks for more memory than there can be.
LARGEST_COUNT = 1 << 16
LARGEST_LENGTH = (1 << 31) - 1

# JAX has one exception for all that goes wrong in it. These two a person can put right.
CURABLE = ("RESOURCE_EXHAUSTED", "Unable to initialize backend")


class _Parser(argparse.ArgumentParser):
    """One line for a bad command line, and exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def print_help(self, file: Any = None) -> None:
        _write(self.format_help())

    @property
    def flags(self) -> list[str]:
        """Every flag, for suggestions."""
        return list(self._option_string_actions)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, where there is something to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is False or action.default in (None, "", []):
            return action.help
        return super()._get_help_string(action)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code is 0, 1 (a float found by `audit`), 2 (bad input) or 130."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Python's own handler raises, which inside of JAX is lost or ends in a crash. Only training has
        # something to finish first, and takes the signal over.
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    _prepare_streams()
    try:
        parsed = _parse(words)
        result: int = parsed.command(parsed)
        return result
    except InputError as error:
        return _refuse(str(error))
    except MemoryError as error:
        return _refuse(f"not enough memory: {error or 'an allocation failed'}")
    except RuntimeError as error:
        if not str(error).startswith(CURABLE):
            raise
        return _refuse(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone: nobody is left to tell.
        return DONE


def _refuse(message: str) -> int:
    # One line, whatever a file name or a library put into the message.
    print("intlm:", " ".join(message.splitlines()), file=sys.stderr)
    return BAD_INPUT


def _prepare_streams() -> None:
    """Make the standard streams safe to write to."""
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        if getattr(sys, name) is None:
            # Closed by whoever started us. The null device takes the lowest free number, which is this
            # stream's, before a checkpoint does and is written into.
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 lacks most characters


def _write(text: str) -> None:
    """Put `text` on standard output at once. Raises InputError where that is full."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        # What could not be written is still in the buffer: Python would try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise InputError(f"standard output: {error.strerror or error}") from error


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="intlm", description="Pretrain language models with integers only.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    known = {
        "train": _add_train,
        "sample": _add_sample,
        "eval": _add_eval,
        "audit": _add_audit,
        "bench": _add_bench,
    }
    # argparse would list the commands without naming the nearest.
    if words and not words[0].startswith("-") and words[0] not in known:
        raise unknown("command", words[0], known)
    helped = bool({"-h", "--help"} & set(words))
    for name, add in known.items():
        add(commands, name, describe=helped and words[:1] == [name])
    parsed, rest = parser.parse_known_args(words)
    if rest:
        command = commands.choices[words[0]]
        flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
        if not flags:
            command.error(f"one argument too many: {rest[0]!r}")
        raise unknown(f"{command.prog}: flag", flags[0], command.flags)
    return parsed


def _add_train(commands: Any, name: str, describe: bool) -> None:
    epilog = ""
    if describe:
        from train.config import describe_keys

        width = shutil.get_terminal_size().columns - 2
        epilog = f"keys of --set, with the defaults of the preset small:\n{describe_keys(width)}"
    command = commands.add_parser(
        name,
        formatter_class=_Help,
        epilog=epilog,
        help="train a model, or go on with a run",
        description="Train a model. The same command on an existing run resumes it, to the same bits.",
    )
    add = command.add_argument
    add("preset", nargs="?", metavar="PRESET", help="tiny, small, medium or paper (default: small)")
    add(
        "--data",
        metavar="CORPUS",
        help="'stdlib', or a file, directory or glob of text or JSON lines (default: stdlib)",
        default=argparse.SUPPRESS,
    )
    add(
        "--held-out",
        metavar="CORPUS",
        help="text to evaluate on (default: a part of --data)",
        default=argparse.SUPPRESS,
    )
    add(
        "--text-field",
        metavar="FIELD",
        help="field of a JSON line with the text (default: text)",
        default=argparse.SUPPRESS,
    )
    add(
        "--run",
        metavar="NAME",
        help="run directory, below runs/ unless it has a slash (default: the preset's name)",
        default=argparse.SUPPRESS,
    )
    add(
        "--steps",
        type=_integer("--steps"),
        metavar="N",
        help="length of the run in steps",
        default=argparse.SUPPRESS,
    )
    add(
        "--minutes",
        metavar="M",
        help="length of the run in minutes; turned into steps at the start (default: 5)",
        default=argparse.SUPPRESS,
    )
    add(
        "--set",
        dest="settings",
        action="append",
        metavar="KEY=VALUE",
        help="change a key of the configuration; may be given again",
        default=[],
    )
    _add_engine(add)
    add(
        "--chunk",
        type=_integer("--chunk"),
        default=0,
        metavar="PAIRS",
        help="pairs evaluated at once; changes memory and speed, never the result; 0 chooses",
    )
    add(
        "--evaluate-every",
        type=_integer("--evaluate-every"),
        default=0,
        metavar="STEPS",
        help="steps between evaluations; 0 makes 20 a run",
    )
    add(
        "--checkpoint-every",
        type=_integer("--checkpoint-every"),
        default=0,
        metavar="STEPS",
        help="steps between checkpoints; 0 makes 20 a run",
    )
    add("--keep", type=_integer("--keep"), default=3, metavar="COUNT", help="newest checkpoints to keep")
    command.set_defaults(command=_train)


def _add_sample(commands: Any, name: str, describe: bool) -> None:
    command = commands.add_parser(
        name, formatter_class=_Help, help="write text with a model", description="Sample text from a run."
    )
    add = command.add_argument
    add("run", metavar="RUN", help="name of a run, its directory, or one of its checkpoints")
    add("--prompt", default="", metavar="TEXT", help="text to go on from; - reads standard input")
    add("--prompt-file", metavar="PATH", help="read the prompt from a file")
    add("--tokens", type=_integer("--tokens"), default=512, metavar="N", help="tokens to write")
    add(
        "--temperature",
        default="0.8",
        metavar="X",
        help="above 1 wilder, below 1 safer; 0 takes the likeliest",
    )
    add(
        "--top-k",
        type=_integer("--top-k"),
        default=0,
        metavar="K",
        help="only the K likeliest tokens; 0 keeps all",
    )
    add("--top-p", default="1.0", metavar="P", help="only the likeliest tokens that make up this share")
    add(
        "--min-p",
        default="0.0",
        metavar="P",
        help="only tokens at least this likely, relative to the likeliest",
    )
    add(
        "--seed",
        type=_integer("--seed"),
        default=0,
        metavar="N",
        help="seed: the same one, the same text, on every engine",
    )
    add("--count", type=_integer("--count"), default=1, metavar="N", help="samples to write")
    _add_engine(add)
    command.set_defaults(command=_sample)


def _add_eval(commands: Any, name: str, describe: bool) -> None:
    command = commands.add_parser(
        name,
        formatter_class=_Help,
        help="bits per byte of held-out text, beside n-grams, gzip and xz",
        description="Score a run's held-out text, or another corpus.",
    )
    command.add_argument("run", metavar="RUN", help="name of a run, its directory, or one of its checkpoints")
    command.add_argument(
        "--data",
        metavar="CORPUS",
        default=argparse.SUPPRESS,
        help="score all of this text instead (default: the run's held-out text)",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_engine(command.add_argument)
    command.set_defaults(command=_eval)


def _add_audit(commands: Any, name: str, describe: bool) -> None:
    command = commands.add_parser(
        name,
        formatter_class=_Help,
        help="list every operation of the training step; fail on a float",
        description="Trace the training step and the sampler and list every operation with its dtypes. "
        "Exit code 1 if any value is a float.",
    )
    command.add_argument("what", nargs="?", default="small", metavar="PRESET|RUN", help="what to trace")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(command=_audit)


def _add_bench(commands: Any, name: str, describe: bool) -> None:
    command = commands.add_parser(
        name,
        formatter_class=_Help,
        help="throughput of the engines, in one run",
        description="Measure member-tokens/s of training, evaluation and plain inference, engine by engine.",
    )
    add = command.add_argument
    add("preset", nargs="?", default="small", metavar="PRESET", help="tiny, small, medium or paper")
    add(
        "--engine",
        dest="engines",
        action="append",
        metavar="NAME",
        help="an engine to measure; may be given again (default: xla, and native where there is one)",
    )
    add("--population", dest="populations", action="append", type=_integer("--population"), metavar="N",
        help="a population to measure with; may be given again (default: the preset's)")  # fmt: skip
    add("--set", dest="settings", action="append", metavar="KEY=VALUE", help="as for train", default=[])
    add("--seconds", type=_integer("--seconds"), default=2, metavar="S", help="seconds a figure and round")
    add("--json", action="store_true", help="print JSON")
    command.set_defaults(command=_bench)


def _add_engine(add: Any) -> None:
    add(
        "--engine",
        default="auto",
        metavar="NAME",
        help="auto, native, xla or reference; all give the same bits",
    )


def _integer(flag: str) -> Any:
    def convert(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{flag} {text}: expected an integer") from None

    return convert


def _train(parsed: argparse.Namespace) -> int:
    from intlm.engine.native import why_not_fast
    from train.job import Request, prepare
    from train.loop import StopSignal, train
    from train.report import Report

    words = {name: value for name, value in vars(parsed).items() if name != "command"}
    words["settings"] = tuple(words["settings"])
    terminal = sys.stderr.isatty()

    def say(line: str) -> None:
        if terminal:
            print(line, file=sys.stderr)

    with StopSignal() as stop:
        job = prepare(Request(**words), say)
        config = job.config
        verb = "resuming" if job.resumed else "training"
        say(
            f"{verb} {job.run.directory}: {config.model.weights:,} weights, population "
            f"{config.eggroll.population:,}, segments of {config.eggroll.segment} tokens, engine "
            f"{job.engine.name}; {sum(map(len, job.text.train)):,} bytes of text in {len(job.text.train):,} "
            f"documents, {sum(map(len, job.text.held_out)):,} held out"
        )
        if parsed.engine == "auto" and job.engine.name != "native":
            print(f"intlm: {why_not_fast()}", file=sys.stderr)
        if job.state.step >= config.steps:
            _write(
                f"{job.run.directory}: done already, {config.steps} steps; a new run needs another --run\n"
            )
            return DONE
        with job.run.locked(), Report(job) as report:
            state = train(job, report, stop)
    left = f"{job.run.directory}: step {state.step} of {config.steps}"
    if state.step < config.steps:
        print(f"{left}; interrupted, and resumed by the same command", file=sys.stderr)
        return INTERRUPTED
    bits = f"{report.held_out:.3f} bits per byte held out" if report.held_out is not None else "no evaluation"
    _write(f"{left}; {bits}; try: intlm sample {_spoken(job.run.directory)}\n")
    return DONE


def _spoken(directory: Path) -> str:
    """How a person would name this run on the command line."""
    return shlex.quote(directory.name if directory.parent == Path("runs") else str(directory))


def _sample(parsed: argparse.Namespace) -> int:
    import numpy as np

    from eval.sampling import Sampler, SamplingConfig, Utf8Stream, fixed
    from intlm.engine.engine import make_engine
    from train.job import load_model
    from train.run import find_checkpoint

    for flag, largest in (("tokens", LARGEST_LENGTH), ("count", LARGEST_COUNT)):
        if not 1 <= getattr(parsed, flag) <= largest:
            raise InputError(f"--{flag} {getattr(parsed, flag)}: must be from 1 to {largest}")
    sampling = SamplingConfig(
        fixed(parsed.temperature, 8, "--temperature", 256),
        parsed.top_k,
        fixed(parsed.top_p, 16, "--top-p", 1),
        fixed(parsed.min_p, 16, "--min-p", 1),
        parsed.seed,
    )
    prompt = _prompt(parsed)
    config, tokenizer, parameters, _ = load_model(*find_checkpoint(parsed.run))
    engine = make_engine(parsed.engine, config.model, config.eggroll)
    tokens = np.concatenate([[tokenizer.separator], tokenizer.encode(prompt)])
    sampler = Sampler(engine, config.model, parameters, sampling)
    drawn = sampler.tokens(tokens, parsed.count, parsed.tokens)
    if parsed.count == 1:
        stream = Utf8Stream()
        _write(stream.feed(prompt))
        for tokens_1xT in drawn:
            _write(stream.feed(tokenizer.decode(tokens_1xT[0])))
        _write(stream.end() + "\n")
        return DONE
    samples = np.concatenate(list(drawn), axis=1)
    for number, sample in enumerate(samples, 1):
        stream = Utf8Stream()
        text = stream.feed(prompt + tokenizer.decode(sample)) + stream.end()
        _write(f"--- sample {number} of {parsed.count} ---\n{text}\n")
    return DONE


def _prompt(parsed: argparse.Namespace) -> bytes:
    if parsed.prompt and parsed.prompt_file is not None:
        raise InputError("--prompt and --prompt-file: give one of the two")
    if parsed.prompt_file is not None:
        try:
            return Path(parsed.prompt_file).read_bytes()
        except OSError as error:
            raise InputError(f"--prompt-file {parsed.prompt_file}: {error.strerror}") from error
    if parsed.prompt == "-":
        return sys.stdin.buffer.read()
    return os.fsencode(parsed.prompt)


def _eval(parsed: argparse.Namespace) -> int:
    from eval.report import evaluate
    from intlm.engine.engine import make_engine
    from train.job import load_model
    from train.run import find_checkpoint

    run, path = find_checkpoint(parsed.run)
    config, tokenizer, parameters, meta = load_model(run, path)
    engine = make_engine(parsed.engine, config.model, config.eggroll)
    data = getattr(parsed, "data", None)
    result = evaluate(run.name, meta["step"], config, engine, parameters, tokenizer, data, meta["corpus"])
    _write((json.dumps(result.as_dict(), indent=2) if parsed.json else result.table()) + "\n")
    return DONE


def _audit(parsed: argparse.Namespace) -> int:
    from eval.sampling import SamplingConfig, draw
    from intlm.audit import audit, table
    from train.config import PRESETS, RunConfig, TextConfig, resolve_config
    from train.run import Run, resolve

    if parsed.what in PRESETS:
        config = resolve_config(parsed.what, (), TextConfig(), 256)
    else:
        try:
            run = Run.open(resolve(parsed.what))
        except InputError as error:
            raise InputError(f"{error} (or a preset: {', '.join(PRESETS)})") from None
        config = RunConfig.from_dict(run.config, str(run.directory / "config.json"))
    sampling = SamplingConfig(top_k=40, top_p=60000, min_p=1000)
    found = audit(config.model, config.eggroll, lambda *values: draw(sampling, *values))
    floats = sum(count for operation, count in found.items() if operation.has_float)
    if parsed.json:
        rows = [vars(operation) | {"count": count} for operation, count in found.items()]
        _write(json.dumps({"floats": floats, "operations": rows}, indent=2) + "\n")
    else:
        _write(f"{table(found)}\n{sum(found.values()):,} operations, {floats} with a float\n")
    return 1 if floats else DONE


def _bench(parsed: argparse.Namespace) -> int:
    from eval.throughput import measure, table
    from intlm.engine.native import available_isas
    from train.config import TextConfig, resolve_config

    config = resolve_config(parsed.preset, parsed.settings, TextConfig(), 256)
    if not 0 <= parsed.seconds <= 3600:
        raise InputError(f"--seconds {parsed.seconds}: must be from 0 to 3600")
    engines = parsed.engines or (["native"] if available_isas() else []) + ["xla"]
    populations = parsed.populations or [config.eggroll.population]

    def say(line: str) -> None:
        if sys.stderr.isatty():
            print(line, file=sys.stderr)

    results = measure(config.model, config.eggroll, engines, populations, parsed.seconds, say)
    if parsed.json:
        _write(json.dumps([result.as_dict() for result in results], indent=2) + "\n")
    else:
        _write(table(results) + "\n")
    return DONE
