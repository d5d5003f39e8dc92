"""The command `intlm`: the face of the package, and the only module here that imports the rooms above.

Every subcommand is a parser and a short function; what they do lives in `train` and `eval`. Imports that cost
time wait until a command needs them.
"""

import argparse
import contextlib
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

RUN_HELP = (
    "name of a run, its directory, one of its checkpoints, RUN@STEP, or RUN@best (of the held-out text)"
)
DONE, DAMAGED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


# What the numbers of a command line are held to, so that none asks for more memory than there can be.
LARGEST_COUNT = 1 << 16
LARGEST_LENGTH = (1 << 31) - 1

TOKENIZER_COMMANDS = ("train", "encode", "decode", "inspect")

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
    """Run a command line; the exit code is 0, 1 (something was found), 2 (bad input), 3 (peer lost) or 130."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Python's own handler raises, which inside of JAX is lost or ends in a crash. Only training has
        # something to finish first, and takes the signal over. The trainer of tokenizers is one long call of a
        # library, in which no handler of Python's is run at all.
        leave = signal.SIG_DFL if words[:1] == ["tokenizer"] else lambda *_: os._exit(INTERRUPTED)
        signal.signal(signal.SIGINT, leave)
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
    # One line, whatever a file name or a library put into the message, and nothing that drives a terminal.
    line = " ".join(message.splitlines())
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    print("intlm:", shown, file=sys.stderr)
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
        "check": _add_check,
        "data": _add_data,
        "checkout": _add_checkout,
        "verify": _add_verify,
        "audit": _add_audit,
        "bench": _add_bench,
        "tokenizer": _add_tokenizer,
    }
    # argparse would list the commands without naming the nearest.
    for place, names in enumerate((known, TOKENIZER_COMMANDS if words[:1] == ["tokenizer"] else ())):
        if names and words[place:] and not words[place].startswith("-") and words[place] not in names:
            raise unknown(" ".join([*words[:place], "command"]), words[place], names)
    helped = bool({"-h", "--help"} & set(words))
    for name, add in known.items():
        add(commands, name, describe=helped and words[:1] == [name])
    parsed, rest = parser.parse_known_args(words)
    if rest:
        command = getattr(parsed, "parser", commands.choices[words[0]])
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
        action="append",
        metavar="CORPUS[=WEIGHT]",
        help="'stdlib'; a file, directory or glob of text, JSON lines, Parquet or Arrow, also compressed; a URL; "
        "or hf:NAME. Given again, a mixture whose bytes come in proportion to the weights, integers "
        "(default: stdlib)",
        default=[],
    )
    add(
        "--max-documents",
        type=_integer("--max-documents"),
        metavar="N",
        help="only the first N documents of each corpus (default: 0, all)",
        default=argparse.SUPPRESS,
    )
    add(
        "--accept-changed-data",
        action="store_true",
        help="go on with a run although its text has changed; what follows cannot be reproduced",
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
    add("--tokenizer", metavar="MODEL", default=argparse.SUPPRESS,
        help="'bytes', a .model file of SentencePiece, or the directory of a run (default: bytes)")  # fmt: skip
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
    add(
        "--keep",
        type=_integer("--keep"),
        default=3,
        metavar="COUNT",
        help="newest checkpoints to keep, and the best",
    )
    add(
        "--keep-every",
        type=_integer("--keep-every"),
        default=0,
        metavar="STEPS",
        help="keep the checkpoints of every so many steps for ever; 0 keeps none",
    )
    add("--history", type=_integer("--history"), default=1000, metavar="MB",
        help="disk in MB for the log from which the weights of every step can be rebuilt; beyond it, the oldest "
        "steps are dropped; 0 keeps none")  # fmt: skip
    _add_cluster(command.add_argument_group("several processes, see docs/clusters.md").add_argument)
    command.set_defaults(command=_train)


CLUSTER_FLAGS = ("coordinator", "processes", "process", "cluster", "wait", "lost_after", "exchange")


def _add_cluster(add: Any) -> None:
    add("--coordinator", metavar="HOST:PORT", default=argparse.SUPPRESS,
        help="where process 0 listens; the same for all processes")  # fmt: skip
    add("--processes", type=_integer("--processes"), metavar="N", default=argparse.SUPPRESS,
        help="how many there are; changes no bit of the result")  # fmt: skip
    add("--process", type=_integer("--process"), metavar="I", default=argparse.SUPPRESS,
        help="which one this is, from 0; process 0 alone writes the run")  # fmt: skip
    add("--cluster", metavar="LAUNCHER", default=argparse.SUPPRESS,
        help="take the three from slurm, ompi, k8s, mpi4py, or auto: whichever JAX finds")  # fmt: skip
    add("--exchange", metavar="WHAT", default=argparse.SUPPRESS,
        help="what processes send each other: votes; fitness (estimator=weight), from which each makes all votes "
        "itself; or auto, what takes less time here (default: auto); process 0's counts")  # fmt: skip
    add("--wait", type=_integer("--wait"), metavar="SECONDS", default=argparse.SUPPRESS,
        help="how long processes wait for each other at the start (default: 120)")  # fmt: skip
    add("--lost-after", type=_integer("--lost-after"), metavar="SECONDS", default=argparse.SUPPRESS,
        help="silence after which a process is lost and the others leave, exit code 3 (default: 20)")  # fmt: skip


def _add_sample(commands: Any, name: str, describe: bool) -> None:
    command = commands.add_parser(
        name,
        formatter_class=_Help,
        help="write text with a model",
        description="Sample text from a run. A blank line stands where the model ends a document.",
    )
    add = command.add_argument
    add("run", metavar="RUN", help=RUN_HELP)
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
    command.add_argument("run", metavar="RUN", help=RUN_HELP)
    command.add_argument(
        "--data",
        metavar="CORPUS",
        default=argparse.SUPPRESS,
        help="score all of this text instead (default: the run's held-out text)",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_engine(command.add_argument)
    command.set_defaults(command=_eval)


def _add_check(commands: Any, name: str, describe: bool) -> None:
    command = commands.add_parser(
        name,
        formatter_class=_Help,
        help="whether the files of a run are whole",
        description="Read every file of a run and verify it: checkpoints by digest, shapes and configuration.\n"
        "Exit code 1 if one is damaged. Nothing is changed.",
    )
    command.add_argument("run", metavar="RUN", help="name of a run, or its directory")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(command=_check)


def _add_data(commands: Any, name: str, describe: bool) -> None:
    command = commands.add_parser(
        name,
        formatter_class=_Help,
        help="what is in a corpus: sizes, lengths, n-grams, a few documents",
        description="Read a corpus, or each of a mixture, to its end and describe it.",
    )
    add = command.add_argument
    add("corpora", nargs="*", metavar="CORPUS[=WEIGHT]", help="as --data of train (default: stdlib)")
    add("--data", action="append", metavar="CORPUS[=WEIGHT]", default=[], help="a further corpus")
    add(
        "--text-field", metavar="FIELD", default="text", help="field of a JSON line, or column, with the text"
    )
    add("--max-documents", type=_integer("--max-documents"), metavar="N", default=0,
        help="only the first N documents of each corpus; 0 takes all")  # fmt: skip
    add("--tokenizer", metavar="MODEL", default="bytes",
        help="'bytes', a .model file of SentencePiece, or the directory of a run")  # fmt: skip
    add("--preset", default="small", metavar="PRESET", help="whose steps an epoch is counted in")
    add("--set", dest="settings", action="append", metavar="KEY=VALUE", default=[], help="as for train")
    add("--json", action="store_true", help="print JSON")
    command.set_defaults(command=_data)


def _add_checkout(commands: Any, name: str, describe: bool) -> None:
    command = commands.add_parser(
        name,
        formatter_class=_Help,
        help="write the weights of any step of a run",
        description="Rebuild the weights after a step from the run's history,\n"
        "and write them to a file that sample and eval take.",
    )
    add = command.add_argument
    add("run", metavar="RUN", help="name of a run, or its directory")
    add("--step", type=_integer("--step"), required=True, metavar="N", help="steps done")
    add("--out", metavar="PATH", help="file to write (default: checkouts/step-N.safetensors in the run)")
    _add_engine(add)
    command.set_defaults(command=_checkout)


def _add_verify(commands: Any, name: str, describe: bool) -> None:
    command = commands.add_parser(
        name,
        formatter_class=_Help,
        help="replay a run's history, and compare it with its checkpoints",
        description="Replay the history of a run from its first weights, which its seed gives,\n"
        "and compare what it leads to with each checkpoint.\n"
        "Exit code 1 if anything differs or is damaged.",
    )
    command.add_argument("run", metavar="RUN", help="name of a run, or its directory")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_engine(command.add_argument)
    command.set_defaults(command=_verify)


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
        description="Measure member-tokens/s of training, evaluation and plain inference, engine by engine,\n"
        "beside this processor's own int8 peak. docs/performance.md explains every figure.",
    )
    add = command.add_argument
    add("preset", nargs="?", default="small", metavar="PRESET",
        help="tiny, small, medium or paper; or data: the speed of reading and tokenizing text")  # fmt: skip
    add("--tokenizer", metavar="MODEL", default="bytes", help="of data: as for train")
    add(
        "--engine",
        dest="engines",
        action="append",
        metavar="NAME",
        help="an engine to measure; may be given again (default: xla, and native where there is one)",
    )
    add("--population", dest="populations", action="append", type=_integer("--population"), metavar="N",
        help="a population to measure with; may be given again (default: the preset's, and 4 and 16 times as "
        "many where a step of them is short)")  # fmt: skip
    add("--threads", dest="threads", action="append", type=_integer("--threads"), metavar="N",
        help="threads, and cores to hold the whole process to; may be given again (default: all cores that it "
        "may use)")  # fmt: skip
    add("--set", dest="settings", action="append", metavar="KEY=VALUE", default=[],
        help="as for train; estimator=NAME picks one (default: both, where the preset has both)")  # fmt: skip
    add("--seconds", default="0.25", metavar="S", help="seconds a figure and round, of five rounds")
    add("--full-rank", action="store_true",
        help="instead compare with full-rank evolution strategies: matrices for every member")  # fmt: skip
    add("--host", action="store_true",
        help="show what part of a training step is neither evaluation nor update instead")  # fmt: skip
    add("--safety", action="store_true",
        help="show what checkpoints and the history cost a run instead")  # fmt: skip
    add("--processes", type=_integer("--processes"), metavar="N",
        help="show what N processes on this machine make of a run instead, beside one; --threads are those of "
        "each (default: the cores shared among them)")  # fmt: skip
    add("--sampling", action="store_true",
        help="measure the tokens/s of sampling instead, of 1, 32 and 1024 samples")  # fmt: skip
    add("--json", action="store_true", help="print JSON")
    command.set_defaults(command=_bench)


def _add_tokenizer(commands: Any, name: str, describe: bool) -> None:
    group = commands.add_parser(
        name, help="train, try and inspect tokenizers", description="Train, try and inspect tokenizers."
    )
    inner = group.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, function: Any, help: str, **options: Any) -> Any:
        command = inner.add_parser(name, formatter_class=_Help, help=help, **options)
        command.set_defaults(command=function, parser=command)
        return command.add_argument

    flag = add("train", _tokenizer_train, "make a tokenizer from text", description="Train a tokenizer of "
        "SentencePiece that loses nothing: byte pieces, no normalisation.")  # fmt: skip
    flag(
        "--data",
        action="append",
        required=True,
        metavar="CORPUS",
        help="text, as for train; may be given again",
    )
    flag("--vocab", type=_integer("--vocab"), default=4096, metavar="N", help="tokens, from 512 to 65536")
    flag("--model", default="unigram", metavar="KIND", help="bpe or unigram")
    flag("--out", required=True, metavar="PATH", help="file to write, such as english.model")
    flag("--text-field", default="text", metavar="FIELD", help="field of a JSON line with the text")
    flag("--max-bytes", type=_integer("--max-bytes"), default=100_000_000, metavar="N",
         help="bytes of text to read at most, from the first on; 0 takes all")  # fmt: skip
    flag("--character-coverage", default="0.9995", metavar="X",
         help="share of the text's characters that get pieces; the others are spelled in bytes")  # fmt: skip
    model_help = "'bytes', a .model file of SentencePiece, or the directory of a run"
    file_help = "file to read; - is standard input"
    flag = add(
        "encode", _tokenizer_encode, "text to token numbers", description="Encode a text, as one document."
    )
    flag("model", metavar="MODEL", help=model_help)
    flag("file", metavar="FILE", nargs="?", default="-", help=file_help)
    flag("--pieces", action="store_true", help="show pieces instead of numbers")
    flag = add(
        "decode", _tokenizer_decode, "token numbers to text", description="Decode numbers between spaces."
    )
    flag("model", metavar="MODEL", help=model_help)
    flag("file", metavar="FILE", nargs="?", default="-", help=file_help)
    flag = add("inspect", _tokenizer_inspect, "what a tokenizer is, and what it makes of a text",
        description="Describe a tokenizer, and measure it on a text.")  # fmt: skip
    flag("model", metavar="MODEL", help=model_help)
    flag("--data", action="append", metavar="CORPUS", help="text to measure it on; may be given again")
    flag("--text-field", default="text", metavar="FIELD", help="field of a JSON line with the text")
    flag("--json", action="store_true", help="print JSON")


def _add_engine(add: Any) -> None:
    add(
        "--engine",
        default="auto",
        metavar="NAME",
        help="auto, native, xla or reference; all give the same bits",
    )
    add("--threads", type=_integer("--threads"), metavar="N", default=argparse.SUPPRESS,
        help="threads to compute with, from 1 to 1024; changes speed, never the result (default: one for each "
        "core that the process may use)")  # fmt: skip


def _use_threads(parsed: argparse.Namespace) -> int | None:
    """The number asked for, which XLA is told before it starts; None where none is."""
    if not hasattr(parsed, "threads"):
        return None
    from intlm.engine.engine import check_threads, limit_xla_threads

    limit_xla_threads(check_threads(parsed.threads))
    return int(parsed.threads)


def _integer(flag: str) -> Any:
    def convert(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{flag} {text}: expected an integer") from None

    return convert


def _train(parsed: argparse.Namespace) -> int:
    from train.cluster import membership, together

    words = {name: value for name, value in vars(parsed).items() if name != "command"}
    member = membership(*(words.pop(name, None) for name in CLUSTER_FLAGS))
    # Below, since these import JAX.
    from intlm.engine.engine import has_accelerators
    from intlm.engine.native import why_not_fast
    from train.job import Request, claimed, prepare
    from train.loop import train
    from train.report import Report
    from train.stop import GroupStop, StopSignal
    from train.together import follow

    words["threads"] = _use_threads(parsed)
    for name in ("settings", "data"):
        words[name] = tuple(words[name])
    terminal = sys.stderr.isatty()

    def say(line: str) -> None:
        if terminal:
            print(line, file=sys.stderr)

    request = Request(**words)
    with contextlib.ExitStack() as leaving:
        stop = leaving.enter_context(StopSignal() if member is None else GroupStop())
        cluster = leaving.enter_context(together(member, stop))
        if cluster and cluster.process:
            return DONE if follow(request, stop, cluster) else INTERRUPTED
        lock = leaving.enter_context(claimed(request))
        if cluster:
            cluster.watch.leaving = lock.release
        job = prepare(request, say, cluster)
        job.before_checkpoint.append(lock.check)
        config = job.config
        _tell_loss(job.tokenizer)
        verb = "resuming" if job.resumed else "training"
        say(
            f"{verb} {job.run.directory}: {config.model.weights:,} weights, population "
            f"{config.eggroll.population:,}, segments of {config.eggroll.segment} tokens, engine "
            f"{job.engine.name}; {job.text}"
        )
        if cluster and cluster.note:
            say(cluster.note)
        for note in job.notes:
            print(f"intlm: {note}", file=sys.stderr)
        if parsed.engine == "auto" and job.engine.name != "native":
            print(f"intlm: {why_not_fast()}", file=sys.stderr)
        elif parsed.engine == "auto" and has_accelerators():
            print(
                "intlm: computing on the CPU; --engine xla computes on JAX's other devices", file=sys.stderr
            )
        if job.state.step >= config.steps:
            _write(
                f"{job.run.directory}: done already, {config.steps} steps; a new run needs another --run\n"
            )
            return DONE
        with Report(job) as report, job.recording(), contextlib.closing(job.lanes):
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

    from eval.sampling import Sampler, SampleStream, SamplingConfig, fixed
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
    threads = _use_threads(parsed)
    prompt = _prompt(parsed)
    config, tokenizer, parameters, _ = load_model(*find_checkpoint(parsed.run))
    engine = make_engine(parsed.engine, config.model, config.eggroll, threads=threads)
    encoded = tokenizer.encode(prompt)
    if (encoded == tokenizer.unknown).any():
        raise InputError(
            f"--prompt: {_lacking(tokenizer, prompt)} is not in the run's tokenizer ({tokenizer.name})"
        )
    tokens = np.concatenate([[tokenizer.separator], encoded])
    sampler = Sampler(engine, config.model, parameters, sampling)
    drawn = sampler.tokens(tokens, parsed.count, parsed.tokens)
    if parsed.count == 1:
        stream = SampleStream(tokenizer)
        _write(stream.start(prompt))
        for tokens_1xT in drawn:
            _write(stream.feed(tokens_1xT[0]))
        _write(stream.end() + "\n")
        return DONE
    samples = np.concatenate(list(drawn), axis=1)
    for number, sample in enumerate(samples, 1):
        stream = SampleStream(tokenizer)
        text = stream.start(prompt) + stream.feed(sample) + stream.end()
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

    threads = _use_threads(parsed)
    run, paths = find_checkpoint(parsed.run)
    config, tokenizer, parameters, meta = load_model(run, paths)
    engine = make_engine(parsed.engine, config.model, config.eggroll, threads=threads)
    data = getattr(parsed, "data", None)
    result = evaluate(
        run.name, meta["step"], config, engine, parameters, tokenizer, data, run.fingerprints, meta["text"]
    )
    _write((json.dumps(result.as_dict(), indent=2) if parsed.json else result.table()) + "\n")
    return DONE


def _check(parsed: argparse.Namespace) -> int:
    from train.check import check
    from train.run import resolve

    found = check(resolve(parsed.run))
    _write((json.dumps(found.as_dict(), indent=2) if parsed.json else found.table()) + "\n")
    return DAMAGED if found.damaged else DONE


def _checkout(parsed: argparse.Namespace) -> int:
    from intlm.checkpoint import make_directory
    from train.job import write_checkout
    from train.replay import weights_at

    run, config, engine = _open_history(parsed)
    if not 0 <= parsed.step <= config.steps:
        raise InputError(f"--step {parsed.step}: must be from 0 to {config.steps}, the run's steps")
    weights, meta = weights_at(run, config, parsed.step, engine)
    path = run.checkout_path(parsed.step) if parsed.out is None else Path(parsed.out)
    if parsed.out is None:
        make_directory(path.parent)
    write_checkout(path, weights, meta)
    _write(f"{path}: the weights after step {parsed.step}\n")
    return DONE


def _verify(parsed: argparse.Namespace) -> int:
    from tqdm import tqdm

    from intlm.history import segments
    from train.replay import verify

    run, config, engine = _open_history(parsed)
    size = sum(path.stat().st_size for _, path in segments(run.history_directory))
    with tqdm(
        total=size,
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
        leave=False,
    ) as bar:
        verdict = verify(run, config, engine, bar.update)
    _write((json.dumps(verdict.as_dict(), indent=2) if parsed.json else verdict.lines(run.name)) + "\n")
    return DAMAGED if verdict.faults else DONE


def _open_history(parsed: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Run, configuration, and the engine that makes votes again."""
    from intlm.engine.engine import make_engine
    from train.job import kept_config
    from train.run import Run, resolve

    threads = _use_threads(parsed)
    run = Run.open(resolve(parsed.run))
    _, config = kept_config(run)
    return run, config, make_engine(parsed.engine, config.model, config.eggroll, threads=threads)


def _data(parsed: argparse.Namespace) -> int:
    from tqdm import tqdm

    from eval.survey import survey
    from tokenizer import open_tokenizer
    from train.config import TextConfig, resolve_config

    corpora = tuple(parsed.corpora + parsed.data) or TextConfig().data
    text = TextConfig(data=corpora, text_field=parsed.text_field, max_documents=parsed.max_documents)
    tokenizer = open_tokenizer(parsed.tokenizer)
    config = resolve_config(parsed.preset, parsed.settings, text, tokenizer.vocabulary)
    hidden = not sys.stderr.isatty()
    with tqdm(
        unit="B", unit_scale=True, desc="reading", disable=hidden, dynamic_ncols=True, leave=False
    ) as bar:
        documents = 0

        def progress(further: int, size: int) -> None:
            nonlocal documents
            documents += further
            bar.set_postfix_str(f"{documents:,} documents", refresh=False)
            bar.update(size)

        found = survey(text, tokenizer, parsed.preset, config.eggroll, progress)
    _write((json.dumps(found.as_dict(), indent=2) if parsed.json else found.table()) + "\n")
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
    return DAMAGED if floats else DONE


def _bench_data(parsed: argparse.Namespace) -> int:
    from eval.loading import measure_loading, table
    from tokenizer import open_tokenizer
    from train.config import TextConfig, resolve_config

    tokenizer = open_tokenizer(parsed.tokenizer)
    config = resolve_config("small", parsed.settings, TextConfig(), tokenizer.vocabulary)

    def say(line: str) -> None:
        if sys.stderr.isatty():
            print(line, file=sys.stderr)

    try:
        results = measure_loading(tokenizer, config.eggroll, say)
    except OSError as error:
        raise InputError(f"the folder for temporary files: {error.strerror or error}") from error
    _write(
        (json.dumps([each.as_dict() for each in results], indent=2) if parsed.json else table(results)) + "\n"
    )
    return DONE


def _bench(parsed: argparse.Namespace) -> int:
    if parsed.preset == "data":
        return _bench_data(parsed)
    from functools import partial

    from tqdm import tqdm

    from eval.full_rank import compare
    from eval.host import measure_host
    from eval.safety import measure_safety
    from eval.scaling import measure_scaling
    from eval.throughput import count_of_figures, measure, table

    wanted = [
        f"--{name}"
        for name in ("full-rank", "host", "safety", "processes", "sampling")
        if vars(parsed)[name.replace("-", "_")] not in (None, False)
    ]
    if len(wanted) > 1:
        raise InputError(f"{' and '.join(wanted)}: give one of them")
    if parsed.sampling:
        return _bench_sampling(parsed)
    alone: dict[str, Any] = {
        "host": measure_host,
        "safety": measure_safety,
        "processes": partial(measure_scaling, processes=parsed.processes),
    }
    cases, config = _bench_cases(parsed)
    seconds = _seconds(parsed.seconds)
    measure_cost = next((alone[name] for name in alone if f"--{name}" in wanted), None)
    count = len(cases) if measure_cost else 6 * len(cases) if parsed.full_rank else count_of_figures(cases)
    with tqdm(total=count, unit="figure", disable=not sys.stderr.isatty(), leave=False) as bar:

        def progress(what: str) -> None:
            bar.set_description(what, refresh=False)
            bar.update()

        if measure_cost:
            costs: list[Any] = []
            for case in cases:
                progress(f"training, {case.engine}, {case.config.estimator}")
                settings = (*parsed.settings, f"estimator={case.config.estimator}",
                            f"population={case.config.population}")  # fmt: skip
                costs.append(measure_cost(parsed.preset, settings, case, 16 * seconds))
            found: list[Any] = costs
            shown = "\n".join(cost.line() for cost in costs)
        elif parsed.full_rank:
            compared = [compare(config, case, seconds, progress) for case in cases]
            found, shown = list(compared), "\n".join(each.lines() for each in compared)
        else:
            results = measure(config, cases, seconds, progress)
            found, shown = list(results), table(results)
    _write((json.dumps([each.as_dict() for each in found], indent=2) if parsed.json else shown) + "\n")
    return DONE


def _bench_sampling(parsed: argparse.Namespace) -> int:
    from eval.sampling_speed import SAMPLES, measure, table
    from intlm.engine.native import available_isas
    from train.config import TextConfig, resolve_config

    for flag, given in (("--threads", parsed.threads), ("--population", parsed.populations)):
        if given:
            raise InputError(f"{flag}: not with --sampling, which takes the cores that it may use")
    config = resolve_config(parsed.preset, parsed.settings, TextConfig(), 256)
    engines = parsed.engines or (["native"] if available_isas() else []) + ["xla"]

    def say(line: str) -> None:
        if sys.stderr.isatty():
            print(line, file=sys.stderr)

    results = measure(config.model, config.eggroll, engines, SAMPLES, _seconds(parsed.seconds), say)
    _write(
        (json.dumps([each.as_dict() for each in results], indent=2) if parsed.json else table(results)) + "\n"
    )
    return DONE


SHORT_STEP = 64 * 10**9
"""Multiply-adds of a step, up to which `bench` adds larger populations by itself: seconds on a slow engine."""


MOST_BENCH_PROCESSES = 256


def _bench_cases(parsed: argparse.Namespace) -> tuple[list[Any], Any]:
    """Every engine with every number of threads, estimator and population asked for; and the model."""
    import dataclasses

    from eval.throughput import Case, multiply_adds
    from intlm.config import ESTIMATORS
    from intlm.engine.engine import check_threads, usable_cores
    from intlm.engine.native import available_isas
    from train.config import TextConfig, resolve_config

    def resolve(*settings: str) -> Any:
        return resolve_config(parsed.preset, (*parsed.settings, *settings), TextConfig(), 256)

    own = resolve()
    configs = [own.eggroll]
    chosen = any(setting.startswith("estimator=") for setting in parsed.settings)
    for estimator in ESTIMATORS:
        if estimator != own.eggroll.estimator and not chosen and not parsed.full_rank:
            try:
                configs.append(resolve(f"estimator={estimator}").eggroll)
            except InputError:
                continue  # a preset, or settings, that only the other one has
    engines = parsed.engines or (["native"] if available_isas() else []) + ["xla"]
    one_thing = parsed.full_rank or parsed.host or parsed.safety or parsed.processes is not None
    if one_thing and not parsed.engines:
        engines = engines[:1]
    if parsed.processes is not None and not 2 <= parsed.processes <= MOST_BENCH_PROCESSES:
        raise InputError(f"--processes {parsed.processes}: must be from 2 to {MOST_BENCH_PROCESSES}")
    cores = max(1, usable_cores() // (parsed.processes or 1))
    cases = []
    for config in configs:
        populations = parsed.populations
        if not populations:
            step = multiply_adds(own.model) * config.population * config.segment
            more = () if one_thing else (4, 16)
            populations = [
                config.population * times for times in (1, *more) if times * step <= SHORT_STEP or times == 1
            ]
        for population in populations:
            sized = dataclasses.replace(config, population=population, pairs_per_lane=1)
            for engine in engines:
                for threads in parsed.threads or [cores]:
                    cases.append(Case(engine, check_threads(threads), sized))
    return cases, own.model


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise InputError(f"--seconds {text}: must be a number from 0 to 3600")
    return seconds


def _lacking(tokenizer: Any, text: bytes) -> str:
    """The first characters of `text` that the tokenizer cannot spell, quoted."""
    tokens, lengths = tokenizer.encode_aligned(text)
    place = int((tokens == tokenizer.unknown).argmax())
    start = int(lengths[:place].sum())
    return repr(text[start : start + int(lengths[place])].decode(errors="replace"))


def _tell_loss(tokenizer: Any) -> None:
    if tokenizer.loss:
        print(f"intlm: the tokenizer ({tokenizer.name}) is not lossless: {tokenizer.loss}", file=sys.stderr)


def _documents(parsed: argparse.Namespace) -> Any:
    """The documents of all --data, one corpus after another."""
    from itertools import chain

    from train.corpus import open_corpus

    corpora = [open_corpus(name, parsed.text_field, "--data") for name in parsed.data]
    return chain.from_iterable(corpus.documents() for corpus in corpora)


def _tokenizer_train(parsed: argparse.Namespace) -> int:
    from tqdm import tqdm

    from intlm.checkpoint import replace_file
    from tokenizer.trainer import train

    out = Path(parsed.out)
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(
            f"--out {out}: {'is a directory' if out.is_dir() else 'its directory does not exist'}"
        )
    try:
        coverage = float(parsed.character_coverage)
    except ValueError:
        raise InputError(f"--character-coverage {parsed.character_coverage}: expected a number") from None
    documents = _documents(parsed)
    terminal = sys.stderr.isatty()
    with tqdm(unit="B", unit_scale=True, desc="reading", disable=not terminal, dynamic_ncols=True) as bar:
        made = train(
            documents,
            parsed.vocab,
            parsed.model,
            parsed.max_bytes,
            coverage,
            lambda read: bar.update(read - bar.n),
            lambda line: bar.write(line, file=sys.stderr) if terminal else None,
        )
    replace_file(out, [made.model])
    skipped = [f"{count:,} {why}" for why, count in sorted(made.skipped.items())]
    ends = f" (stopped at --max-bytes {parsed.max_bytes:,})" if made.stopped else ""
    _write(
        f"{out}: {parsed.model}, {parsed.vocab} tokens; read {made.read:,} bytes in {made.documents:,} "
        f"documents{ends}; used {made.used:,}, skipped {', '.join(skipped) or 'none'}\n"
    )
    return DONE


def _tokenizer_encode(parsed: argparse.Namespace) -> int:
    from tokenizer import open_tokenizer
    from tokenizer.inspection import shown

    tokenizer = open_tokenizer(parsed.model, "MODEL")
    tokens = tokenizer.encode(_read(parsed.file)).tolist()
    _tell_loss(tokenizer)
    _write(" ".join(shown(tokenizer, token) if parsed.pieces else str(token) for token in tokens) + "\n")
    return DONE


def _tokenizer_decode(parsed: argparse.Namespace) -> int:
    from tokenizer import open_tokenizer

    tokenizer = open_tokenizer(parsed.model, "MODEL")
    numbers = []
    for place, word in enumerate(_read(parsed.file).split(), 1):
        if not word.isdigit() or len(word) > 9 or int(word) >= tokenizer.vocabulary:
            said = repr(word[:40].decode(errors="replace"))
            raise InputError(
                f"FILE: word {place}, {said}, is no token (accepted: 0 to {tokenizer.vocabulary - 1})"
            )
        numbers.append(int(word))
    text = tokenizer.decode(numbers)
    sys.stdout.flush()
    try:
        sys.stdout.buffer.write(text)
    except OSError as error:
        raise InputError(f"standard output: {error.strerror or error}") from error
    _write("")
    return DONE


def _tokenizer_inspect(parsed: argparse.Namespace) -> int:
    from tokenizer import open_tokenizer
    from tokenizer.inspection import inspect

    found = inspect(open_tokenizer(parsed.model, "MODEL"), _documents(parsed) if parsed.data else None)
    text = json.dumps(found.as_dict(), indent=2, ensure_ascii=False) if parsed.json else found.table()
    _write(text + "\n")
    return DONE


def _read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"FILE {name}: {error.strerror or error}") from error
