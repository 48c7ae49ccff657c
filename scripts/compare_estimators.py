"""Which method gets furthest with so many queries? Every preset at one budget, on the demo's model and task.

A cell is (method, learning rate, seed). A method's learning rate is searched for upward and downward in steps of about
three until its neighbours on both sides are worse (by the loss on the dev rows); the best then runs with other seeds.
All cells train the last block of the model on the same rows, in batches of the same size, and pay for every forward:
clean losses, looks at activations, trials, and two for a backward pass. A cell's result is a file; what is there is not
run again, so the script can be stopped and gone on with.

    python scripts/compare_estimators.py run --jobs 2
    python scripts/compare_estimators.py draw
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from compare_report import draw, final_loss, rows_of, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs" / "compare"
PAGE = ROOT / "docs" / "comparison.md"
TABLE, END = "<!-- table: written by compare_estimators.py draw -->", "<!-- end of table -->"
TASK = [
    "config=quickstart",
    "trainable=last_blocks",
    "trainable.num_blocks=1",
    "task.num_train=256",
    "task.num_dev=128",
    "task.num_test=8",
    "task.max_length=32",
    "trainer.per_device_train_batch_size=8",
    "trainer.lr_scheduler_type=constant",
    "trainer.save_strategy=no",
]
EVALUATIONS = 4  # along a run

STEPS_OF_RATE = (1.0, 3.0)  # learning rates are these times powers of ten
FIRST: dict[str, float] = {
    **dict.fromkeys(["adamw", "mezo_svrg", "lozo_m"], 1e-3),
    **dict.fromkeys(["zo_sgd_sign", "meazo", "fzoo", "grzo", "es", "eggroll", "spsa_1_5", "zo_act"], 1e-2),
    **dict.fromkeys(["adamezo", "mezo_adam", "zo_adamu", "bszo"], 1e-2),
    **dict.fromkeys(["zo_muon", "zo_mopi", "vectors"], 1e-1),
    **dict.fromkeys(["agzo", "aim_zo", "addax", "senszoq"], 3e-4),
    **dict.fromkeys(["one_point", "deepzero"], 1e-5),
}
"""Where the search for a method's learning rate begins; 3e-3 where nothing is said."""

SMALL: dict[str, list[str]] = {
    "subzero_plus": ["estimator.num_directions=15", "subspace.rank=32"],
    "aim_zo": [
        "estimator.num_directions=7",
        "subspace.rank=16",
        "subspace.basis_columns=32",
        "subspace.shared_columns=12",
    ],
    "es": ["estimator.num_directions=16"],
    "eggroll": ["estimator.num_directions=8"],
    "spsa_1_5": ["estimator.num_directions=8"],
    "lezo": ["subspace.block_size=1"],
    "addax": ["estimator.long_tokens=26"],
}
"""What a budget of some hundred queries and one trained block ask to be changed: a population of a hundred would be two
steps, and a quarter of the layers none."""


def methods() -> list[str]:
    """Every preset: the published methods, the forward gradient and first-order AdamW."""
    from zoft.config.catalog import preset_files

    return list(preset_files("method"))


def overrides(method: str) -> list[str]:
    """Arguments that choose a method."""
    return [f"method={method}", *SMALL.get(method, [])]


# ---- one cell --------------------------------------------------------------------------------------------------------


@cache
def loaded() -> tuple[Any, Any, dict[str, Any], dict[str, Any], Any]:
    """(model, tokenizer, rows, its first weights, hidden states below the trained block): once a process."""
    from zoft.config import compose
    from zoft.run.build import load

    cfg = compose([*TASK, "budget.queries=100"])
    model, tokenizer, rows = load(cfg)
    first = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = trainer_for(["budget.queries=100"], model, tokenizer, rows)
    for _ in trainer.query_forward.fill_prefix(rows["train"], rows["dev"]):
        pass
    return model, tokenizer, rows, first, trainer.query_forward.frozen_prefix


def trainer_for(arguments: list[str], model: Any, tokenizer: Any, rows: dict[str, Any]) -> Any:
    """A trainer as `zoft train` makes it."""
    from transformers import PrinterCallback, ProgressCallback

    from zoft.config import compose
    from zoft.run.build import arguments_of, make_trainer

    cfg = compose([*TASK, f"output_dir={RESULTS}/scratch-{os.getpid()}", *arguments])
    trainer = make_trainer(cfg, arguments_of(cfg), model, tokenizer, rows)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def run_cell(method: str, rate: float, seed: int, budget: int, extra: list[str]) -> dict[str, Any]:
    """Train, evaluate on the dev rows along the way, and say how it went."""
    import torch

    from zoft.config import compose
    from zoft.errors import NonFiniteLossError

    model, tokenizer, rows, first, prefix = loaded()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in first:
                parameter.copy_(first[name])
    arguments = [*overrides(method), *extra, f"seed={seed}", f"budget.queries={budget}"]
    arguments.append(f"optimizer.learning_rate={rate}")
    a_step = compose([*TASK, *arguments]).composition.queries_at(1)
    every = max(1, math.ceil(budget / a_step / EVALUATIONS))
    arguments += [f"trainer.eval_steps={every}", f"trainer.logging_steps={every}", "trainer.eval_on_start=true"]
    trainer = trainer_for(arguments, model, tokenizer, rows)
    trainer.create_optimizer()
    trainer.query_forward.frozen_prefix = prefix
    began = time.perf_counter()
    failed = ""
    try:
        trainer.train()
    except NonFiniteLossError as error:
        failed = str(error)
    seconds = time.perf_counter() - began
    trainer.evaluate()
    log = [line for line in trainer.state.log_history if "eval_loss" in line]
    curve = [(line["num_queries"], line["eval_loss"], line["eval_accuracy"]) for line in log]
    return {
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "budget": budget,
        "queries": trainer.progress.num_queries,
        "steps": trainer.progress.steps,
        "queries_a_step": a_step,
        "curve": curve,
        "seconds": seconds,
        "trained": trainer.zo_optimizer.session.weights.num_elements,
        "state_elements": trainer.method.extra_elements(trainer.zo_optimizer.subspace),
        "skipped": trainer.progress.num_skipped,
        "failed": failed,
        "arguments": arguments,
    }


# ---- all cells -------------------------------------------------------------------------------------------------------


def file_of(method: str, rate: float, seed: int, budget: int, tag: str = "") -> Path:
    """Where a cell's result is kept."""
    return RESULTS / f"{budget}" / f"{method}{tag}-lr{rate:g}-seed{seed}.json"


def cell(job: tuple[str, float, int, int, list[str], str]) -> dict[str, Any]:
    """A cell's result: from its file, or run now."""
    method, rate, seed, budget, extra, tag = job
    file = file_of(method, rate, seed, budget, tag)
    if not file.is_file():
        try:
            result = run_cell(method, rate, seed, budget, extra)
        except Exception as error:  # the other cells go on
            print(f"{method}{tag} lr={rate:g} seed={seed}: {error}", flush=True)
            return {"method": method, "learning_rate": rate, "curve": [[0, math.inf, 0.0]], "failed": str(error)}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.rename(file)
        queries, loss, accuracy = result["curve"][-1]
        print(f"{method}{tag:12} lr={rate:g} seed={seed}: dev loss {loss:.3f}, accuracy {100 * accuracy:.1f} % "
              f"after {queries} queries, {result['seconds']:.0f} s", flush=True)  # fmt: skip
    return dict(json.loads(file.read_text()))


def quiet() -> None:
    """Workers print their cells, nothing else."""
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.disable(logging.WARNING)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from transformers.trainer_callback import PrinterCallback

    PrinterCallback.on_log = lambda *args, **kwargs: None  # type: ignore[method-assign]


def neighbour(rate: float, up: int) -> float:
    """The next learning rate, or the one before it."""
    places = len(STEPS_OF_RATE)
    at = round(math.log10(rate) * places) + up
    return float(f"{STEPS_OF_RATE[at % places] * 10.0 ** (at // places):g}")


def search(job: tuple[str, float, int, list[str], str]) -> tuple[str, float]:
    """(method, its best learning rate): from where it begins upward until two are worse, then downward until one is."""
    method, first, budget, extra, tag = job
    losses: dict[float, float] = {}

    def loss(rate: float) -> float:
        if rate not in losses:
            losses[rate] = final_loss(cell((method, rate, 0, budget, extra, tag)))
        return losses[rate]

    best, rate, worse = first, first, 0
    loss(first)
    while worse < 2:
        rate = neighbour(rate, +1)
        best, worse = (rate, 0) if loss(rate) < loss(best) else (best, worse + 1)
    while loss(lower := neighbour(best, -1)) < loss(best) - 1e-3:
        best = lower
    return method, best


def command_run(options: argparse.Namespace) -> None:
    """Each method's learning rate first, then the other seeds with it."""
    chosen = options.methods or methods()
    extra, tag, budget = options.set or [], options.tag, options.budget
    seeds = range(1, options.seeds)
    with multiprocessing.get_context("spawn").Pool(options.jobs, quiet) as pool:
        if options.rates:
            every = [
                (m, rate, seed, budget, extra, tag) for m in chosen for rate in options.rates for seed in [0, *seeds]
            ]
            list(pool.imap_unordered(cell, every))
            return
        jobs = [(m, FIRST.get(m, 3e-3), budget, extra, tag) for m in chosen]
        best = list(pool.imap_unordered(search, jobs))
        list(pool.imap_unordered(cell, [(m, rate, seed, budget, extra, tag) for m, rate in best for seed in seeds]))


def results(budget: int) -> Iterator[dict[str, Any]]:
    """All that has been run at this budget, without what was tried under a name of its own (--tag)."""
    for file in sorted((RESULTS / str(budget)).glob("*.json")):
        cell = json.loads(file.read_text())
        if file == file_of(cell["method"], cell["learning_rate"], cell["seed"], budget):
            yield cell


def command_draw(options: argparse.Namespace) -> None:
    """The table into docs/comparison.md, the picture beside it."""
    rows = rows_of([cell for cell in results(options.budget) if cell["method"] in methods()])
    text = table(rows, rows[0].cells[0]["trained"])
    draw(rows, PAGE.with_suffix(".png"))
    before, rest = PAGE.read_text(encoding="utf-8").split(TABLE, 1)
    PAGE.write_text(before + TABLE + "\n" + text + "\n" + END + rest.split(END, 1)[1], encoding="utf-8")
    print(text)


def main() -> None:
    """Run or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run the cells that are missing")
    run.add_argument("--budget", type=int, default=240, help="queries of a cell")
    run.add_argument("--seeds", type=int, default=3)
    run.add_argument("--jobs", type=int, default=1, help="processes")
    run.add_argument("--methods", nargs="*", help="presets; all if left out")
    run.add_argument("--rates", nargs="*", type=float, help="these learning rates instead of the search")
    run.add_argument("--set", nargs="*", help="further arguments of zoft train, for trying something")
    run.add_argument("--tag", default="", help="name of what was set, for the files")
    picture = verbs.add_parser("draw", help="table and picture from the files")
    picture.add_argument("--budget", type=int, default=240)
    options = parser.parse_args()
    {"run": command_run, "draw": command_draw}[options.verb](options)


if __name__ == "__main__":
    sys.exit(main())
