"""The one exception for input that a person can put right."""

import difflib
from collections.abc import Iterable

LONGEST_SHOWN = 100
"""Characters of a value that a message quotes: what a file says may be millions."""


class InputError(Exception):
    """Bad input from outside: a flag, a file, a configuration.

    The message is one line that names the flag or the file, the value, and what is accepted. The command
    line prints it and exits with code 2; a library caller may catch it.
    """


class DamagedError(InputError):
    """A file on disk that is not what was written: truncated, changed, or not to be read at all.

    Something of another version, configuration or tokenizer is no damage.
    """


def unknown(what: str, value: str, accepted: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not among those accepted, with the nearest one suggested."""
    names = sorted(accepted)
    near = difflib.get_close_matches(value[:LONGEST_SHOWN].lower(), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"{what}: unknown {shown(value)}{hint} (accepted: {', '.join(names)})")


def shown(value: object) -> str:
    """`repr(value)` for a message, cut where it is long."""
    return brief(repr(value))


def brief(text: str) -> str:
    """`text` for a message: in one line, and cut where it is long."""
    part = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:LONGEST_SHOWN])
    return part if len(text) <= LONGEST_SHOWN else part + "…"
