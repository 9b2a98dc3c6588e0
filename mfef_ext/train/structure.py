"""What a file must hold beside its hash: a hash says who wrote it last, not that it makes sense."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..names import shown

MAX_CLASSES = 10**6
MAX_EPOCHS = 10**6
LONGEST_NAME = 1000
_REAL = {
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def check_checkpoint(state: Any) -> None:
    """ValueError, in a few words, unless ``state`` is what a run saves."""
    _need(isinstance(state, dict), "it is no dictionary")
    for name in _CHECKPOINT:
        _need(name in state, f"it has no {name}")
    for name in ("sums", "config", "distiller", "optimizer", "scaler", "average"):
        _need(_is_mapping(state[name]), f"{name} is no dictionary of names")
    _need(_is_whole(state["epoch"], 0, MAX_EPOCHS), "epoch is no number of epochs")
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
    _need(_is_whole(length, epoch + bool(step), MAX_EPOCHS), "config says of fewer epochs")
    _need(_is_mapping(state["config"].get("versions", {})), "versions are no dictionary")
    for name in ("distiller", "average"):
        check_weights(name, state[name])
    averaged = state["config"].get("ema") is not None
    _need(averaged or not state["average"], "there is an average, and config has no ema")
    if state.get("teacher") is not None:
        _need(_is_mapping(state["teacher"]), "teacher is no dictionary")
        _need(_is_hash(state["teacher"].get("sha256")), "teacher has no sha256")
        _check_build(state["teacher"].get("build"))
    if "data" in state:  # which version 0.1.0 did not write
        _check_fingerprint(state["data"])


_CHECKPOINT = (
    *("epoch", "step", "sums", "best_epoch", "metrics", "timings", "config"),
    *("distiller", "optimizer", "scaler", "average"),
)


def check_weights(what: str, weights: Mapping[str, Any]) -> None:
    """ValueError, in a few words, unless ``weights`` are tensors that a run can have: it ends
    before it saves what is not finite."""
    for name, tensor in weights.items():
        _check_tensor(f"{shown(name)} of {what}", tensor)


def _check_tensor(what: str, tensor: Any) -> None:
    real = isinstance(tensor, Tensor) and tensor.dtype in _REAL and not tensor.is_meta
    _need(real and tensor.layout == torch.strided, f"{what} is no tensor of real numbers")
    _need(bool(tensor.isfinite().all()), f"{what} is not finite")


def _check_fingerprint(data: Any) -> None:
    """ValueError, in a few words, unless ``data`` can be the fingerprint of a data set."""
    _check_about(data, "scale")
    for name, holds, what in (
        ("images", lambda v: _is_whole(v, 0, 2**63), "numbers of images"),
        ("sha256", _is_hash, "hashes"),
    ):
        parts = data.get(name)
        by_split = _is_mapping(parts) and set(parts) == {"train", "validation", "test"}
        _need(by_split, f"data: {name} is not by split")
        _need(all(map(holds, parts.values())), f"data: {name} are no {what}")


def check_student(described: Any) -> None:
    """ValueError, in a few words, unless ``described`` says how to build a student, and what of."""
    _check_about(described, "epoch", "test_accuracy")
    _need(_is_hash(described.get("sha256")), "it has no sha256")
    build = described.get("build")
    _check_build(build)
    count = len(described["classes"])
    _need(count == build["num_classes"], f"classes are {count}, not {build['num_classes']}")
    same = described["input_shape"][0] == build["in_channels"]
    _need(same, "input_shape and in_channels differ")


def _check_build(build: Any) -> None:
    """ValueError, in a few words, unless ``build`` is a network that there can be."""
    _need(_is_mapping(build), "build is no dictionary")
    names = {"model", "in_channels", "num_classes", "strides", "tap"}
    _need(set(build) == names, f"build does not say {', '.join(sorted(names))}")
    named = all(_is_name(build[name]) and build[name] for name in ("model", "tap"))
    _need(named, "model or tap is no name")
    _need(_is_whole(build["in_channels"], 1, 1024), "in_channels is not from 1 to 1024")
    limit = f"num_classes is not from 1 to {MAX_CLASSES}"
    _need(_is_whole(build["num_classes"], 1, MAX_CLASSES), limit)
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
    if "data" in config:
        _check_fingerprint(config["data"])


def _check_about(about: Any, *more: str) -> None:
    """ValueError, in a few words, unless what ``about`` says of a data set, ``more`` among it, can
    be."""
    _need(_is_mapping(about), "it is no dictionary")
    for name in ("dataset", "classes", "input_shape", "mean", "std", *more):
        _need(name in about, f"it does not say {name}")
    _need(_is_name(about["dataset"]), "dataset is no name")
    classes = about["classes"]
    good = _is_list(classes) and len(classes) > 0 and all(map(_is_name, classes))
    _need(good, "classes are no list of names")
    _need(len(set(classes)) == len(classes), "two classes have the same name")
    shape = about["input_shape"]
    good = _is_list(shape) and len(shape) == 3 and all(_is_whole(s, 1, 2**16) for s in shape)
    _need(good, "input_shape is no (channels, height, width)")
    for name in ("mean", "std"):
        good = _is_list(about[name]) and _are_numbers(about[name])
        _need(good, f"{name} is no list of numbers")
        fits = len(about[name]) in (1, shape[0])
        _need(fits, f"{name} has {len(about[name])} numbers for {shape[0]} channels")
    # Images are float32, and so is what they are normalised with.
    mean, std = (torch.tensor(about[name], dtype=torch.float32) for name in ("mean", "std"))
    _need(bool(mean.isfinite().all()), "mean is beyond float32")
    _need(bool((std > 0).all() and std.isfinite().all()), "std is not positive")
    scale = about.get("scale", 1)
    _need(_is_number(scale) and scale > 0, "scale is no positive number")
    _need(_is_whole(about.get("epoch", 0), 0, MAX_EPOCHS), "epoch is no number of epochs")
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
        if buffer is not None:
            _check_tensor("optimizer's momentum", buffer)
            fits = buffer.shape == parameter.shape
            _need(fits, "optimizer's momentum does not fit its parameters")


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
    if not isinstance(value, str) or len(value) > LONGEST_NAME:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)  # half of one


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)
