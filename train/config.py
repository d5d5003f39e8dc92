"""The configuration of a run: model, optimiser, text and length; presets; keys given as text."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from intlm.config import EggrollConfig, ModelConfig
from intlm.errors import InputError, brief, shown, unknown
from train.corpus import without_secrets

MOST_CORPORA = 1024


@dataclass(frozen=True)
class TextConfig:
    """Where the text comes from."""

    data: tuple[str, ...] = ("stdlib",)
    """Corpora to train on, NAME or NAME=WEIGHT, see `parse_data`."""
    held_out: str = ""
    """Corpus to evaluate on; empty: about one document in 32 of `data`."""
    text_field: str = "text"
    """Field of a JSON line that holds the text."""
    max_documents: int = 0
    """Documents of each corpus at most, before some are held out; 0 takes all."""

    def __post_init__(self) -> None:
        """Raise InputError for a weight or a count out of range, and for a corpus that is named twice."""
        if len(self.data) > MOST_CORPORA:
            raise InputError(f"--data: given {len(self.data)} times (accepted: up to {MOST_CORPORA} corpora)")
        names = set[str]()
        for data in self.data:
            name = parse_data(data)[0]
            if name in names:
                public = brief(without_secrets(name))
                raise InputError(f"--data {public}: given twice (give it a weight instead, {public}=2)")
            names.add(name)
        if self.max_documents < 0:
            raise InputError(f"--max-documents {shown(self.max_documents)}: must be 0 or more")

    @property
    def names(self) -> list[str]:
        """`data` without the secrets of URLs."""
        parsed = map(parse_data, self.data)
        return [format_data(without_secrets(name), weight) for name, weight in parsed]


@dataclass(frozen=True)
class RunConfig:
    """All that decides a run's bits, and its planned length."""

    model: ModelConfig = field(default_factory=ModelConfig)
    eggroll: EggrollConfig = field(default_factory=EggrollConfig)
    text: TextConfig = field(default_factory=TextConfig)
    tokenizer: str = "bytes"
    """The name of the tokenizer; its files are in the run's directory."""
    minutes: str = ""
    """Planned minutes, as given; `steps` was measured to fill them. Empty where steps were given."""
    steps: int = 0
    """Steps of the whole run; the step size falls to 0 over them."""

    def as_dict(self) -> dict[str, Any]:
        """Nested dictionaries that JSON can hold."""
        return dataclasses.asdict(self)

    def shown(self) -> dict[str, Any]:
        """`as_dict` without the secrets of URLs, for checkpoints and messages."""
        text = dataclasses.replace(self.text, data=("",), held_out=without_secrets(self.text.held_out))
        values = dataclasses.replace(self, text=text).as_dict()
        values["text"]["data"] = self.text.names
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "RunConfig":
        """The inverse of `as_dict`. Raises InputError, naming `source`, for unknown or mistyped keys."""
        config = _build(cls, values, source, "")
        assert isinstance(config, cls)
        return config


_SECTIONS: dict[str, type] = {"model": ModelConfig, "eggroll": EggrollConfig, "text": TextConfig}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"population": 64, "segment": 16},
    "small": {},
    "medium": {"width": 128, "layers": 4},
    "paper": {
        "width": 256,
        "layers": 6,
        "mlp": "identity",
        "estimator": "weight",
        "noise": "gaussian",
        "fitness": "sign",
        "update": "threshold",
        "segment": 100,
        "alpha": 26214,
    },
}
"""Differences from the defaults. `tiny`: seconds, for trying things out; `small`: the default; `medium`: a
laptop for an evening; `paper`: the size and the algorithm of arXiv 2511.16652."""


WEIGHT_DEFAULTS = {"segment": 16, "step_embedding": 4}
"""Defaults that differ under `estimator=weight`, whose signal is spread over all weights of a segment."""

HEAVIEST = 1_000_000


def parse_data(text: str) -> tuple[str, int]:
    """Name and weight of a corpus given as NAME or NAME=WEIGHT. Raises InputError for a weight out of range.

    Whatever looks like a number after the last equals sign is a weight.
    """
    name, equals, weight = text.rpartition("=")
    if not equals or not re.fullmatch(r"[+-]?\.?\d[\d._eE+-]*", weight):
        return text, 1
    if not weight.isdecimal() or not weight.isascii() or not 1 <= int(weight[:20]) <= HEAVIEST:
        raise InputError(
            f"--data {brief(text)}: the weight {brief(weight)} must be an integer from 1 to {HEAVIEST} (a name "
            f"that ends so is written with a weight after it, {brief(text)}=1)"
        )
    return name, int(weight)


def format_data(name: str, weight: int) -> str:
    """The shortest text that `parse_data` takes for this corpus."""
    if weight == 1:
        try:
            if parse_data(name) == (name, 1):
                return name
        except InputError:
            pass
    return f"{name}={weight}"


def _keys() -> dict[str, tuple[str, Any]]:
    """Section and default of every key of model and eggroll that a person may set."""
    return {
        item.name: (section, item.default)
        for section in ("model", "eggroll")
        for item in dataclasses.fields(_SECTIONS[section])
        if item.name != "vocabulary"
    }


def resolve_config(preset: str, settings: Iterable[str], text: TextConfig, vocabulary: int) -> RunConfig:
    """The configuration of a preset with `key=value` settings on top; steps and minutes are left open.

    Raises InputError for an unknown preset or key (with the nearest), and for values that do not fit.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    keys = _keys()
    chosen = dict(PRESETS[preset])
    for setting in settings:
        name, equals, raw = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected key=value")
        if name not in keys:
            raise unknown("--set", name, keys)
        chosen[name] = raw
        if isinstance(keys[name][1], int):
            try:
                chosen[name] = int(raw)
            except ValueError:
                raise InputError(f"--set {setting}: {name} takes an integer") from None
    if chosen.get("estimator") == "weight":
        chosen = WEIGHT_DEFAULTS | chosen
    values: dict[str, dict[str, Any]] = {"model": {"vocabulary": vocabulary}, "eggroll": {}}
    for name, value in chosen.items():
        values[keys[name][0]][name] = value
    return RunConfig(ModelConfig(**values["model"]), EggrollConfig(**values["eggroll"]), text)


def describe_keys(width: int = 100) -> str:
    """Every key of --set, its default and what it is, for --help, in lines of at most `width` characters."""
    lines = []
    indent = " " * 27
    for section in ("model", "eggroll"):
        documents = _attribute_docstrings(_SECTIONS[section])
        for name, (owner, default) in _keys().items():
            if owner == section:
                line = f"  {name + '=' + str(default):24s} {documents[name]}"
                lines += textwrap.wrap(line, max(width, 60), subsequent_indent=indent)
    return "\n".join(lines)


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found[statement.target.id] = " ".join(str(after.value.value).replace("`", "").split())
    return found


def _build(cls: type, values: Any, source: str, prefix: str) -> Any:
    """A dataclass from a dictionary, strictly: every key known, none missing, each of the right type."""
    if not isinstance(values, Mapping):
        what = prefix.rstrip(".") or "the configuration"
        raise InputError(f"{source}: {what} must be an object of keys and values")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            section = f" of {prefix.rstrip('.')}" if prefix else ""
            raise unknown(f"{source}: key{section}", name, fields)
    made = {}
    for name, item in fields.items():
        if name not in values:
            raise InputError(f"{source}: key {prefix}{name} is missing")
        value = values[name]
        if name in _SECTIONS and not prefix:
            made[name] = _build(_SECTIONS[name], value, source, f"{name}.")
        elif item.type == tuple[str, ...]:
            if (
                not isinstance(value, list | tuple)
                or not value
                or not all(isinstance(each, str) for each in value)
            ):
                raise InputError(f"{source}: key {prefix}{name}={shown(value)} must be a list of strings")
            made[name] = tuple(value)
        elif type(value) is not item.type:
            wanted = getattr(item.type, "__name__", item.type)
            raise InputError(f"{source}: key {prefix}{name}={shown(value)} must be of type {wanted}")
        else:
            made[name] = value
    try:
        return cls(**made)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
