"""Options by the name of a recipe, or out of a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..names import unknown
from . import UsageError
from .config import TrainConfig

PRESETS: dict[str, dict[str, Any]] = {
    # What the papers of online distillation have in common on CIFAR; temperatures, and a ramp of 80
    # epochs, are the methods' own. They train on all images and quote the last epoch.
    "okd-cifar": {
        "dataset": "cifar100",
        "students": ("resnet32", "resnet32"),
        "epochs": 300,
        "batch_size": 128,
        "lr": 0.1,
        "lr_drops": (0.5, 0.75),
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "validation": 0.0,
        "seeds": (0, 1, 2),
    },
    # To see that everything works.
    "quick": {"dataset": "digits", "students": ("resnet8", "resnet8"), "epochs": 3},
}


def configured(options: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration that ``--preset`` and ``--config FILE`` among ``options`` give, the file's
    values before the preset's, and the options that are left.

    Raises UsageError for an unknown preset, a file that cannot be read, an unknown or repeated key
    or a value of another type.
    """
    config, rest = TrainConfig(), list(options)
    preset, rest = _take(rest, "--preset")
    file, rest = _take(rest, "--config")
    if preset is not None:
        if preset not in PRESETS:
            raise UsageError(unknown(f"--preset={preset}", preset, list(PRESETS)))
        config = replace(config, **PRESETS[preset])
    if file is not None:
        config = replace(config, **read(Path(file)))
    return config, rest


def read(path: Path) -> dict[str, Any]:
    """The options in a YAML file, by name, with the types that TrainConfig gives them."""
    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(
            f"--config={path} cannot be read ({error.strerror}); name a YAML file"
        ) from error
    # ValueError: no UTF-8, or a date or number that there is not.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--config={path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UsageError(f"--config={path} holds no options; write one as `epochs: 30` to a line")
    keys = [key.value for key, _ in yaml.compose(text, yaml.SafeLoader).value]
    hints = get_type_hints(TrainConfig)
    names = [f.name for f in fields(TrainConfig)]
    options = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise UsageError(unknown(f"{path}: {key}", name, names))
        if name in options or keys.count(key) > 1:  # of two of one spelling YAML keeps the last
            raise UsageError(f"{path}: {key} is given twice; leave one out")
        try:
            options[name] = _typed(value, hints[name])
        except (TypeError, OverflowError):
            raise UsageError(f"{path}: {key}={value!r} is not {_described(hints[name])}") from None
    return options


def _take(options: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of ``flag``, and the other options."""
    rest, value = [], None
    given = iter(options)
    for option in given:
        name, equals, after = option.partition("=")
        if name != flag:
            rest.append(option)
            continue
        value = after if equals else next(given, "")
        if not value:
            raise UsageError(f"{flag} needs a value")
    return value, rest


def _typed(value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` wants it; TypeError if it is something else."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):  # Literal[...] | None is the former
        if value is None and NoneType in arguments:
            return None
        return _typed(value, next(a for a in arguments if a is not NoneType))
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise TypeError
        return tuple(_typed(item, arguments[0]) for item in value)
    if get_origin(hint) is Literal:
        if value not in arguments:
            raise TypeError
        return value
    if hint is Path and isinstance(value, str) and "\0" not in value:
        return Path(value).expanduser()  # as the shell does with what it is given
    if hint is float and isinstance(value, str):  # YAML takes 1e-4 for text
        try:
            return float(value)
        except ValueError:
            raise TypeError from None
    if isinstance(value, bool) is not (hint is bool):
        raise TypeError
    if not isinstance(value, (int, float) if hint is float else hint):
        raise TypeError
    return float(value) if hint is float else value


def _described(hint: Any) -> str:
    """The type in words."""
    arguments = [a for a in get_args(hint) if a not in (NoneType, ...)]
    if get_origin(hint) is tuple:
        return f"a list such as [{', '.join([_described(arguments[0])] * 2)}]"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if arguments:
        return f"{_described(arguments[0])} or null"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(hint, "the path of a file or folder")
