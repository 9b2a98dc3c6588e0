"""``mfef train`` and the commands on its runs: options in, exit status out."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import field, fields, make_dataclass, replace
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from ..signals import Terminated, sigterm_raises
from . import (
    CheckpointError,
    DataError,
    InterruptedByUser,
    NotFiniteError,
    UsageError,
    missing_extras,
)

if TYPE_CHECKING:
    from rich.console import Console

    from .config import TrainConfig
    from .processes import Processes
    from .run import Run

DONE, USAGE, DATA, FILES, NOT_FINITE, INTERRUPTED = 0, 2, 3, 4, 5, 75


def _refuse(message: str, status: int, quiet: bool = False) -> int:
    """Prints why the command ends, in one line, unless another process says the same."""
    if not quiet:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        print(f"mfef: {line}", file=sys.stderr)
    return status


def _status(error: Exception) -> int:
    if isinstance(error, UsageError):
        return USAGE
    return DATA if isinstance(error, DataError) else FILES


def _check_extras() -> None:
    if missing_extras():
        names = ", ".join(missing_extras())
        raise UsageError(f"training needs {names}; run: pip install 'mfef_ext[train]'")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as ``argv`` says. 0 done, 2 usage, 3 data, 4 files, 5 not finite, 75 stopped."""
    from .processes import leave

    with sigterm_raises():
        try:
            return _main(sys.argv[1:] if argv is None else list(argv))
        finally:
            leave()


def _main(argv: list[str]) -> int:
    from .processes import SaidElsewhere, is_loss_of_another, of_environment

    config, others = None, False
    try:
        others = of_environment().rank > 0  # who meet the same as process 0
        config, processes = _meet(argv)
        if config.seeds:
            _train_seeds(config, processes)
        else:
            _train_and_report(config, processes)
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
        assert config is not None
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
            "stopped: another process ended, or did not answer within --timeout; checkpoints "
            "already written are whole, and the same command with the run's folder as --out and "
            "--resume auto goes on",
            INTERRUPTED,
            others,
        )
    except KeyboardInterrupt as error:  # outside of the steps, or for the second time
        who = "SIGTERM" if isinstance(error, Terminated) else "Ctrl-C"
        return _refuse(
            f"stopped at once by {who}; checkpoints already written are whole, and the same "
            "command with the run's folder as --out and --resume auto goes on",
            INTERRUPTED,
        )
    return DONE


def _meet(argv: list[str]) -> tuple[TrainConfig, Processes]:
    """The configuration that ``argv`` gives, here as in all other processes, who are met first:
    what is wrong in one of them, or not the same, is a UsageError in all."""
    from .processes import TIMEOUT, meet, of_environment

    found: list[TrainConfig] = []
    wrong: list[Exception] = []
    try:
        found.append(_parsed(argv, alone=of_environment().ranks == 1))
    except (UsageError, CheckpointError) as error:
        wrong.append(error)
    try:
        processes = meet(found[0].timeout if found else _timeout(argv, TIMEOUT))
    except UsageError as error:
        raise (wrong or [error])[0] from None

    def settled() -> TrainConfig:
        if wrong:
            raise wrong[0]
        return found[0]

    config = processes.together(settled)
    processes.agree(_common(config))
    return config, processes


def _parsed(argv: list[str], alone: bool) -> TrainConfig:
    """What the options say, checked. ``alone``: the parser speaks for itself, and ends the process;
    else what it says is raised."""
    _check_extras()
    import tyro

    from .config import TrainConfig
    from .presets import configured

    config, options = configured(argv)
    said = StringIO()
    try:
        with nullcontext() if alone else redirect_stderr(said):
            described = _described(TrainConfig)
            default = described(**vars(config))
            parsed = tyro.cli(described, prog="mfef train", default=default, args=options)
            config = TrainConfig(**vars(parsed))
    except SystemExit as exit:
        if alone or not exit.code:
            raise
        raise UsageError(re.sub(r"[\s\u2500-\u257f]+", " ", said.getvalue()).strip()) from None
    if "--seeds" in options and not config.seeds:
        raise UsageError("--seeds names no seed; give one or more, such as --seeds 0 1 2")
    config.check()
    return config


def _described(options: type) -> type:
    """A dataclass with the same fields, whose docstrings are the parser's help, a line each: it
    would keep the lines of the source."""
    import tyro
    from docstring_parser import parse_from_object

    hints = get_type_hints(options)
    texts = {p.arg_name: p.description for p in parse_from_object(options).params}
    described = [
        (
            f.name,
            Annotated[hints[f.name], tyro.conf.arg(help=" ".join((texts[f.name] or "").split()))],
            field(default=f.default),
        )
        for f in fields(options)
    ]
    made = make_dataclass(options.__name__, described, frozen=True)
    made.__doc__ = options.__doc__
    return made


def _timeout(argv: list[str], default: float) -> float:
    """The --timeout in options that make no sense otherwise."""
    given = re.search(r"(?:^|\0)--timeout[=\0]([0-9.]{1,9})(?:\0|$)", "\0".join(argv))
    try:
        return max(float(given[1]), 1.0) if given else default
    except ValueError:
        return default


def _common(config: TrainConfig) -> dict[str, object]:
    """What has to be the same in all processes, by its name, but the data."""
    import torch

    from .. import version
    from .config import OF_THE_MACHINE

    options = {
        f"--{f.name.replace('_', '-')}": getattr(config, f.name)
        for f in fields(config)
        if f.name not in OF_THE_MACHINE
    }
    root = Path(version.__file__).parent
    code = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        code.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return options | {
        "MFEF_BACKEND": os.environ.get("MFEF_BACKEND"),
        "the version of mfef_ext": version.__version__,
        "the version of torch": torch.__version__,
        "the code of mfef_ext, whose files have the hash": code.hexdigest()[:12],
    }


def look(command: str, **options: Any) -> int:
    """``mfef`` show, eval, export, plot and table: prints what they find in runs that were trained.
    0 done, 2 usage, 4 files."""
    try:
        _check_extras()
    except UsageError as error:
        return _refuse(str(error), USAGE)
    from . import evaluate, export, plot, report, table
    from .paths import check_path

    commands: dict[str, Callable[..., str]] = {
        "show": report.describe,
        "eval": evaluate.evaluate,
        "export": export.export,
        "plot": plot.plot,
        "table": table.table,
    }
    try:
        for name, given in options.items():
            for path in given if isinstance(given, list) else [given]:
                if isinstance(path, Path):
                    of_a_run = name in ("path", "paths")
                    check_path("RUN" if of_a_run else f"--{name.replace('_', '-')}", path)
        answer = commands[command](**options)
    except (UsageError, DataError, CheckpointError) as error:
        return _refuse(str(error), _status(error))
    except OSError as error:
        return _refuse(f"a file cannot be read or written: {error}", FILES)
    print(answer)
    return DONE


def verify(dataset: str, data_dir: Path | None, every: bool = False) -> int:
    """Prints what the data set holds, and every problem with it; of files that are remarked on the
    names of three, or ``every`` one. 0 whole, 2 usage, 3 not whole."""
    try:
        _check_extras()
        from . import data
        from .config import TrainConfig

        TrainConfig(dataset=dataset, data_dir=data_dir).check()
        facts, problems = data.verify(dataset, data_dir or Path(), every)
    except UsageError as error:
        return _refuse(str(error), USAGE)
    for fact in facts:
        print(fact)
    for problem in problems:
        _refuse(problem, DATA)
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    print(f"{dataset}: {count if problems else 'whole'}")
    return DATA if problems else DONE


def _train_seeds(config: TrainConfig, processes: Processes) -> None:
    """A run per seed in folders of one, and the table of all."""
    from . import run_folder, table

    made = config.out is None or not os.path.exists(config.out)
    with run_folder.place(config.out, f"{config.method}-{config.dataset}") as where:
        out = where.path
        if made or not config.resume:
            out = processes.first(where.create)
        else:
            processes.first(where.hold)
            if processes.first((out / "config.json").exists):
                raise UsageError(
                    f"--out={out} holds a run that was begun without --seeds; leave --seeds out to "
                    "go on with it, or name another folder"
                )
        try:
            for seed in config.seeds:
                one = replace(config, seed=seed, seeds=(), out=out / f"seed{seed}")
                _train_and_report(one, processes)
        except (UsageError, DataError):
            if made and processes.rank == 0:
                where.release()
                run_folder.remove_if_empty(out)
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


def _train_and_report(config: TrainConfig, processes: Processes) -> None:
    import torch
    from rich.console import Console

    from . import loop, run_folder
    from .display import Display

    torch.set_num_threads(config.thread_count)
    processes = processes.on(config.device)
    processes.together(partial(_check_surroundings, config))
    console = Console(quiet=processes.rank > 0)
    with run_folder.place(config.out, f"{config.method}-{config.dataset}") as where:
        with Display(console, config.epochs) as display:
            run = loop.train(config, display, processes, where)
        if run.writes:
            _report(run, console)


def _report(run: Run, console: Console) -> None:
    """Leaves the summary and the pictures of a run that has come to its end, and prints them."""
    from . import report, run_folder

    method = run.config.method
    result = report.summary(run)
    run_folder.write_json(run.path / "summary.json", result)
    figures = {"curves.png": report.draw_curves, "gates.png": report.draw_gates}
    draws: dict[str, report.Draw] = {name: partial(draw, run) for name, draw in figures.items()}
    drawn, failed = report.draw_all(draws, run.path)
    if failed:  # which does not undo a run that is whole
        print(
            f"mfef: warning: {failed}; the run is whole, and mfef plot {run.path} draws it",
            file=sys.stderr,
        )
    console.print(report.table(run))
    print(
        f"{result['images_per_second']:.0f} images per second; what {method} adds (forward "
        f"and backward, all losses) takes {100 * result['method_share_of_step']:.0f} % of a step"
    )
    print(f"{run.path}: {', '.join(['students, checkpoints, metrics', *drawn])}")


if __name__ == "__main__":
    from ..cli import main as mfef

    sys.argv.insert(1, "train")
    sys.exit(mfef())
