"""The trainer of tokenizers: a `.model` file of SentencePiece from documents."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from intlm.errors import InputError
from tokenizer.model_file import MOST_PIECES
from tokenizer.pieces import cut, escape

KINDS = ("bpe", "unigram")
SMALLEST_VOCABULARY = 512
"""256 byte pieces, the separator, the unknown piece, and room for characters and words."""

LONGEST_SENTENCE = 1 << 12
THREADS = 8
"""Always as many, whatever the machine has: the sums of `unigram` depend on it."""

# The library takes the first for a space and stands the second for rare characters; a zero ends its strings.
_RESERVED = re.compile("([\udc80-\udcff]+|[\u2581\u2585\0]+)")


@dataclass
class Trained:
    """A model and what it was made of. Bytes are of raw text."""

    model: bytes = b""
    documents: int = 0
    read: int = 0
    used: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Bytes that the trainer was not shown, by reason."""
    stopped: bool = False
    """Whether `most_bytes` were read before the documents came to an end."""


def train(
    documents: Iterable[bytes],
    vocabulary: int,
    kind: str,
    most_bytes: int = 0,
    coverage: float = 0.9995,
    progress: Callable[[int], object] = lambda read: None,
    say: Callable[[str], object] = lambda line: None,
) -> Trained:
    """Train a tokenizer that loses nothing: byte pieces, no normalisation, spaces as they are.

    kind: `bpe` or `unigram`; most_bytes: of text to read at most, 0 for all; coverage: share of the text's
    characters that get a piece, from 0.98 to 1, the rest being spelled in bytes; progress: called with the
    bytes read so far; say: called with a line when all is read. The same documents and settings give the same
    bytes with the same release of the library.

    Raises InputError for settings out of range, and for a vocabulary that the text cannot fill or that cannot
    hold its characters.
    """
    if kind not in KINDS:
        raise InputError(f"--model {kind}: unknown (accepted: {', '.join(KINDS)})")
    if not SMALLEST_VOCABULARY <= vocabulary <= MOST_PIECES:
        raise InputError(f"--vocab {vocabulary}: must be from {SMALLEST_VOCABULARY} to {MOST_PIECES}")
    if not 0.98 <= coverage <= 1:
        raise InputError(f"--character-coverage {coverage}: must be from 0.98 to 1")
    if most_bytes < 0:
        raise InputError(f"--max-bytes {most_bytes}: must be 0 or more")
    import io

    import sentencepiece

    result = Trained()
    failed: list[Exception] = []

    def sentences() -> Iterator[bytes]:
        try:
            yield from _sentences(documents, most_bytes, result, progress)
            say(f"fitting {vocabulary:,} pieces to {result.used:,} bytes")
        except Exception as error:
            # The library would put its text into an error of its own.
            failed.append(error)

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=sentences(),
            model_writer=written,
            model_type=kind,
            vocab_size=vocabulary,
            character_coverage=coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            bos_id=0,
            unk_id=1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=2 * LONGEST_SENTENCE,
            num_threads=THREADS,
            minloglevel=3,
        )
    except RuntimeError as error:
        if not failed:
            raise _explained(str(error), vocabulary, result) from error
    if failed:
        raise failed[0]
    result.model = written.getvalue()
    return result


def _sentences(
    documents: Iterable[bytes], most_bytes: int, result: Trained, progress: Callable[[int], object]
) -> Iterator[bytes]:
    """Text in lengths that the library takes, and nothing in it at which it would drop the whole of it."""
    for document in documents:
        if most_bytes and result.read + len(document) > most_bytes:
            document = next(cut(document, max(4, most_bytes - result.read)), b"")
            result.stopped = True
        result.documents += 1
        for block in cut(document, LONGEST_SENTENCE):
            result.read += len(block)
            for part, reserved in escape(block, _RESERVED):
                if reserved:
                    why = "reserved characters" if _is_text(part) else "not UTF-8"
                    result.skipped[why] = result.skipped.get(why, 0) + len(part)
                    continue
                result.used += len(part)
                # Without an end that is no line end, the library would drop line ends; no piece has a tab.
                yield part + b"\t"
            progress(result.read)
        if result.stopped:
            return


def _is_text(part: bytes) -> bool:
    try:
        return bool(part.decode())
    except UnicodeDecodeError:
        return False


def _explained(said: str, vocabulary: int, result: Trained) -> InputError:
    """The library's error in terms of the flags."""
    if most := re.search(r"Vocabulary size (?:is )?too high.*<= *(\d+)", said):
        if int(most[1]) < SMALLEST_VOCABULARY:
            return InputError(
                f"--data: too little text: {result.used:,} bytes make a vocabulary of {most[1]} at most "
                f"(accepted: text for {SMALLEST_VOCABULARY} or more)"
            )
        return InputError(f"--vocab {vocabulary}: too large for this text (accepted: up to {most[1]})")
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", said):
        return InputError(
            f"--vocab {vocabulary}: too small for the characters of this text (accepted: {least[1]} or more, or "
            "a lower --character-coverage)"
        )
    if not result.used:
        return InputError("--data: has no text to train a tokenizer on (accepted: UTF-8)")
    return InputError(f"--data: no tokenizer can be trained on this text: {' '.join(said.split())[:200]}")
