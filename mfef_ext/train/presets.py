"""Options by the name of a recipe, out of a YAML file, or out of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..names import unknown
from . import CheckpointError, UsageError, checkpoint
from .config import AUTO, TrainConfig
from .paths import check_path

_LONGEST = 2**16  # characters of a file; options are a few hundred
_SHOWN = 100  # characters of a value in an error

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
    values before the preset's, and the options that are left. ``--resume PATH`` gives what the run
    there was begun with, and all others count more.

    Raises UsageError for an unknown preset, a file that cannot be read, an unknown or repeated key
    or a value of another type, CheckpointError if there is no intact checkpoint to go on from.
    """
    preset, rest = _take(list(options), "--preset")
    file, rest = _take(rest, "--config")
    chosen: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise UsageError(unknown(f"--preset={preset}", preset, list(PRESETS)))
        chosen = PRESETS[preset]
    if file is not None:
        check_path("--config", file)
        chosen = chosen | read(Path(file))
    resume = _take(rest, "--resume")[0] or chosen.get("resume")
    config = TrainConfig()
    if resume not in (None, "None", AUTO):
        check_path("--resume", resume)
        path = Path(resume)
        from_file, state, _ = checkpoint.at(path)
        config = saved(from_file, state)
        config = replace(config, out=path if path.is_dir() else path.parent)
    return replace(config, **chosen), rest


def saved(path: Path, state: dict[str, Any]) -> TrainConfig:
    """The options of the run whose checkpoint ``state`` was loaded from ``path``; CheckpointError
    if one is of another type."""
    hints, given = get_type_hints(TrainConfig), state["config"]
    options = {}
    for name in (f.name for f in fields(TrainConfig) if f.name in given):
        try:
            options[name] = _typed(given[name], hints[name])
        except (TypeError, OverflowError):
            raise CheckpointError(
                f"{path} was not written by mfef train: its option {name} is not "
                f"{_described(hints[name])}; use another checkpoint"
            ) from None
    return TrainConfig(**options | {"resume": None, "download": False, "seeds": ()})


def read(path: Path) -> dict[str, Any]:
    """The options in a YAML file, by name, with the types that TrainConfig gives them."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
        if len(text) > _LONGEST:
            raise UsageError(f"--config={path} is longer than {_LONGEST} characters; shorten it")
        root = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UsageError(
            f"--config={path} cannot be read ({error.strerror}); name a YAML file"
        ) from error
    # ValueError: no UTF-8, or a date or number that there is not.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _no_yaml(path, error) from error
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"--config={path} holds no options; write one as `epochs: 30` to a line")
    hints = get_type_hints(TrainConfig)
    names = [f.name for f in fields(TrainConfig)]
    options: dict[str, Any] = {}
    for key, node in root.value:
        given = str(key.value)[:_SHOWN] if isinstance(key, yaml.ScalarNode) else "a list"
        name = given.replace("-", "_")
        if name not in names:
            raise UsageError(unknown(f"{path}: {given}", name, names))
        if name in options:  # of two YAML keeps the last
            raise UsageError(f"{path}: {given} is given twice; leave one out")
        try:
            options[name] = _at_home(_typed(_plain(node), hints[name]))
        except (TypeError, OverflowError):
            raise UsageError(
                f"{path}: {given}={_shown(text, node)} is not {_described(hints[name])}"
            ) from None
        except (yaml.YAMLError, ValueError) as error:
            raise _no_yaml(path, error) from error
    return options


def _no_yaml(path: Path, error: Exception) -> UsageError:
    return UsageError(f"--config={path} is no YAML: {' '.join(str(error).split())[:500]}")


def _plain(node: yaml.Node) -> Any:
    """The value of a YAML node: a scalar or a list of these, as all options are. TypeError for
    others, which can be endless in a few lines."""
    parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(part, yaml.ScalarNode) for part in parts):
        raise TypeError
    loader = yaml.SafeLoader("")
    values = [loader.construct_object(part) for part in parts]
    return values if isinstance(node, yaml.SequenceNode) else values[0]


def _shown(text: str, node: yaml.Node) -> str:
    """The text that a node was read from, cut where it is long."""
    written = " ".join(text[node.start_mark.index : node.end_mark.index].split())
    return written if len(written) <= _SHOWN else written[:_SHOWN] + "..."


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
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(_typed(item, arguments[0]) for item in value)
    if get_origin(hint) is Literal:
        if value not in arguments:
            raise TypeError
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
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


def _at_home(value: Any) -> Any:
    """A path of a file as the shell would hand it over: ``~`` is a home there, not in a checkpoint,
    whose paths were handed over already. TypeError if it is nobody's."""
    if not isinstance(value, Path):
        return value
    try:
        return value.expanduser()
    except (RuntimeError, ValueError):  # there is no such user, or there can be none
        raise TypeError from None


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
