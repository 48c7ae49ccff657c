"""Hyper-parameter search: zoft.tune beside random search and Optuna's TPE at equal evaluations, on three problems.

    python scripts/bench_tune.py                       # all of it; a quarter of an hour on one busy core
    python scripts/bench_tune.py --only mlp --seeds 3
    python scripts/bench_tune.py --write               # the table into docs/tune.md, the picture to docs/tune.png

Each seed has ranges of its own, moved by up to a fifth of their width, the same for the three searches: a search that
begins in the middle must not profit from ranges that were put around the optimum. Needs scikit-learn and optuna.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zoft

ROOT = Path(__file__).resolve().parents[1]
DOCS, PICTURE = ROOT / "docs" / "tune.md", ROOT / "docs" / "tune.png"
BEGIN, END = "<!-- bench-tune: begin -->", "<!-- bench-tune: end -->"
SEARCHES = {"zo": "zoft (zeroth-order)", "random": "random search", "tpe": "Optuna TPE"}
COLOURS = {"zo": "#2f6db5", "random": "#8a8f98", "tpe": "#c98a1b"}
MARKS = (10, 20, 40)  # evaluations at which the table reads the curves


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels in [0, 1], [1797, 64], and labels, in a fixed random order."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return pixels[order] / 16, labels[order]


def svm(point: dict[str, Any]) -> float:
    """Error of an RBF support vector machine on 600 digits, 3-fold cross-validated."""
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    pixels, labels = digits()
    return 1 - cross_val_score(SVC(C=point["C"], gamma=point["gamma"]), pixels[:600], labels[:600], cv=3).mean()


def mlp(point: dict[str, Any]) -> float:
    """Dev loss of a 64-32-10 network after 10 epochs of SGD on 500 digits (600 others are dev), nats, at most 5."""
    pixels, labels = digits()
    x, y = torch.tensor(pixels[:1100], dtype=torch.float32), torch.tensor(labels[:1100])
    generator = torch.Generator().manual_seed(0)
    scale = point["init_scale"]
    weights = [
        torch.randn(64, 32, generator=generator) * scale / 8,
        torch.zeros(32),
        torch.randn(32, 10, generator=generator) * scale / 32**0.5,
        torch.zeros(10),
    ]
    for weight in weights:
        weight.requires_grad_()
    step = torch.optim.SGD(
        weights, lr=point["learning_rate"], momentum=point["momentum"], weight_decay=point["weight_decay"]
    )

    def loss(rows: Any) -> torch.Tensor:
        hidden = torch.relu(x[rows] @ weights[0] + weights[1])
        return torch.nn.functional.cross_entropy(hidden @ weights[2] + weights[3], y[rows])

    for _ in range(10):
        for rows in torch.randperm(500, generator=generator).split(32):
            step.zero_grad()
            loss(rows).backward()
            step.step()
    with torch.no_grad():
        value = float(loss(slice(500, 1100)))
    return min(value, 5.0) if math.isfinite(value) else 5.0


def pipeline(point: dict[str, Any]) -> float:
    """Error of a chain of choices (scaling, reduction, kernel, weights of the classes) on 400 digits, 3-fold."""
    from sklearn import decomposition, preprocessing
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC

    pixels, labels = digits()
    scaler = {
        "standard": preprocessing.StandardScaler(),
        "minmax": preprocessing.MinMaxScaler(),
        "normalizer": preprocessing.Normalizer(),
        "binarizer": preprocessing.Binarizer(threshold=0.5),
    }[point["scaler"]]
    reducer = {"none": "passthrough", "pca10": decomposition.PCA(10), "pca30": decomposition.PCA(30)}[point["reducer"]]
    weight = "balanced" if point["balanced"] else None
    chain = make_pipeline(scaler, reducer, SVC(C=point["C"], kernel=point["kernel"], class_weight=weight))
    return 1 - cross_val_score(chain, pixels[:400], labels[:400], cv=3).mean()


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Args:
        title: of its panel.
        f: point -> value.
        ranges: name -> (scale, lower, upper) in the units of the scale (decades where it is log).
        choices: name -> options.
        beside: what a value is.
    """

    title: str
    f: Callable[[dict[str, Any]], float]
    ranges: dict[str, tuple[str, float, float]]
    choices: dict[str, str]
    beside: str

    def space(self, seed: int) -> dict[str, str]:
        """The ranges of a seed."""
        random = np.random.default_rng([seed, 7])
        space = {}
        for name, (scale, lower, upper) in self.ranges.items():
            shift = (upper - lower) * random.uniform(-0.2, 0.2)
            low, high = lower + shift, upper + shift
            if scale == "log":
                space[name] = f"log({10**low:.6g},{10**high:.6g})"
            else:  # a momentum: it stays below 1
                space[name] = f"uniform({max(0.0, low):.6g},{min(0.99, high):.6g})"
        return space | {name: f"choice({options})" for name, options in self.choices.items()}


PROBLEMS = {
    "svm": Problem(
        "SVM on digits: C, gamma", svm, {"C": ("log", -2, 4), "gamma": ("log", -5, 1)}, {}, "cross-validated error"
    ),
    "mlp": Problem(
        "network on digits: lr, wd, momentum, init",
        mlp,
        {
            "learning_rate": ("log", -4, 0.5),
            "weight_decay": ("log", -6, -1),
            "momentum": ("uniform", 0.0, 0.99),
            "init_scale": ("log", -1, 1),
        },
        {},
        "dev loss",
    ),
    "pipeline": Problem(
        "mostly choices: scaler, reducer, kernel, balance; C",
        pipeline,
        {"C": ("log", -3, 3)},
        {
            "scaler": "standard,minmax,normalizer,binarizer",
            "reducer": "none,pca10,pca30",
            "kernel": "linear,poly,rbf,sigmoid",
            "balanced": "true,false",
        },
        "cross-validated error",
    ),
}


def measure(name: str, seeds: int, budget: int) -> dict[str, list[list[float]]]:
    """Search -> seed -> lowest value so far after each evaluation."""
    problem, curves = PROBLEMS[name], {search: [] for search in SEARCHES}
    for seed in range(seeds):
        for search in SEARCHES:
            result = zoft.tune(problem.f, problem.space(seed), budget=budget, search=search, seed=seed)
            values = [evaluation.value for evaluation in result.evaluations]
            values += [math.inf] * (budget - len(values))
            curves[search].append(np.minimum.accumulate(values).tolist())
        print(f"{name} seed {seed}: " + ", ".join(f"{s} {curves[s][-1][-1]:.4f}" for s in SEARCHES), flush=True)
    return curves


def interval(values: np.ndarray, count: int = 4000) -> tuple[float, float, float]:
    """Mean over the seeds [S, ...] and its 95 % bootstrap interval."""
    random = np.random.default_rng(0)
    means = values[random.integers(0, len(values), (count, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return values.mean(0), low, high


def table(results: dict[str, dict[str, list[list[float]]]]) -> str:
    """Markdown."""
    lines = ["| problem | search | " + " | ".join(f"after {n}" for n in MARKS) + " | zoft minus it, after the last |"]
    lines.append("|:--|:--|" + "--:|" * (len(MARKS) + 1))
    for name, curves in results.items():
        zo = np.array(curves["zo"])
        for search in SEARCHES:
            values = np.array(curves[search])
            cells = []
            for n in MARKS:
                if n <= values.shape[1]:
                    mean, low, high = interval(values[:, n - 1])
                    cells.append(f"{mean:.4f} [{low:.4f}, {high:.4f}]")
            mean, low, high = interval(zo[:, -1] - values[:, -1])
            cells.append("" if search == "zo" else f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]")
            lines.append(f"| {name} | {SEARCHES[search]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """A panel a problem: the mean over seeds, and its 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(results), 3.9), dpi=140, facecolor="white", layout="constrained")
    for axes, (name, curves) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        for search, label in SEARCHES.items():
            values = np.array(curves[search])
            mean, low, high = interval(values)
            at = np.arange(1, values.shape[1] + 1)
            axes.fill_between(at, low, high, color=COLOURS[search], alpha=0.18, lw=0)
            axes.plot(at, mean, color=COLOURS[search], lw=2, label=label)
        last = max(np.mean(curves[search], 0)[4] for search in SEARCHES)
        lowest = min(np.mean(curves[search], 0)[-1] for search in SEARCHES)
        axes.set_ylim(lowest - 0.08 * (last - lowest), last)
        axes.set_title(PROBLEMS[name].title, fontsize=10)
        axes.set_xlabel("evaluations")
        axes.set_ylabel(f"lowest {PROBLEMS[name].beside} so far")
        axes.grid(color="#e6e8ec")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="docs/tune.md and docs/tune.png")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench-tune")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = {}
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        results[name] = measure(name, args.seeds, args.budget)
        (args.output / f"{name}.json").write_text(json.dumps(results[name]))
    text = table(results)
    print(text)
    draw(results, args.output / "tune.png")
    if args.write:
        before, rest = DOCS.read_text().split(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
        draw(results, PICTURE)


if __name__ == "__main__":
    main()
