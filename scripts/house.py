"""How easily a newcomer finds the way in zoft/: figures, each beside what we aim for.

    python scripts/house.py            the table
    python scripts/house.py --list     and the files, hooks and imports behind it

`tests/test_house.py` holds the figures that need no training to the limits below, which may only fall.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import statistics
import sys
import tempfile
import tokenize
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ZOFT = ROOT / "zoft"
CORE = ("subspaces", "estimators", "weightings", "optimizers", "engines", "step")
"""The packages a researcher reads: there, comments matter most."""


# ---------------------------------------------------------------------------------------------------- text of the files


@cache
def sources() -> dict[Path, str]:
    """Every Python file of zoft/, with its text."""
    return {path: path.read_text() for path in sorted(ZOFT.rglob("*.py"))}


def num_lines() -> list[int]:
    """Lines of each file, the shortest first."""
    return sorted(text.count("\n") for text in sources().values())


def comments_per_100(packages: Iterable[str] = ()) -> float:
    """Lines with a comment, for every hundred lines that are not empty."""
    rooms = set(packages)
    texts = [t for p, t in sources().items() if not rooms or p.relative_to(ZOFT).parts[0] in rooms]
    comments = sum(len(set(_comment_lines(text))) for text in texts)
    return 100 * comments / max(1, sum(bool(line.strip()) for text in texts for line in text.splitlines()))


def _comment_lines(text: str) -> Iterator[int]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_ruler = re.fullmatch(r"#\s*-{4,}.*", token.string)  # the lines that part a file into sections say nothing
        if token.type == tokenize.COMMENT and not is_ruler and not re.match(r"#\s*(noqa|type:|fmt:)", token.string):
            yield token.start[0]


def root_entries() -> list[str]:
    """Packages and modules that lie directly in zoft/, those that Python asks for (``__init__``) aside."""
    entries = (p for p in ZOFT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists())
    return sorted(p.name for p in entries if not p.name.startswith("__"))


def private_reads() -> list[str]:
    """Reads of ``trainer._x`` outside of the trainer, as "file:line trainer._x"."""
    return [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for path, text in sources().items()
        if path.relative_to(ZOFT).parts[0] not in ("trainer", "trainer.py")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value).split(".")[-1] == "trainer"
    ]


# -------------------------------------------------------------------------------------------------------------- imports


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> modules of zoft that it imports, inside functions and for types too."""
    import grimp

    graph = grimp.build_graph("zoft", cache_dir=None)
    return {module: frozenset(graph.find_modules_directly_imported_by(module)) for module in graph.modules}


def circles(graph: Mapping[str, Iterable[str]] | None = None) -> list[list[str]]:
    """Sets of modules each of which imports, over others, itself (Tarjan's strongly connected components).

    Args:
        graph: module -> modules that it imports; those of zoft/ if left out.
    """
    graph = imports() if graph is None else graph
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            at = stack.index(module)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                components.append(sorted(component))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return components


def layers() -> dict[str, int]:
    """Room (package or module directly in zoft/) -> its layer in pyproject.toml, 0 at the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rows = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return {room: level for level, row in enumerate(rows) for room in re.findall(r"\w+", row)}


def upward_imports() -> list[str]:
    """Imports from a lower layer into a higher one, as "module -> module"."""
    level = layers()
    room = lambda module: [*module.split("."), ""][1]  # noqa: E731
    return [
        f"{module} -> {other}"
        for module, others in sorted(imports().items())
        for other in sorted(others)
        if level.get(room(other), 99) < level.get(room(module), -1)
    ]


# ---------------------------------------------------------------------------------------------------------------- hooks


def bases() -> list[type]:
    """The base classes with hooks: each kind of component, a subspace bound to a model, an engine bound to one."""
    from zoft.engines.base import Session
    from zoft.estimators.base import Estimator
    from zoft.optimizers.base import Optimizer
    from zoft.subspaces.base import BoundSubspace, Subspace
    from zoft.weightings.base import Weighting

    # A subclass is known once its module is imported, and the figure must not depend on what ran before.
    for module in imports():
        if module not in ("zoft.__main__", "zoft.noise.kernels.noise_triton"):  # a run of zoft, and a file of Triton's
            importlib.import_module(module)
    return [Estimator, Optimizer, Subspace, BoundSubspace, Weighting, Session]


def one_user_hooks() -> list[str]:
    """Public methods and class variables of a base class that exactly one file overrides, as "Base.hook: file"."""
    hooks = []
    for base in bases():
        below = list(_below(base))
        for hook in _hooks(base):
            users = sorted({cls.__module__ for cls in below if hook in vars(cls) or hook in _annotated(cls)})
            if len(users) == 1:
                hooks.append(f"{base.__name__}.{hook}: {users[0]}")
    return hooks


def _hooks(base: type) -> list[str]:
    """Public attributes of a base, its hyper-parameters aside."""
    fields = {name for name, text in _annotated(base).items() if "ClassVar" not in str(text)}
    return [name for name in vars(base) if not name.startswith("_") and name not in fields]


def _annotated(cls: type) -> dict[str, Any]:
    return dict(vars(cls).get("__annotations__", {}))


def _below(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        if cls.__module__.startswith("zoft."):
            yield cls
        yield from _below(cls)


# ------------------------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class Trace:
    """What runs of zoft/ in one training step.

    Args:
        files: distinct files.
        functions: distinct functions, comprehensions and lambdas among them.
        changes: how often a call leads from one file into another.
    """

    files: list[str]
    functions: list[str]
    changes: int


@cache
def traced_step() -> Trace:
    """The second step of a two-layer Llama with engine=layerwise, subspace=full and estimator=central.

    From ``training_step`` to the end of the optimizer's step; every call into a file of zoft/ counts.
    """
    import torch
    from transformers import TrainerCallback

    from tests import models
    from zoft import ZOConfig, ZOTrainer

    calls: list[CodeType] = []
    prefix = str(ZOFT)

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(prefix):
            calls.append(frame.f_code)

    class Stop(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            sys.setprofile(None)

    model = models.tiny_llama(num_hidden_layers=2)
    batch = models.batch_for(model, rows=4)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        args = ZOConfig(
            output_dir=folder, max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
            logging_strategy="no", per_device_train_batch_size=4, learning_rate=1e-3, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = ZOTrainer(
            model, args, train_dataset=rows, callbacks=[Stop()],
            engine="layerwise", subspace="full", estimator="central",
        )  # fmt: skip
        step = trainer.training_step

        def second(*given: Any, **named: Any) -> torch.Tensor:
            if trainer.state.global_step == 1:
                sys.setprofile(profile)
            return step(*given, **named)

        trainer.training_step = second
        with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints
            trainer.train()
    files = [code.co_filename for code in calls]
    return Trace(
        sorted({str(Path(name).relative_to(ROOT)) for name in files}),
        sorted(
            {f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_firstlineno} {code.co_qualname}" for code in calls}
        ),
        sum(a != b for a, b in pairwise(files)),
    )


# ---------------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    Args:
        name: what is counted.
        measure: counts it; a list counts as its length.
        target: what we aim for, an upper bound, or a lower one for ``at_least``.
        limit: what the test accepts; it only ever moves towards the target. None where a training is needed.
        at_least: more is better.
    """

    name: str
    measure: Callable[[], Any]
    target: float
    limit: float | None = None
    at_least: bool = False

    @property
    def value(self) -> float:
        """The figure now."""
        result = self.measure()
        return len(result) if isinstance(result, list) else result

    def is_within(self, bound: float) -> bool:
        """Whether the figure is as good as a bound."""
        return self.value >= bound if self.at_least else self.value <= bound


FIGURES = [
    Figure("files that one training step goes through", lambda: traced_step().files, 18),
    Figure("functions that it calls", lambda: traced_step().functions, 140),
    Figure("calls from one file into another", lambda: traced_step().changes, 400),
    Figure("circles of imports", circles, 0, 0),
    Figure("imports that point up", upward_imports, 0, 0),
    Figure("entries in the root of zoft/", root_entries, 25, 25),
    Figure("hooks of base classes with one user", one_user_hooks, 8, 8),
    Figure("reads of trainer._x from outside", private_reads, 0, 0),
    Figure("files of zoft/", lambda: len(num_lines()), 260, 460),
    Figure("lines of zoft/", lambda: sum(num_lines()), 34_000, 59_000),
    Figure("lines of a file, median", lambda: statistics.median(num_lines()), 130, 130),
    Figure("lines of a file, 90th percentile", lambda: num_lines()[int(0.9 * len(num_lines()))], 270, 270),
    Figure("lines of the longest file", lambda: num_lines()[-1], 450, 451),
    Figure("comment lines per 100", comments_per_100, 4, 3.9, at_least=True),
    Figure("comment lines per 100 in nouns, engines and step", lambda: comments_per_100(CORE), 6, 6.5, at_least=True),
]


def main() -> None:
    """Print the table."""
    sys.path.insert(0, str(ROOT))
    import logging

    logging.disable(logging.WARNING)
    print(f"{'figure':<50} {'now':>8} {'aim':>9}")
    for figure in FIGURES:
        value, sign = figure.value, ">=" if figure.at_least else "<="
        number = f"{value:,.1f}" if isinstance(value, float) and value % 1 else f"{value:,.0f}"
        remark = "" if figure.is_within(figure.target) else "   not yet"
        print(f"{figure.name:<50} {number:>8} {sign:>2} {figure.target:>6,}{remark}")
    if "--list" in sys.argv:
        for title, lines in (
            ("circles", [", ".join(circle) for circle in circles()]),
            ("imports that point up", upward_imports()),
            ("hooks with one user", one_user_hooks()),
            ("reads of trainer._x", private_reads()),
            ("files of a step", traced_step().files),
            ("functions of a step", traced_step().functions),
        ):
            print(f"\n{title}\n  " + "\n  ".join(lines))


if __name__ == "__main__":
    main()
