"""What a file must hold beside its hash: a hash says who wrote it last, not that it makes sense."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

MOST_CLASSES = 10**6
MOST_EPOCHS = 10**6
LONGEST_NAME = 1000


def check_checkpoint(state: Any) -> None:
    """ValueError, in a few words, unless ``state`` is what a run saves."""
    _need(isinstance(state, dict), "it is no dictionary")
    for name in _CHECKPOINT:
        _need(name in state, f"it has no {name}")
    for name in ("sums", "config", "distiller", "optimizer", "scaler", "average"):
        _need(_is_mapping(state[name]), f"{name} is no dictionary of names")
    _need(_is_whole(state["epoch"], 0, MOST_EPOCHS), "epoch is no number of epochs")
    _need(_is_whole(state["step"], 0, 2**63), "step is no number of steps")
    epoch, step = state["epoch"], state["step"]
    best = (1 if epoch else 0, epoch)
    _need(_is_whole(state["best_epoch"], *best), "best_epoch is none of its epochs")
    _need(_are_numbers(state["sums"].values()), "sums holds what is no finite number")
    _need(bool(step) or not state["sums"], "there are sums of no steps")
    for name in ("metrics", "timings"):
        _check_rows(name, state[name], epoch)
    students = state["config"].get("students", ())
    _need(isinstance(students, list | tuple), "config has no list of students")
    wanted = {"loss", "test/students", *(f"test/student{i}" for i in range(len(students)))}
    for row in state["metrics"]:
        _need(wanted <= set(row), "metrics lack loss or accuracy")
    for row in state["timings"]:
        good = row.get("train_seconds", 0) > 0 and row.get("method_seconds", -1) >= 0
        _need(good, "timings lack seconds")
    length = state["config"].get("epochs")
    _need(_is_whole(length, epoch + bool(step), MOST_EPOCHS), "config says of fewer epochs")
    _need(_is_mapping(state["config"].get("versions", {})), "versions are no dictionary")
    tensors = all(isinstance(value, Tensor) for value in state["distiller"].values())
    _need(tensors, "distiller holds what is no tensor")
    if state.get("teacher") is not None:
        _need(_is_mapping(state["teacher"]), "teacher is no dictionary")
        _need(isinstance(state["teacher"].get("sha256"), str), "teacher has no sha256")
        _check_build(state["teacher"].get("build"))
    if "data" in state:  # which version 0.1.0 did not write
        check_about(state["data"])
        for name in ("images", "sha256"):
            parts = state["data"].get(name)
            splits = {"train", "validation", "test"}
            _need(_is_mapping(parts) and set(parts) == splits, f"data: {name} is not by split")
        for name in ("dataset", "classes", "input_shape", "mean", "std", "scale"):
            _need(name in state["data"], f"data has no {name}")


_CHECKPOINT = (
    *("epoch", "step", "sums", "best_epoch", "metrics", "timings", "config"),
    *("distiller", "optimizer", "scaler", "average"),
)


def check_student(described: Any) -> None:
    """ValueError, in a few words, unless ``described`` says how to build a student."""
    _need(_is_mapping(described), "it is no dictionary")
    _need(isinstance(described.get("sha256"), str), "it has no sha256")
    build = described.get("build")
    _check_build(build)
    check_about(described)
    if "classes" in described:
        count = len(described["classes"])
        _need(count == build["num_classes"], f"classes are {count}, not {build['num_classes']}")
    if "input_shape" in described:
        same = described["input_shape"][0] == build["in_channels"]
        _need(same, "input_shape and in_channels differ")


def _check_build(build: Any) -> None:
    """ValueError, in a few words, unless ``build`` is a network that there can be."""
    _need(_is_mapping(build), "build is no dictionary")
    names = {"model", "in_channels", "num_classes", "strides", "tap"}
    _need(set(build) == names, f"build does not say {', '.join(sorted(names))}")
    _need(all(_is_name(build[name]) for name in ("model", "tap")), "model or tap is no name")
    _need(_is_whole(build["in_channels"], 1, 1024), "in_channels is not from 1 to 1024")
    limit = f"num_classes is not from 1 to {MOST_CLASSES}"
    _need(_is_whole(build["num_classes"], 1, MOST_CLASSES), limit)
    strides = build["strides"]
    _need(_is_list(strides) and len(strides) in (0, 3), "strides are not three")
    _need(all(_is_whole(s, 1, 8) for s in strides), "strides are not from 1 to 8")


def check_finished(config: dict[str, Any], summary: dict[str, Any]) -> None:
    """ValueError, in a few words, unless config.json and summary.json can be of a run."""
    _need(_is_whole(config["seed"], 0, 2**31), "seed is no number")
    _need(all(_is_name(config[name]) for name in ("method", "dataset")), "method is no name")
    students = config["students"]
    _need(_is_list(students) and all(map(_is_name, students)), "students are no list of names")
    _need(_is_name(summary["best_chosen_on"]), "best_chosen_on is no name")
    last, best = (summary[f"{when}_test_accuracy"] for when in ("last", "best"))
    _need(_is_mapping(last) and _is_mapping(best), "accuracies are not by role")
    _need(set(last) == set(best), "accuracies are of different roles")
    _need(_are_numbers([*last.values(), *best.values()]), "accuracies are no numbers")


def check_about(about: Any) -> None:
    """ValueError, in a few words, unless what ``about`` says of a data set can be."""
    _need(_is_mapping(about), "it is no dictionary")
    if "dataset" in about:
        _need(_is_name(about["dataset"]), "dataset is no name")
    if "classes" in about:
        names = about["classes"]
        good = _is_list(names) and len(names) > 0 and all(map(_is_name, names))
        _need(good, "classes are no list of names")
    if "input_shape" in about:
        shape = about["input_shape"]
        good = _is_list(shape) and len(shape) == 3 and all(_is_whole(s, 1, 2**16) for s in shape)
        _need(good, "input_shape is no (channels, height, width)")
    for name in ("mean", "std"):
        if name in about:
            good = _is_list(about[name]) and 0 < len(about[name]) <= 1024
            _need(good and _are_numbers(about[name]), f"{name} is no list of numbers")
    scale = about.get("scale", 1)
    _need(_is_number(scale) and scale > 0, "scale is no positive number")
    _need(all(value > 0 for value in about.get("std", ())), "std is not positive")
    _need(_is_whole(about.get("epoch", 0), 0, MOST_EPOCHS), "epoch is no number of epochs")
    accuracy = about.get("test_accuracy", 0)
    _need(_is_number(accuracy) and 0 <= accuracy <= 100, "test_accuracy is no percentage")


def check_optimizer(saved: dict[str, Any], fresh: dict[str, Any]) -> None:
    """ValueError, in a few words, unless ``saved`` is of an optimiser as ``fresh``, both from
    ``state_dict``. Another version of torch may know other settings."""
    groups: Any = saved.get("param_groups")
    own = fresh["param_groups"]
    _need(_is_list(groups) and len(groups) == len(own), "optimizer has other groups")
    for group, here in zip(groups, own, strict=True):
        good = _is_mapping(group) and {"params", "lr"} <= set(group) and _is_number(group["lr"])
        _need(good, "optimizer has other settings")
        same = all(group[name] == here[name] for name in here if name != "lr" and name in group)
        _need(same, "optimizer has other settings")


def check_momentum(momentum: Mapping[Tensor, Any]) -> None:
    """ValueError unless a loaded optimiser's state fits its parameters."""
    for parameter, kept in momentum.items():
        _need(isinstance(kept, dict), "optimizer holds no state of its parameters")
        buffer = kept.get("momentum_buffer")
        good = buffer is None or (isinstance(buffer, Tensor) and buffer.shape == parameter.shape)
        _need(good, "optimizer's momentum does not fit its parameters")


def check_scaler(scaler: dict[str, Any]) -> None:
    """ValueError unless ``scaler`` is empty or holds positive numbers."""
    numbers = {k: v for k, v in scaler.items() if k != "_growth_tracker"}
    good = _are_numbers(scaler.values()) and all(v > 0 for v in numbers.values())
    _need(good, "scaler holds what is no positive number")


def _check_rows(name: str, rows: Any, count: int) -> None:
    """ValueError unless ``rows`` are those of epochs 1 to ``count``, of the same finite numbers."""
    _need(_is_list(rows) and len(rows) == count, f"{name} are not those of {count} epochs")
    for number, row in enumerate(rows, 1):
        _need(_is_mapping(row) and _are_numbers(row.values()), f"{name} hold no numbers")
        _need(set(row) == set(rows[0]), f"{name} differ in their columns")
        _need(row.get("epoch") == number, f"{name} are not one row for every epoch")


def _need(holds: bool, complaint: str) -> None:
    if not holds:
        raise ValueError(complaint)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e308 and math.isfinite(value)


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(map(_is_number, values))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_NAME


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)
