"""Queries to tolerance on functions with known minima: zoft.minimize beside SciPy's and nevergrad's search methods.

    make bench-blackbox                                    # the whole table, a few minutes
    python scripts/bench_blackbox.py --only quadratic --seeds 1
    python scripts/bench_blackbox.py --write               # put the table between the marks of docs/blackbox.md

Every method has the same start and budget, and no settings: each is used as it comes (zoft is told what is noisy). A
tolerance is reached with the first query whose f without noise, relative to f(x0), is at or below it: 1e-2 and 1e-6,
and 1e-1 and 1e-2 under noise. In brackets: f without noise, relative to f(x0), where the method says the minimum is.
SciPy and nevergrad are left out where they are not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import zoft

DOCS = Path(__file__).resolve().parents[1] / "docs" / "blackbox.md"
BEGIN, END = "<!-- bench-blackbox: begin -->", "<!-- bench-blackbox: end -->"


@dataclass
class Problem:
    """A function whose minimum value is 0.

    Args:
        name: a row of the table.
        d: dimension.
        budget: queries.
        make: generator of numbers -> (f without noise, x0).
        noise: standard deviation that is added to every value, in units of f(x0).
        tolerances: of the two columns.
    """

    name: str
    d: int
    budget: int
    make: Callable[[np.random.Generator], tuple[Callable[[np.ndarray], float], np.ndarray]]
    noise: float = 0.0
    tolerances: tuple[float, float] = (1e-2, 1e-6)


def quadratic(d: int, condition: float) -> Callable:
    """Rotated up to d = 1000; eigenvalues from 1 to ``condition``, evenly in their logarithm."""

    def make(random: np.random.Generator) -> tuple[Callable, np.ndarray]:
        centre, bends = random.standard_normal(d), np.geomspace(1, condition, d)
        turn = np.linalg.qr(random.standard_normal((d, d)))[0] if d <= 1000 else None

        def f(x: np.ndarray) -> float:
            y = x - centre
            y = y if turn is None else turn @ y
            return float(bends @ (y * y)) / 2

        return f, random.standard_normal(d)

    return make


def rosenbrock(d: int) -> Callable:
    def make(random: np.random.Generator) -> tuple[Callable, np.ndarray]:
        def f(x: np.ndarray) -> float:
            return float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum())

        return f, -1.0 + 0.1 * random.standard_normal(d)

    return make


def of_norm(d: int, norm: float, *, rotated: bool = True) -> Callable:
    """|| A (x - centre) ||_norm: kinks, rotated or not."""

    def make(random: np.random.Generator) -> tuple[Callable, np.ndarray]:
        centre = random.standard_normal(d)
        turn = np.linalg.qr(random.standard_normal((d, d)))[0] if rotated else np.eye(d)
        return (lambda x: float(np.linalg.norm(turn @ (x - centre), norm))), random.standard_normal(d)

    return make


def steps(d: int, width: float) -> Callable:
    """sum floor(|x - centre| / width): flat almost everywhere."""

    def make(random: np.random.Generator) -> tuple[Callable, np.ndarray]:
        centre = random.standard_normal(d)
        return (lambda x: float(np.floor(np.abs(x - centre) / width).sum())), random.standard_normal(d)

    return make


def in_thousands(make: Callable) -> Callable:
    """The same function of x / 1000."""

    def make_scaled(random: np.random.Generator) -> tuple[Callable, np.ndarray]:
        f, x0 = make(random)
        return (lambda x: f(x / 1000)), 1000 * x0

    return make_scaled


PROBLEMS = [
    Problem("quadratic, condition 10", 2, 300, quadratic(2, 10)),
    Problem("quadratic, condition 100", 10, 1500, quadratic(10, 100)),
    Problem("the same, x in thousands", 10, 1500, in_thousands(quadratic(10, 100))),
    Problem("quadratic, condition 10^4", 10, 3000, quadratic(10, 1e4)),
    Problem("quadratic, condition 100", 100, 10000, quadratic(100, 100)),
    Problem("quadratic, condition 100", 1000, 20000, quadratic(1000, 100)),
    Problem("the same, fewer queries", 1000, 1500, quadratic(1000, 100)),
    Problem("quadratic, condition 10", 10**4, 25000, quadratic(10**4, 10)),
    Problem("quadratic, condition 10", 10**5, 2000, quadratic(10**5, 10)),
    Problem("Rosenbrock", 2, 1000, rosenbrock(2)),
    Problem("Rosenbrock", 10, 3000, rosenbrock(10)),
    Problem("Rosenbrock", 100, 5000, rosenbrock(100)),
    Problem("sum of distances, separable", 10, 2000, of_norm(10, 1, rotated=False)),
    Problem("sum of distances, rotated", 10, 2000, of_norm(10, 1)),
    Problem("largest distance, rotated", 10, 3000, of_norm(10, np.inf)),
    Problem("sum of distances, rotated", 100, 5000, of_norm(100, 1)),
    Problem("stairs of width 0.1", 10, 2000, steps(10, 0.1)),
    Problem("quadratic 10, noise 1 %", 10, 1000, quadratic(10, 10), 0.01, (1e-1, 1e-2)),
    Problem("quadratic 10, noise 10 %", 10, 3000, quadratic(10, 10), 0.1, (1e-1, 1e-2)),
    Problem("quadratic 10, noise 1 %", 100, 5000, quadratic(100, 10), 0.01, (1e-1, 1e-2)),
    Problem("Rosenbrock, noise 0.1 %", 2, 1000, rosenbrock(2), 0.001, (1e-1, 1e-2)),
    Problem("sum of distances, noise 1 %", 10, 2000, of_norm(10, 1), 0.01, (1e-1, 1e-2)),
]


class Spent(Exception):
    """The budget is."""


@dataclass
class Counted:
    """f with noise, that counts, and stops at the budget.

    Args:
        f: without noise.
        noise: standard deviation.
        budget: queries.
        random: where the noise comes from.
    """

    f: Callable[[np.ndarray], float]
    noise: float
    budget: int
    random: np.random.Generator
    values: list[float] = field(default_factory=list)  # without noise
    last: np.ndarray | None = None
    lowest: float = math.inf

    def __call__(self, x: np.ndarray) -> float:
        """The value a method sees."""
        if len(self.values) >= self.budget:
            raise Spent
        value = self.f(np.asarray(x, dtype=float))
        self.values.append(value)
        seen = value + (self.noise * float(self.random.standard_normal()) if self.noise else 0.0)
        if seen < self.lowest:  # what a method that keeps the lowest value would hand back
            self.lowest, self.last = seen, np.array(x)
        return seen

    def reached(self, level: float) -> int | None:
        """The first query at or below a level."""
        return next((i + 1 for i, value in enumerate(self.values) if value <= level), None)


# ------------------------------------------------------------------------------------------------------------- methods


def with_zoft(f: Counted, x0: np.ndarray, seed: int) -> np.ndarray:
    return zoft.minimize(f, x0, budget=f.budget, seed=seed, noisy=True if f.noise else None).x


def with_scipy(name: str, **options: object) -> Callable:
    def run(f: Counted, x0: np.ndarray, seed: int) -> np.ndarray:
        from scipy.optimize import minimize

        try:
            return minimize(f, x0, method=name, options={"maxiter": 10**9, **options}).x
        except Spent:
            return f.last

    return run


def with_nevergrad(name: str) -> Callable:
    def run(f: Counted, x0: np.ndarray, seed: int) -> np.ndarray:
        import nevergrad

        variable = nevergrad.p.Array(init=x0)
        variable.random_state.seed(seed)
        optimizer = nevergrad.optimizers.registry[name](parametrization=variable, budget=f.budget)
        for _ in range(f.budget):
            asked = optimizer.ask()
            optimizer.tell(asked, f(asked.value))
        return optimizer.provide_recommendation().value

    return run


METHODS: dict[str, tuple[Callable, float]] = {  # and the largest dimension in which they are run
    "zoft": (with_zoft, math.inf),
    "COBYLA": (with_scipy("COBYLA", tol=1e-12), 10),
    "Nelder-Mead": (with_scipy("Nelder-Mead", xatol=1e-12, fatol=1e-12, maxfev=10**9), 1000),
    "OnePlusOne": (with_nevergrad("OnePlusOne"), math.inf),
    "CMA": (with_nevergrad("CMA"), 100),
}
NEEDS = {"COBYLA": "scipy", "Nelder-Mead": "scipy", "OnePlusOne": "nevergrad", "CMA": "nevergrad"}


def measure(problem: Problem, method: Callable, seed: int) -> tuple[list[float], float]:
    """(queries to each tolerance, relative value at the end)."""
    f, x0 = problem.make(np.random.default_rng(seed))
    start = f(x0)
    counted = Counted(f, problem.noise * start, problem.budget, np.random.default_rng(1000 + seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            x = method(counted, x0, seed)
        except Spent:
            x = counted.last
    return [counted.reached(t * start) or math.inf for t in problem.tolerances], f(np.asarray(x)) / start


def cell(problem: Problem, method: Callable, seeds: int) -> str:
    """Medians: queries to the first tolerance, to the second, and the relative value at the end."""
    runs = [measure(problem, method, seed) for seed in range(seeds)]
    queries = [statistics.median_high(q[i] for q, _ in runs) for i in range(2)]
    words = ["never" if math.isinf(q) else f"{q:.0f}" for q in queries]
    return f"{words[0]} / {words[1]} ({statistics.median(end for _, end in runs):.0e})"


def table(problems: list[Problem], methods: list[str], seeds: int) -> str:
    """In Markdown, printed as it grows."""
    lines = [f"| function | d | budget | {' | '.join(methods)} |", "|:--|--:|--:|" + ":--|" * len(methods)]
    print("\n".join(lines), flush=True)
    for problem in problems:
        few = seeds if problem.d <= 10 else 1
        cells = [cell(problem, METHODS[m][0], few) if problem.d <= METHODS[m][1] else "" for m in methods]
        lines.append(f"| {problem.name} | {problem.d} | {problem.budget} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="problems whose name has this in it")
    parser.add_argument("--methods", default=",".join(METHODS), help="of " + ", ".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="starts and functions up to d = 10; one beyond")
    parser.add_argument("--max-d", type=int, default=10**9, help="largest dimension")
    parser.add_argument("--write", action="store_true", help="put the table into docs/blackbox.md")
    args = parser.parse_args()
    chosen = args.methods.split(",")
    if unknown := sorted(set(chosen) - set(METHODS)):
        parser.error(f"there is no method {', '.join(unknown)}: {', '.join(METHODS)}")
    missing = sorted({NEEDS[m] for m in chosen if m in NEEDS and importlib.util.find_spec(NEEDS[m]) is None})
    methods = [m for m in chosen if NEEDS.get(m) not in missing]
    for package in missing:
        left = ", ".join(m for m in chosen if NEEDS.get(m) == package)
        print(f"{package} is not installed: {left} left out (pip install {package})")
    began = time.perf_counter()
    problems = [p for p in PROBLEMS if args.only in p.name and p.d <= args.max_d]
    text = table(problems, methods, args.seeds)
    print(f"{time.perf_counter() - began:.0f} s")
    if args.write:
        before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
