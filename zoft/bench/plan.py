"""The plan of a bench: its methods, tasks, prompts and seeds, and a cell for each combination."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

MODES = ("zero_shot", "icl", "calibrated", "linear_probe")
"""References that are evaluations and not runs: modes of `zoft eval`."""

BUILT_IN: dict[str, list[str]] = {"lora": ["method=adamw", "peft=lora", "trainable=adapter"]}
"""Methods that are known beside the presets of configs/method: LoRA by backpropagation, as a reference."""

STANDARD = ("mezo", "zo_sgd_sign", "fzoo", "grzo", "lozo", "subzero", "hizoo", "adamezo", "zo_muon", "zoft")
"""Methods of a bench that names none."""


@dataclass
class Entry:
    """One method of a bench.

    Args:
        learning_rate: in the middle of the learning rates that are tried; None takes the method's own.
        arguments: of `zoft train`, behind ``method=NAME``; they may choose another method under this name.
    """

    learning_rate: float | None = None
    arguments: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """One row of the table: a run, or an evaluation of the untrained model.

    Args:
        task: its name in the plan.
        prompt: aligned, none or head.
        method: its name in the plan, or one of :data:`MODES`.
        factor: of the method's learning rate; None for an evaluation.
        seed: of the run; None for an evaluation.
    """

    task: str
    prompt: str
    method: str
    factor: float | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """What its files are called, under the bench's folder.

        Example:
            >>> Cell("sst2", "none", "mezo", 0.25, 1).name
            'sst2/none/mezo-x0.25-seed1'
        """
        run = "" if self.seed is None else f"-x{self.factor:g}-seed{self.seed}"
        return f"{self.task}/{self.prompt}/{self.method}{run}"


@dataclass
class Plan:
    """A bench.

    Args:
        base: arguments of `zoft train` for every cell.
        tasks: name -> arguments that choose the task.
        methods: name -> settings; references that are runs stand here too.
        references: what the methods are compared with: evaluations (:data:`MODES`) and names of methods.
        prompts: values of ``task.prompt``.
        seeds: of the runs; the first one also chooses the learning rate.
        queries: budget of every run, forward passes of the objective.
        budgets: smaller budgets that every run is judged at too, as if it had ended there: its best point so far, the
            test rows scored once with those weights, and a learning rate of their own among those tried.
        rates: factors of a method's learning rate. All are run with the first seed; the one with the best dev score is
            then run with the other seeds.
        grow: how many more factors are tried beyond an edge of ``rates`` while the best one lies there.
        demonstrations: solved rows before each row under ``icl``.
        evaluations: on the dev rows along a run; each saves a checkpoint that may be the best.
        select: what chooses checkpoints and learning rates on the dev rows: loss, or metric.
        baseline: the method whose best dev loss the others' queries are counted to; empty takes mezo, or the first one.
        target: a dev loss to count queries to instead of the baseline's.
        jobs: processes that run cells side by side.
        output_dir: the bench's folder.
        about: name of the file, for the pictures.
        digests: (task, prompt) and method -> of all that their config files and data say, once the plan is filled in.
        unfit: (task, prompt, reference) that do not go together, as in-context learning and a classification head.
    """

    base: list[str] = field(default_factory=list)
    tasks: dict[str, list[str]] = field(default_factory=dict)
    methods: dict[str, Entry] = field(default_factory=dict)
    references: list[str] = field(default_factory=lambda: ["zero_shot", "icl", "forward_gradient", "adamw", "lora"])
    prompts: list[str] = field(default_factory=lambda: ["aligned", "none"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    queries: int = 0
    budgets: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0])
    grow: int = 2
    demonstrations: int = 8
    evaluations: int = 8
    select: str = "loss"
    baseline: str = ""
    target: float | None = None
    jobs: int = 1
    output_dir: str = ""
    about: str = "bench"
    digests: dict[str, str] = field(default_factory=dict)
    unfit: set[tuple[str, str, str]] = field(default_factory=set)

    @property
    def runs(self) -> list[str]:
        """Every method that is trained, references after the others."""
        return [name for name in self.methods if name not in self.references] + [
            name for name in self.references if name not in MODES
        ]

    @property
    def modes(self) -> list[str]:
        """References that are evaluations."""
        return [name for name in self.references if name in MODES]

    def cells(self, searches: Mapping[tuple[str, str, str], RateSearch] | None = None) -> Iterator[Cell]:
        """The cells, those that share their data beside each other.

        Args:
            searches: (task, prompt, method) -> how far the search for its learning rate has come; the other seeds'
                cells are there only when it has ended. None: nothing has been run.
        """
        for task in self.tasks:
            for prompt in self.prompts:
                yield from (Cell(task, prompt, mode) for mode in self.modes if (task, prompt, mode) not in self.unfit)
                searched = {method: (searches or {}).get((task, prompt, method)) for method in self.runs}
                for method, search in searched.items():
                    factors = self.rates if search is None else search.factors
                    yield from (Cell(task, prompt, method, factor, self.seeds[0]) for factor in factors)
                for method, search in searched.items():
                    chosen = [] if search is None else sorted(set(search.chosen.values()))
                    yield from (
                        Cell(task, prompt, method, factor, seed) for factor in chosen for seed in self.seeds[1:]
                    )

    @property
    def all_budgets(self) -> list[int]:
        """The smaller budgets and that of the runs, ascending."""
        return [*sorted(self.budgets), self.queries]

    @property
    def num_cells(self) -> int:
        """The number of cells, if all budgets share a learning rate and the search stays within the plan's factors."""
        runs = len(self.runs) * (len(self.rates) + len(self.seeds) - 1)
        return len(self.tasks) * len(self.prompts) * (len(self.modes) + runs) - len(self.unfit)

    def arguments(self, cell: Cell) -> list[str]:
        """A cell's command line without its folder: `zoft train`'s, or `zoft eval`'s for an evaluation.

        A method without a learning rate of its own in the plan gets one when the plan is filled in.
        """
        arguments = self.shared_arguments(cell)
        if cell.method in MODES:
            return [*arguments, f"mode={cell.method}", *([f"k={self.demonstrations}"] if cell.method == "icl" else [])]
        entry = self.methods[cell.method]
        of_method = [*BUILT_IN.get(cell.method, []), *entry.arguments]
        named = [] if any(word.startswith("method=") for word in of_method) else [f"method={cell.method}"]
        arguments += [*named, *of_method, f"seed={cell.seed}", f"budget.queries={self.queries}"]
        if entry.learning_rate is not None:
            arguments.append(f"optimizer.learning_rate={entry.learning_rate * (cell.factor or 1.0):.6g}")
        return arguments

    def identity(self, cell: Cell) -> list[str]:
        """What a cell's row depends on: arguments, what files say, and for a run how its best point is found."""
        digests = [self.digests[key] for key in (f"{cell.task}/{cell.prompt}", cell.method) if key in self.digests]
        arguments = [*self.arguments(cell), f"digest={'-'.join(digests)}"]
        if cell.method in MODES:
            return arguments
        arguments += [f"evaluations={self.evaluations}", f"select={self.select}"]
        return [*arguments, f"budgets={sorted(self.budgets)}"] if self.budgets else arguments

    def shared_arguments(self, cell: Cell) -> list[str]:
        """Those of the model and the data: the same for all methods of a task and prompt."""
        arguments = [*self.base, *self.tasks[cell.task], f"task.prompt={cell.prompt}"]
        if cell.prompt == "head" and not any(word.startswith("objective=") for word in arguments):
            arguments.append("objective=classes")
        return arguments


FIELDS = tuple(f.name for f in dataclasses.fields(Plan) if f.name not in ("about", "digests", "unfit"))
"""Keys of a bench's file, and of its command line."""


@dataclass(frozen=True)
class RateSearch:
    """How far the search for a method's learning rate on one task and prompt has come.

    Args:
        factors: of the learning rate, tried or to be tried, ascending.
        chosen: budget -> the one with the best dev score under the first seed within that budget; empty while cells
            are missing, without a budget at which all break.
    """

    factors: tuple[float, ...]
    chosen: Mapping[int, float]
