"""``mfef plot``: what a run learnt, as pictures: confusion, diversity, features, curves, gates."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import UsageError, report
from .evaluate import restore
from .writing import save_figure

# t-SNE takes seconds per thousand points; more of them only cover one another.
TSNE_IMAGES = 1000


def plot(
    path: Path,
    checkpoint: str = "last",
    device: str | None = None,
    data_dir: Path | None = None,
) -> str:
    """Draws what the run ``path`` makes of its test images into PNG files in it; says which they
    are, and how diverse the students. Other checkpoints than the last are named in the files'.

    Raises UsageError, and prints what it would have returned, where one cannot be drawn; the others
    are there then.
    """
    run = restore(path, checkpoint, device, data_dir)
    test, which = run.dataset.test, "" if checkpoint == "last" else f"-{checkpoint}"
    with torch.no_grad():
        outputs = [run.distiller(x).logits for x in test.x.split(512)]
        some = torch.linspace(0, len(test) - 1, min(len(test), TSNE_IMAGES)).long()
        x, labels = test.x[some.to(test.x.device)], test.y.cpu()
        features = [run.distiller.features(part) for part in x.split(512)]
    logits = {role: torch.cat([z[role] for z in outputs]).float().cpu() for role in outputs[0]}
    pooled = {role: torch.cat([f[role] for f in features]).float().cpu() for role in features[0]}
    students = torch.stack([logits[f"student{i}"] for i in range(len(run.specs))])
    distance, disagreement = diversity(students)

    classes = run.dataset.classes
    figures: dict[str, report.Draw] = {
        "confusion": partial(draw_confusion, logits, labels, classes),
        "tsne": partial(draw_tsne, pooled, labels[some], classes, run.config.seed),
        "diversity": partial(draw_diversity, distance, disagreement),
        "gates": partial(report.draw_gates, run),
    }
    if not which:  # other checkpoints do not know all epochs
        figures["curves"] = partial(report.draw_curves, run)
    drawn, failed = report.draw_all({f"{n}{which}.png": f for n, f in figures.items()}, path)
    lines = [
        f"students {i} and {j}: mean distance of softmax outputs {distance[i, j]:.4f}, different "
        f"answers for {disagreement[i, j]:.2f} % of {len(test)} test images"
        for i, j in combinations(range(len(students)), 2)
    ]
    answer = "\n".join([*run.complaints, *lines, f"{path}: {', '.join(drawn) or 'no pictures'}"])
    if failed:
        print(answer)
        raise UsageError(f"{failed}; mend that, and call mfef plot {path} again")
    return answer


def diversity(students: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """How far each pair of students is apart: two (m, m) arrays from their logits (m, N, classes).

    The mean Euclidean distance of their softmax outputs, 0 to sqrt(2) (Chen 2020, section 4.3), and
    the share of images, in percent, for which their answers differ.
    """
    outputs, answers = students.double().softmax(2), students.argmax(2)
    distance = (outputs[:, None] - outputs[None]).norm(dim=3).mean(2)
    differ = (answers[:, None] != answers[None]).double().mean(2)
    return distance.numpy(), 100 * differ.numpy()


@report.names_as_they_are
def draw_confusion(
    logits: dict[str, Tensor], labels: Tensor, classes: tuple[str, ...], path: Path
) -> bool:
    """PNG: per role, how many percent of each class (rows) were taken for which (columns). True:
    there is always a picture."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from sklearn.metrics import confusion_matrix

    names = len(classes) <= 20
    side = 4.4 if names else 6.0
    figure = Figure(figsize=(side * len(logits) + 0.8, side + 0.4), layout="constrained")
    row = figure.subplots(1, len(logits), squeeze=False)[0]
    for axes, (role, z) in zip(row, logits.items(), strict=True):
        known = range(len(classes))
        shares = confusion_matrix(labels, z.argmax(1), labels=known, normalize="true") * 100
        # The root brings out the few that are wrong.
        image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
        right = 100 * float((z.argmax(1) == labels).double().mean())
        axes.set(title=f"{role}: {right:.2f} %", xlabel="answer", ylabel="class")
        if names:
            axes.set_xticks(known, classes, rotation=90)
            axes.set_yticks(known, classes)
            for i, j in zip(*shares.nonzero(), strict=True):
                dark = "white" if shares[i, j] > 40 else "black"
                axes.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", c=dark, size=7)
    figure.colorbar(image, ax=list(row), label="% of the class", pad=0.01)
    save_figure(figure, path)
    return True


def draw_diversity(distance: np.ndarray, disagreement: np.ndarray, path: Path) -> bool:
    """PNG: both measures of :func:`diversity`, every student against every other. False, and no
    file, for one student alone."""
    if len(distance) < 2:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    titles = ("mean distance of softmax outputs", "different answers, % of the images")
    pairs = zip(figure.subplots(1, 2), titles, (distance, disagreement), (4, 2), strict=True)
    for axes, title, values, digits in pairs:
        axes.imshow(values, cmap="Purples", vmin=0, vmax=2 * max(values.max(), 1e-9))
        axes.set(title=title, xlabel="student", ylabel="student")
        axes.set_xticks(range(len(values)))
        axes.set_yticks(range(len(values)))
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, f"{value:.{digits}f}", ha="center", va="center")
    save_figure(figure, path)
    return True


@report.names_as_they_are
def draw_tsne(
    features: dict[str, Tensor], labels: Tensor, classes: tuple[str, ...], seed: int, path: Path
) -> bool:
    """PNG: per role, its features (N, C) brought to the plane by t-SNE, coloured by class. True:
    there is always a picture."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(4.4 * len(features) + 1.4, 4.6), layout="constrained")
    row = figure.subplots(1, len(features), squeeze=False)[0]
    colours = colormaps["tab10" if len(classes) <= 10 else "hsv"].resampled(len(classes))
    for axes, (role, points) in zip(row, features.items(), strict=True):
        near = min(30.0, (len(points) - 1) / 3)  # the usual perplexity, where there are the points
        plane = TSNE(perplexity=near, random_state=seed).fit_transform(points.numpy())
        axes.set(title=f"{role}, {points.shape[1]} features", xticks=[], yticks=[])
        for c in labels.unique().tolist():
            own = plane[(labels == c).numpy()]
            axes.scatter(own[:, 0], own[:, 1], s=8, color=colours(c), label=classes[c])
    if len(classes) <= 20:
        row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, markerscale=2)
    save_figure(figure, path)
    return True
