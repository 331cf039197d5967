"""A dataclass of options: bounds, a line of help each, and the command line that fills it."""

import argparse
import dataclasses
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers.hf_argparser import string_to_bool

from engine import ConfigError

HOLDS = {"at least": ge, "at most": le, "above": gt, "below": lt}


def option(
    default: Any,
    *,
    help: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple = (),
    several: bool = False,
    resumable: bool = False,
) -> Any:
    """One field. low <= value <= high, above < value < below, or one of `choices`.

    several: words of `choices`, with spaces between them. resumable: a run may be resumed with
    another value.
    """
    bounds = {"at least": low, "at most": high, "above": above, "below": below}
    bounds = {words: bound for words, bound in bounds.items() if bound is not None}
    rules = {"bounds": bounds, "choices": choices, "several": several, "resumable": resumable}
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def check_field(field: dataclasses.Field, value: Any) -> None:
    """Raise ConfigError where a value lies outside the bounds or choices of its field."""
    name, choices, bounds = field.name, field.metadata["choices"], field.metadata["bounds"]
    for word in value.split() if field.metadata["several"] else [value]:
        if choices and word not in (*choices, None):
            raise ConfigError(f"{name}: {word!r} is not one of {', '.join(filter(None, choices))}")
    if value is not None and not all(HOLDS[words](value, bound) for words, bound in bounds.items()):
        wanted = " and ".join(f"{words} {bound}" for words, bound in bounds.items())
        raise ConfigError(f"{name}: must be {wanted}, got {value} ({field.metadata['help']})")


def parse(options: type, argv: list[str], headings: dict[str, str], **texts: str) -> Any:
    """Command line -> an instance of the dataclass `options`. The command line wins over
    `--config file.yaml`. headings: the first option of each group in `--help`, and its title.
    Raises ConfigError, or ends with argparse's line."""
    parser = _parser(options, headings, **texts)
    names = {f.name for f in dataclasses.fields(options)}
    several = [f.name for f in dataclasses.fields(options) if f.metadata["several"]]
    argv = [
        part
        for word in argv
        for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    if argv.count("--config") > 1:
        raise ConfigError("--config: give one file")
    if "--config" in argv:
        at = argv.index("--config")
        path, argv = argv[at + 1 : at + 2], argv[:at] + argv[at + 2 :]
        try:
            values = yaml.safe_load(Path(*path).read_text()) or {}
        except (OSError, TypeError, yaml.YAMLError) as error:
            where = "".join(path) or "a file (none given)"
            raise ConfigError(f"--config: cannot read {where}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"--config: {path[0]} must hold lines of the form option: value")
        if unknown := sorted(set(map(str, values)) - names):
            raise ConfigError(f"--config: {path[0]} has unknown options {', '.join(unknown)}")
        for name in several:
            if isinstance(values.get(name), list):
                values[name] = " ".join(map(str, values[name]))
        argv = [f"--{name}={value}" for name, value in values.items() if value is not None] + argv
    values = vars(parser.parse_args(argv))
    values |= {name: " ".join(values[name]) for name in several if values[name]}
    return options(**{name: values[name] for name in names})


def _parser(options: type, headings: dict[str, str], **texts: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, **texts)
    parser.add_argument(
        "--config", help="YAML file with any of these options; the command line wins over it"
    )
    types = get_type_hints(options)
    for f in dataclasses.fields(options):
        if f.name in headings:
            group = parser.add_argument_group(headings[f.name])
        kind = next((t for t in get_args(types[f.name]) if t is not type(None)), types[f.name])
        flag = {"nargs": "?", "const": True}  # --quiet, --quiet true
        how = {"type": string_to_bool, **flag} if kind is bool else {"type": kind}
        how |= {"nargs": "+"} if f.metadata["several"] else {}
        text = f.metadata["help"].replace("%", "%%")
        text += "" if f.default in (None, "") else f" (default: {f.default})"
        spelt = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
        group.add_argument(*spelt, dest=f.name, default=f.default, help=text, **how)
    return parser
