"""What is left of a run: the closing table, learning curves and gate heat maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from . import checkpoint
from .display import score_line, scores
from .run import Run
from .writing import save_figure

# Draws a picture into a file, or says that there is none to draw.
Draw = Callable[[Path], bool]

P = ParamSpec("P")
R = TypeVar("R")

# Matplotlib is imported where something is drawn: where it cannot be, such as for an unknown
# MPLBACKEND, a run still has its summary and its table.


def names_as_they_are(draw: Callable[P, R]) -> Callable[P, R]:
    """A decorator: names of classes are shown as they are, $ and all. The logarithmic axes of
    curves need formulas."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import rc_context

        with rc_context({"text.parse_math": False}):
            return draw(*args, **kwargs)

    return drawn


def summary(run: Run) -> dict[str, Any]:
    """Test accuracy by role at the last and the best epoch, and the training speed.

    ``method_share_of_step`` is the method's share of the training time, 0 to 1, as
    :class:`~mfef_ext.train.timing.HeadClock` measures it; evaluation is in neither time.
    """
    seconds = sum(t["train_seconds"] for t in run.timings)
    held_out = len(run.dataset.validation)
    return {
        "data": run.fingerprint,
        "last_epoch": len(run.rows),
        "last_test_accuracy": scores(run.rows[-1], "test"),
        "best_epoch": run.best_epoch,
        "best_chosen_on": "validation" if held_out else "test",
        "to_quote": "best" if held_out else "last",
        "best_test_accuracy": scores(run.rows[run.best_epoch - 1], "test"),
        "images_per_second": len(run.dataset.train) * len(run.timings) / seconds,
        "method_share_of_step": sum(t["method_seconds"] for t in run.timings) / seconds,
    }


def table(run: Run) -> Table:
    """Accuracy on the test images of every role, at the last and at the best epoch."""
    config, result = run.config, summary(run)
    size, held_out = len(run.dataset.test), len(run.dataset.validation)
    grid = Table(
        title=f"{config.method} on {config.dataset}: % of {size} test images recognised",
        caption=f"best: mean of the students on {held_out} validation images, not on the test set"
        if held_out
        else "best: chosen ON THE TEST SET (--validation 0), so it flatters; quote the last epoch",
    )
    grid.add_column("")
    grid.add_column(f"last epoch ({result['last_epoch']})", justify="right")
    grid.add_column(f"best epoch ({result['best_epoch']})", justify="right")
    names = {"students": "mean of the students", "ensemble": "ensemble (mean of logits)"}
    for i, student in enumerate(config.students):
        names |= {f"student{i}": f"student {i} ({student})"}
        names |= {f"student{i}-ema": f"student {i}, averaged weights"}
    best = result["best_test_accuracy"]
    for role, last in result["last_test_accuracy"].items():
        grid.add_row(names.get(role, role), f"{last:.2f}", f"{best[role]:.2f}")
    return grid


def draw_all(figures: dict[str, Draw], folder: Path) -> tuple[list[str], str]:
    """Draws pictures, by the names of their files, into ``folder``, whatever becomes of others: the
    names of those that are there then, and which could not be drawn and why, or ""."""
    drawn: list[str] = []
    failed: dict[str, list[str]] = {}
    for name, draw in figures.items():
        try:
            if draw(folder / name):
                drawn.append(name)
        except Exception as error:  # of any library, for any reason
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            failed.setdefault(reason, []).append(str(folder / name))
    said = (f"{', '.join(names)} could not be drawn ({why})" for why, names in failed.items())
    return drawn, ", and ".join(said)


def draw_curves(run: Run, path: Path) -> bool:
    """PNG: loss terms and test accuracy by epoch. True: there is always a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in run.rows]
    for name in (k for k in run.rows[0] if "/" in k and not k.startswith(("validation", "test"))):
        style = "-" if name.startswith("ce/") else "--"
        left.plot(epochs, [row[name] for row in run.rows], style, label=name)
    left.set(title="loss terms, weights included", xlabel="epoch", ylabel="loss", yscale="log")
    for role in scores(run.rows[0], "test"):
        values = [row[f"test/{role}"] for row in run.rows]
        right.plot(epochs, values, label=role, lw=2.5 if role == "students" else 1.2)
    # The first epochs lie far below; what tells methods apart are the later ones.
    settled = [v for row in run.rows[len(run.rows) // 2 :] for v in scores(row, "test").values()]
    right.set(title="accuracy on the test images", xlabel="epoch", ylabel="%")
    right.set_ylim(max(0.0, min(settled) - 2), min(100.2, max(settled) + 2))
    right.axvline(run.best_epoch, color="grey", lw=0.8, ls=":", label="best epoch")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)
    return True


def draw_gates(run: Run, path: Path) -> bool:
    """PNG: for one test image of up to ten classes, the image and each student's spatial gate
    over it. False, and no file, if the method has no gates."""
    test, classes = run.dataset.test, run.dataset.classes
    run.distiller.eval()
    first = [int((test.y == c).nonzero()[0]) for c in range(min(len(classes), 10))]
    x, y = test[first]
    with torch.no_grad():
        gates = [gate.cpu() for gate in run.distiller.spatial_gates(x)]
        logits = run.distiller(x).logits
    if gates:
        answers = [logits[f"student{i}"].argmax(1).tolist() for i in range(len(gates))]
        said = [[classes[c] for c in own] for own in answers]
        _draw_gates(x, [classes[c] for c in y.tolist()], gates, said, path)
    return bool(gates)


@names_as_they_are
def _draw_gates(
    x: Tensor, names: list[str], gates: list[Tensor], said: list[list[str]], path: Path
) -> None:
    """PNG of images (N, C, H, W), the names of their classes, and of each student its gates (N, H,
    W) and the names of the classes that it says."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    # Both are brought to one size: pixels stay squares, the coarser gate becomes smooth.
    size = max(64, *x.shape[2:])
    large = F.interpolate((x - x.min()) / (x.max() - x.min()), size=size)
    pixels = large.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()
    rows, columns = 1 + len(gates), len(names)
    figure = Figure(figsize=(1.35 * columns + 1.4, 1.75 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    grid[0][0].set_ylabel("image")
    for column, name in enumerate(names):
        grid[0][column].imshow(pixels[column])
        grid[0][column].set_title(name, fontsize=10)
    for i, gate in enumerate(gates):
        smooth = F.interpolate(gate[:, None], size=size, mode="bilinear")[:, 0].numpy()
        # One scale per student, so that images can be compared; gates seldom span 0 to 1.
        heat = ScalarMappable(Normalize(smooth.min(), smooth.max()), "plasma")
        grid[i + 1][0].set_ylabel(f"student {i}")
        for column, axes in enumerate(grid[i + 1]):
            # Colour says the gate and brightness the image, so neither hides the other.
            brightness = 0.35 + 0.65 * pixels[column]
            axes.imshow(heat.to_rgba(smooth[column])[..., :3] * brightness)
            axes.set_xlabel(f"says {said[i][column]}", fontsize=8)
        figure.colorbar(heat, ax=list(grid[i + 1]), label="spatial gate", pad=0.01)
    save_figure(figure, path)


def describe(path: Path) -> str:
    """A few lines on a run folder or a checkpoint in it; CheckpointError if it is not intact."""
    file = path / checkpoint.LAST if path.is_dir() else path
    state = checkpoint.load(file)
    config, last = state["config"], state["metrics"][-1] if state["metrics"] else {}
    part = f" and {state['step']} steps" if state["step"] else ""
    lines = [
        f"{file}: intact, after {state['epoch']} of {config['epochs']} epochs{part}, "
        f"{config['method']} on {config['dataset']}, students {' '.join(config['students'])}, "
        f"seed {config['seed']}"
    ]
    return "\n".join(
        lines + [s for split in ("validation", "test") if (s := score_line(last, split))]
    )
