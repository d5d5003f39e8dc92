"""The evaluation of a run: bits per byte of held-out text, beside what simpler models make of it."""

from dataclasses import asdict, dataclass
from typing import Any

from eval.baselines import baselines
from eval.bits import Evaluator, lay_out
from intlm.engine.engine import Engine
from intlm.errors import InputError
from intlm.model import Parameters
from tokenizer import Tokenizer
from train.config import RunConfig
from train.corpus import open_corpus, without_secrets
from train.text import HELD_OUT_BYTES, first, load_text


@dataclass(frozen=True)
class Evaluation:
    """Bits per byte of a run's model and of the baselines on the same text."""

    run: str
    step: int
    member_tokens: int
    text: str
    bytes: int
    bits_per_byte: float
    baselines: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def table(self) -> str:
        """For a terminal."""
        names = {
            "unigram": "unigram, counted on the training text",
            "bigram": "bigram, counted on the training text",
            "trigram": "trigram, counted on the training text",
            "own_unigram": "unigram entropy of this text itself",
            "own_bigram": "bigram entropy of this text itself",
            "own_trigram": "trigram entropy of this text itself",
            "gzip": "gzip -9 of this text alone",
            "xz": "xz of this text alone",
        }
        rows = [(f"intlm {self.run}, step {self.step:,}", self.bits_per_byte)]
        rows += [(label, self.baselines[name]) for name, label in names.items()]
        width = max(len(label) for label, _ in rows)
        head = f"{self.text}: {self.bytes:,} bytes; {self.member_tokens:,} member-tokens trained"
        lines = [head, f"{'':{width}s}  bits per byte"]
        return "\n".join(lines + [f"{label:{width}s}  {value:13.3f}" for label, value in rows])


def evaluate(
    run: str,
    step: int,
    config: RunConfig,
    engine: Engine,
    parameters: Parameters,
    tokenizer: Tokenizer,
    data: str | None = None,
    fingerprints: Any = None,
    digests: dict[str, str] | None = None,
) -> Evaluation:
    """Score the run's held-out text, or the corpus `data` instead. Raises InputError for bad text.

    n-grams are counted on the run's training text. `fingerprints` and `digests` are of the text that the model
    was trained on: of another text, what is held out may have been trained on, so that it is refused.
    """
    text = load_text(config.text)
    if data is None and digests is not None and (changed := text.changes(fingerprints, digests)):
        raise InputError(
            f"{changed[0]} since the run {run} was trained; restore it, or name another with --data"
        )
    names = ", ".join(config.text.names)
    held_out_name = without_secrets(config.text.held_out)
    documents, name = text.held_out, held_out_name or f"held-out part of {names}"
    if data is not None:
        corpus = open_corpus(data, config.text.text_field)
        documents, whole = first(corpus.documents(), HELD_OUT_BYTES)
        name = corpus.name if whole else f"the first {HELD_OUT_BYTES >> 20} MiB of {corpus.name}"
    held_out = lay_out(documents, tokenizer)
    bits = Evaluator(engine, config.model, held_out).bits_per_byte(parameters)
    member_tokens = step * config.eggroll.population * config.eggroll.segment
    figures = asdict(baselines(text.train, documents))
    return Evaluation(run, step, member_tokens, name, int(figures.pop("bytes")), bits, figures)
