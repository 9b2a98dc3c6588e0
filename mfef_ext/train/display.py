"""What is seen while training runs: a live bar on a terminal, a plain line per epoch anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def scores(row: dict[str, Any], split: str) -> dict[str, float]:
    """The accuracies of one split ("validation", "test") in a row of metrics, by role."""
    return {k.removeprefix(split + "/"): v for k, v in row.items() if k.startswith(split + "/")}


def score_line(row: dict[str, Any], split: str) -> str:
    """``validation %: student0 98.60  student1 ...``, or "" if the row has no such split."""
    found = "  ".join(f"{role} {v:.2f}" for role, v in scores(row, split).items())
    return f"{split} %: {found}" if found else ""


class Display:
    """A context manager that the training loop tells of every step and every epoch."""

    def __init__(self, console: Console, epochs: int) -> None:
        self._epochs = epochs
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
        )
        off = not console.is_terminal
        self._progress = Progress(*columns, console=console, transient=True, disable=off)
        self._task = self._progress.add_task("", total=None, epoch=1, loss=0.0)
        self._events: SummaryWriter | None = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        if self._events is not None:
            self._events.close()

    def record(self, folder: Path, epoch: int) -> None:
        """From ``epoch`` on every epoch also goes into ``folder``, for TensorBoard, which forgets
        those that a run recorded before it was killed and does again."""
        from torch.utils.tensorboard import SummaryWriter  # seconds, so only where it is asked for

        self._events = SummaryWriter(str(folder), purge_step=epoch)

    def say(self, line: str) -> None:
        """A line of text, at once."""
        # As it is: a folder can be called [b].
        self._progress.console.print(
            line, highlight=False, soft_wrap=True, markup=False, emoji=False
        )

    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """After every step; ``epoch`` and ``step`` count from 1."""
        done, total = (epoch - 1) * steps + step, self._epochs * steps
        self._progress.update(self._task, total=total, completed=done, epoch=epoch, loss=loss)

    def epoch(self, row: dict[str, Any], images_per_second: float) -> None:
        """After every epoch, with its row of metrics."""
        number = f"{row['epoch']:>{len(str(self._epochs))}}/{self._epochs}"
        if self._events is not None:
            for name, value in (row | {"images_per_second": images_per_second}).items():
                self._events.add_scalar(name, value, row["epoch"])
            self._events.flush()
        line = score_line(row, "validation") or score_line(row, "test")
        self.say(
            f"epoch {number}  loss {row['loss']:.3f}  {line}  ({images_per_second:.0f} images/s)"
        )
