"""``mfef train`` and the commands on its runs: options in, exit status out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import DataError, InterruptedByUser, NotFiniteError, UsageError, folder, missing_extras

if TYPE_CHECKING:
    from .config import TrainConfig

DONE, USAGE, DATA, FILES, NOT_FINITE, INTERRUPTED = 0, 2, 3, 4, 5, 75


def _refuse(message: str, status: int, quiet: bool = False) -> int:
    """Prints why the command ends, unless another process says the same."""
    if not quiet:
        print(f"mfef: {message}", file=sys.stderr)
    return status


def _status(error: Exception) -> int:
    if isinstance(error, UsageError):
        return USAGE
    return DATA if isinstance(error, DataError) else FILES


def _without_extras() -> int:
    names = ", ".join(missing_extras())
    return _refuse(f"training needs {names}; run: pip install 'mfef_ext[train]'", USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as ``argv`` says. 0 done, 2 usage, 3 data, 4 files, 5 not finite, 75 stopped."""
    if missing_extras():
        return _without_extras()
    import tyro

    from .checkpoint import CheckpointError
    from .config import TrainConfig
    from .presets import configured
    from .processes import SaidElsewhere, is_loss_of_another, leave

    others = int(os.environ.get("RANK", "0")) > 0  # who meet the same as process 0
    try:
        config, options = configured(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        return _refuse(str(error), USAGE, others)
    config = tyro.cli(TrainConfig, prog="mfef train", default=config, args=options)
    try:
        if "--seeds" in options and not config.seeds:
            raise UsageError("--seeds names no seed; give one or more, such as --seeds 0 1 2")
        config.check()
    except UsageError as error:
        return _refuse(str(error), USAGE, others)
    try:
        if config.seeds:
            _train_seeds(config)
        else:
            _train_and_report(config)
    except (UsageError, DataError, CheckpointError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):  # a full disk has no file name; the last checkpoint is whole
            message = f"a file could not be written ({error}); make room or allow it, and try again"
        return _refuse(message, _status(error), isinstance(error.__cause__, SaidElsewhere))
    except NotFiniteError as error:
        return _refuse(
            f"stopped: {error}; try a smaller --lr. The last good epoch is kept: "
            f"mfef show {error.folder}",
            NOT_FINITE,
            others,
        )
    except InterruptedByUser as error:
        out = error.folder.parent if error.folder and config.seeds else error.folder
        return _refuse(
            f"stopped: {error}. The same command with --out {out} --resume auto goes on",
            INTERRUPTED,
            others,
        )
    except RuntimeError as error:
        if not is_loss_of_another(error):
            raise
        return _refuse(
            "stopped: another process ended; checkpoints already written are whole, and the same "
            "command with the run's folder as --out and --resume auto goes on",
            INTERRUPTED,
            others,
        )
    except KeyboardInterrupt:  # before the first step, after the last, or for the second time
        return _refuse(
            "stopped at once; checkpoints already written are whole", INTERRUPTED, others
        )
    finally:
        leave()
    return DONE


def look(command: str, **options: Any) -> int:
    """``mfef`` show, eval, export, plot and table: prints what they find in runs that were trained.
    0 done, 2 usage, 4 files."""
    if missing_extras():
        return _without_extras()
    from . import evaluate, export, plot, report, table
    from .checkpoint import CheckpointError

    commands: dict[str, Callable[..., str]] = {
        "show": report.describe,
        "eval": evaluate.evaluate,
        "export": export.export,
        "plot": plot.plot,
        "table": table.table,
    }
    try:
        answer = commands[command](**options)
    except (UsageError, DataError, CheckpointError) as error:
        return _refuse(str(error), _status(error))
    except OSError as error:
        return _refuse(f"a file cannot be read or written: {error}", FILES)
    print(answer)
    return DONE


def verify(dataset: str, data_dir: Path | None) -> int:
    """Prints what the data set holds, and every problem with it. 0 whole, 2 usage, 3 not whole."""
    if missing_extras():
        return _without_extras()
    from . import data
    from .config import TrainConfig

    try:
        TrainConfig(dataset=dataset, data_dir=data_dir).check()
        facts, problems = data.verify(dataset, data_dir or Path())
    except UsageError as error:
        return _refuse(str(error), USAGE)
    for fact in facts:
        print(fact)
    for problem in problems:
        _refuse(problem, DATA)
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    print(f"{dataset}: {count if problems else 'whole'}")
    return DATA if problems else DONE


def _train_seeds(config: TrainConfig) -> None:
    """A run per seed in folders of one, and the table of all."""
    from . import table
    from .processes import join

    processes = join(config.device)
    out, made = config.out, config.out is None or not config.out.exists()
    if out is None or not config.resume:
        name = f"{config.method}-{config.dataset}"
        out = processes.first(partial(folder.create, out, name))
    elif processes.first((out / "config.json").exists):
        raise UsageError(
            f"--out={out} holds a run that was begun without --seeds; leave --seeds out to go on "
            "with it, or name another folder"
        )
    try:
        for seed in config.seeds:
            _train_and_report(replace(config, seed=seed, seeds=(), out=out / f"seed{seed}"))
    except (UsageError, DataError):
        if made and processes.rank == 0:
            folder.remove_if_empty(out)
        raise
    if processes.rank == 0:
        print(table.table([out]))


def _check_surroundings(config: TrainConfig) -> None:
    from ..inspection import build_info

    if config.tensorboard and find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs a package; run: pip install tensorboard")
    try:
        build_info()
    except ValueError as error:  # MFEF_USE_ISA names what this processor has not
        raise UsageError(f"MFEF_USE_ISA: {error}") from error


def _train_and_report(config: TrainConfig) -> None:
    import torch
    from rich.console import Console

    from . import loop, report
    from .display import Display
    from .processes import join

    torch.set_num_threads(config.thread_count)
    processes = join(config.device)
    processes.together(partial(_check_surroundings, config))
    console = Console(quiet=processes.rank > 0)
    with Display(console, config.epochs) as display:
        run = loop.train(config, display, processes)
    if not run.writes:
        return
    result = report.summary(run)
    folder.write_json(run.path / "summary.json", result)
    report.draw_curves(run, run.path / "curves.png")
    drawn = report.draw_gates(run, run.path / "gates.png")
    console.print(report.table(run))
    print(
        f"{result['images_per_second']:.0f} images per second; what {config.method} adds (forward "
        f"and backward, all losses) takes {100 * result['method_share_of_step']:.0f} % of a step"
    )
    print(f"{run.path}: students, checkpoints, metrics, curves.png" + ", gates.png" * drawn)


if __name__ == "__main__":
    sys.exit(main())
