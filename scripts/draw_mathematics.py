"""Draw the pictures of docs/mathematics.md, every point measured with the library's own estimators.

python scripts/draw_mathematics.py            # all of them, a minute or two
python scripts/draw_mathematics.py noise      # one
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from estimates import estimates
from matplotlib.axes import Axes

from zoft.estimators.central import Central
from zoft.estimators.one_point import OnePoint
from zoft.estimators.one_sided import OneSided
from zoft.subspaces.full import Full

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLUE, GREEN, RED, ORANGE, GREY, INK = "#2f6db5", "#1f8a5b", "#b5402f", "#c98a1b", "#8a8f98", "#2b2f36"


def mean_square(samples: np.ndarray, gradient: np.ndarray | float) -> float:
    return float(((samples - gradient) ** 2).sum(1).mean())


def dress(axes: Axes, title: str, x: str, y: str, *, loglog: bool = True) -> None:
    axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if loglog:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)


def taylor() -> None:
    """Error of one slope against h: the curvature's share to the right, rounding's to the left."""
    x, gradient = np.full(1, 0.2), 1 + 2 * 0.2 + 3 * 0.2**2 + 4 * 0.2**3
    f = lambda xs: (xs + xs**2 + xs**3 + xs**4).sum(-1)  # noqa: E731
    second, third = 2 + 6 * 0.2 + 12 * 0.2**2, 6 + 24 * 0.2
    hs = np.geomspace(1e-14, 0.3, 60)
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    for kind, colour, name, bias in (
        (OneSided, BLUE, "forward", lambda h: second * h / 2),
        (Central, GREEN, "central", lambda h: third * h**2 / 6),
    ):
        errors = [np.abs(estimates(f, x, kind(eps=h), "coordinate", count=6) - gradient).max() for h in hs]
        axes.plot(hs, errors, "o", ms=3.2, color=colour, label=f"{name}, measured")
        axes.plot(
            hs[hs > 3e-9], [bias(h) for h in hs if h > 3e-9], color=colour, lw=1, label=f"{name}, first term left out"
        )
    axes.plot(hs, 2.0**-52 * float(f(x)) / hs, ":", color=GREY, label="rounding of f over h")
    axes.set_ylim(1e-13, 1)
    dress(axes, "Error of a slope against the radius", "h", "error")
    save(figure, "taylor")


def smoothing() -> None:
    """Means of estimates of |x| against the slope of the smoothed function."""
    xs, h = np.linspace(-2, 2, 21), 0.5
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    dense = np.linspace(-2, 2, 400)
    axes.plot(dense, np.sign(dense), color=GREY, lw=1, label="slope of |x|")
    axes.plot(dense, [math.erf(v / (h * math.sqrt(2))) for v in dense], color=INK, lw=1.2, label="erf(x / h√2)")
    kinds = (
        ("central", Central(eps=h), GREEN, -0.03),
        ("one_sided", OneSided(eps=h), BLUE, 0.0),
        ("one_point", OnePoint(eps=h), ORANGE, 0.03),
    )
    for name, estimator, colour, shift in kinds:
        f = lambda p: np.abs(p).sum(1)  # noqa: E731
        samples = [estimates(f, np.array([x]), estimator, count=400, seed=i)[1:, 0] for i, x in enumerate(xs)]
        means, errors = [v.mean() for v in samples], [1.96 * v.std() / math.sqrt(len(v)) for v in samples]
        axes.errorbar(xs + shift, means, errors, fmt="o", ms=3, lw=1, color=colour, label=f"{name}: mean of 400, 95 %")
    dress(axes, "What estimates of |x| are on average, h = 0.5", "x", "slope", loglog=False)
    save(figure, "smoothing")


def variance() -> None:
    """Relative variance against d for one direction, and against q."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    ds = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for law, colour, formula in (("gaussian", BLUE, lambda d: d + 1), ("sphere", GREEN, lambda d: d - 1)):
        shown = [d for d in ds if formula(d)]
        measured = [relative(d, Central(eps=0.1), Full(law=law), 800) for d in shown]
        left.plot(shown, measured, "o", ms=4, color=colour, label=f"{law}, measured")
        left.plot(
            shown, [formula(d) for d in shown], color=colour, lw=1, label="d + 1" if law == "gaussian" else "d - 1"
        )
    dress(left, "One direction", "d", "E ‖ĝ - g‖² / ‖g‖²")
    d, qs = 32, [1, 2, 4, 8, 12, 16, 20, 24, 28, 31]
    for across, colour, formula in (("iid", BLUE, lambda q: (d + 1) / q), ("orthogonal", GREEN, lambda q: d / q - 1)):
        shown = [q for q in qs if q > 1 or across == "iid"]
        measured = [relative(d, Central(eps=0.1, num_directions=q, across=across), Full(), 100) for q in shown]
        right.plot(shown, measured, "o", ms=4, color=colour, label=f"{across}, measured")
        right.plot(
            shown,
            [formula(q) for q in shown],
            color=colour,
            lw=1,
            label="(d + 1) / q" if across == "iid" else "d / q - 1",
        )
    dress(right, "q directions, d = 32", "q", "E ‖ĝ - g‖² / ‖g‖²")
    save(figure, "variance")


def relative(d: int, estimator: Central, subspace: Full, count: int) -> float:
    gradient = np.linspace(-1, 1, d) + 0.1 if d > 1 else np.ones(1)
    samples = estimates(lambda xs: xs @ gradient, np.zeros(d), estimator, subspace, count=count, seed=d)
    return mean_square(samples, gradient) / float(gradient @ gradient)


def one_point() -> None:
    """Variance against h of one point, residual feedback and two points."""
    d, gradient, hs = 8, np.ones(8), np.geomspace(1e-4, 1, 13)
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    kinds = (
        ("f(x + hz) z / h", lambda h: OnePoint(eps=h, feedback=False), RED, lambda h: d / h**2 + (d + 1) * d),
        ("residual feedback", lambda h: OnePoint(eps=h), ORANGE, lambda h: (2 * d + 1) * d),
        ("central differences", lambda h: Central(eps=h), GREEN, lambda h: (d + 1) * d),
    )
    for name, make, colour, formula in kinds:
        f = lambda xs: 1 + xs @ gradient  # noqa: E731
        values = [
            mean_square(estimates(f, np.zeros(d), make(h), count=500, seed=i)[1:], gradient) for i, h in enumerate(hs)
        ]
        axes.plot(hs, values, "o", ms=4, color=colour, label=f"{name}, measured")
        axes.plot(hs, [formula(h) for h in hs], color=colour, lw=1)
    dress(axes, "Variance where f(x) = 1 and ‖g‖² = d = 8", "h", "E ‖ĝ - g‖²")
    save(figure, "one_point")


def noise() -> None:
    """Mean square error of a slope against h under noise, with the best h as the formula has it."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained", sharey=True)
    random = np.random.default_rng(0)
    forward = (
        OneSided,
        "forward differences",
        lambda s, h: (h / 2) ** 2 + 2 * s**2 / h**2,
        lambda s: (8 * s**2) ** 0.25,
    )
    central = (
        Central,
        "central differences",
        lambda s, h: (h**2 / 6) ** 2 + s**2 / (2 * h**2),
        lambda s: (3 * s) ** (1 / 3),
    )
    for axes, (kind, title, formula, best) in zip(panels, (forward, central), strict=True):
        for sigma, colour in ((1e-2, RED), (1e-4, ORANGE), (1e-6, GREEN)):
            hs = np.geomspace(best(sigma) / 30, min(2.0, best(sigma) * 30), 12)
            f = lambda xs, s=sigma: (xs**2 / 2 + xs**3 / 6).sum(1) + random.normal(0, s, len(xs))  # noqa: E731
            values = [mean_square(estimates(f, np.zeros(1), kind(eps=h), "coordinate", count=150), 0.0) for h in hs]
            axes.plot(hs, values, "o", ms=3.5, color=colour, label=f"noise {sigma:g}")
            dense = np.geomspace(hs[0], hs[-1], 100)
            axes.plot(dense, [formula(sigma, h) for h in dense], color=colour, lw=1)
            axes.plot([best(sigma)], [formula(sigma, best(sigma))], "D", ms=7, mfc="none", color=INK)
        axes.plot([], [], "D", ms=7, mfc="none", color=INK, label="best h, by the formula")
        dress(axes, title, "h", "mean square error")
    save(figure, "noise")


def save(figure: plt.Figure, name: str) -> None:
    path = DOCS / f"mathematics_{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path.relative_to(DOCS.parent))


PICTURES = {draw.__name__: draw for draw in (taylor, smoothing, variance, one_point, noise)}

if __name__ == "__main__":
    for chosen in sys.argv[1:] or PICTURES:
        PICTURES[chosen]()
