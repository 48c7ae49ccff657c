"""The tables of docs/nodes.md: what node directions learn in tens of queries, and what a step of theirs costs.

    python scripts/bench_nodes.py learn sms rt trec --method zoft --seeds 0 1 2 --marks 30 60
    python scripts/bench_nodes.py learn sms --method mezo --rate 1e-3 --marks 60 240
    python scripts/bench_nodes.py learn stories --marks 30 60          # completions: word problems and their answers
    python scripts/bench_nodes.py learn preferences rewards            # right or wrong answers; short answers
    python scripts/bench_nodes.py cosine sms trec rt                   # the identity beside backpropagation
    python scripts/bench_nodes.py cost
    python scripts/bench_nodes.py memory

``learn`` trains the last block of the demo's model as `zoft train config=last_block` does, and prints dev and test loss
and accuracy at each mark, a number of queries spent. ``cost`` times one step of the methods on the same batch, in turn,
and prints medians, their ratios to the bare clean forward and to the steps of MeZO and AdamW, and the memory they take.
``cosine`` prints, for all blocks and one batch, the cosine of response=identity's node gradients with those of
backpropagation. ``memory`` prints the most that a step of each takes, in a process of its own and through the whole
model, beside inference on the same batch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from zoft.config import compose
from zoft.noise.direction import Direction
from zoft.report.memory import PeakMemory
from zoft.run.build import arguments_of, load_model_of, load_rows, make_trainer
from zoft.run.train import keep_reference
from zoft.step.nodes import NodeQueries
from zoft.trainer.batch import StepBatch
from zoft.trainer.readout import TrainerReader

TASKS = {
    "sms": ["task=sms_spam"],
    "rt": [
        "task=custom",
        "task.train=zoft:rotten-tomatoes",
        'task.template="{text} It was"',
        "task.words={negative: terrible, positive: great}",
    ],
    "trec": [
        "task=custom",
        "task.train=zoft:trec-questions",
        'task.template="{text} This question asks for:"',
        "task.words={ABBR: Expression, DESC: Description, ENTY: Entity, HUM: Human, LOC: Location, NUM: Number}",
    ],
}


def problems(form: str) -> list[str]:
    """Arguments of a task of 456 word problems of one sum, made here, like GSM8K's rows.

    Args:
        form: completion (the written answer), preference (it, and one with a wrong result), or reward (a judge of what
            the model writes: 1 less a twentieth for each word, so that short answers are good ones).
    """
    draw = random.Random(0)  # the same rows for every method and seed
    things, names = ["apples", "books", "coins", "stamps", "pens", "cards"], ["Tom", "Mia", "Ben", "Ada", "Leo", "Eva"]
    verbs = {"buys": 1, "finds": 1, "loses": -1, "gives away": -1}
    rows = []
    for _ in range(456):
        name, thing, verb = draw.choice(names), draw.choice(things), draw.choice(list(verbs))
        first, second = draw.randint(20, 99), draw.randint(2, 19)
        sign, result = "+" if verbs[verb] > 0 else "-", first + verbs[verb] * second
        question = f"{name} has {first} {thing} and {verb} {second}. How many {thing} does {name} have now?"
        answer = f" {first} {sign} {second} = {result}. The answer is {result}."
        row = {"prompt": f"Question: {question}\nAnswer:"}
        if form == "completion":
            row["completion"] = answer
        elif form == "preference":
            wrong = result + (second % 9 + 1)
            row |= {"chosen": answer, "rejected": f" {first} {sign} {second} = {wrong}. The answer is {wrong}."}
        rows.append(row)
    folder = Path(tempfile.mkdtemp(prefix="bench_nodes_"))
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["task=custom", f"task.train={file}", f"task.format={form}", "task.max_length=64", "task.num_test=100"]
    if form == "reward":
        judge = folder / "judge.py"
        text = "def short(prompts, generations):\n    return [1 - len(text.split()) / 20 for text in generations]\n"
        judge.write_text(text)
        words += ["objective=reward", f"objective.function={judge}:short", "objective.max_new_tokens=16"]
    return words


OWN = {"stories": "completion", "preferences": "preference", "rewards": "reward"}
"""Tasks made here -> their form."""


class AtMarks(TrainerCallback):
    """Evaluates whenever the queries spent reach a mark.

    Args:
        rows: by split.
        marks: numbers of queries, in order.
    """

    def __init__(self, rows: dict[str, list[Any]], marks: list[int]) -> None:
        self.rows = rows
        self.marks = marks
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prints where it begins."""
        self._print(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prints a line at a mark."""
        spent = self.trainer.progress.num_queries
        if self.marks and spent >= self.marks[0]:
            self.marks = [mark for mark in self.marks if mark > spent]
            self._print(spent)

    def _print(self, spent: int) -> None:
        results = []
        for split in ("dev", "test"):
            metrics = self.trainer.evaluate(self.rows[split], metric_key_prefix=split)
            right = metrics.get(f"{split}_accuracy")  # completions have a loss alone
            shown = "" if right is None else f" {100 * right:.1f} %"
            results.append(f"{split} {metrics[f'{split}_loss']:.3f}{shown}")
        print(f"  {spent:>4} queries: {', '.join(results)}", flush=True)


def trainer_of(words: list[str], model: Any = None) -> tuple[Any, dict[str, list[Any]]]:
    """A trainer as `zoft train` makes it, with nothing printed; of a model that is there, or of the config's."""
    folder = tempfile.mkdtemp(prefix="bench_nodes_")
    cfg = compose(["config=last_block", *words, "trainer.save_strategy=no", f"output_dir={folder}/run"])
    tokenizer, rows = load_rows(cfg)
    trainer = make_trainer(cfg, arguments_of(cfg), model or load_model_of(cfg), tokenizer, rows)
    trainer.create_optimizer()
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer, rows


def learn(options: argparse.Namespace) -> None:
    """Train on each task and seed, and print what was reached at each mark."""
    for task in options.tasks:
        of_task = problems(OWN[task]) if task in OWN else TASKS[task]
        prefix: Any = None  # hidden states below what is trained, of this task's rows, which no seed changes
        for seed in options.seeds:
            words = [*of_task, f"method={options.method}", f"seed={seed}", f"budget.queries={max(options.marks)}"]
            words += [f"optimizer.learning_rate={options.rate}"] if options.rate else []
            trainer, rows = trainer_of([*words, "trainer.eval_steps=1000000", *options.set])
            keep_reference(trainer, rows)
            forward = trainer.query_forward
            if forward.frozen_prefix is not None and prefix is not None:
                forward.frozen_prefix.share(prefix)
            prefix = forward.frozen_prefix
            for _ in forward.fill_prefix(*rows.values()):
                pass
            at = AtMarks(rows, list(options.marks))
            at.trainer = trainer
            trainer.add_callback(at)
            print(f"{task}, {options.method}, seed {seed}", flush=True)
            trainer.train()


def cosine(options: argparse.Namespace) -> None:
    """Compare the identity's node gradients with exact ones, at each block's last matrix, and over all weights."""
    for task in options.tasks:
        words = ["method=zoft", "trainable=all", "budget.queries=10", "trainer.per_device_train_batch_size=16"]
        trainer, rows = trainer_of([*TASKS[task], *words, "task.num_dev=8", "task.num_test=8"])
        batch = StepBatch([dict(trainer._prepare_inputs(trainer.data_collator(rows["train"][:16])))])
        identity, estimates = trainer.method.estimator, []
        for estimator in (identity, replace(identity, response="auto", feedback="exact")):
            trainer.method = replace(trainer.method, estimator=estimator)
            queries = NodeQueries(trainer.zo_optimizer.session, TrainerReader(trainer))
            with trainer.query_forward.querying():
                estimates.append(queries(batch, Direction(0, 0), estimator).factors)
        names = [name for name in estimates[0] if "down_proj" in name]
        by_block = [_cosine(*(factors[name].e.flatten() for factors in estimates)) for name in names]
        whole = _cosine(*(torch.cat([one.dense().flatten() for one in factors.values()]) for factors in estimates))
        print(f"{task}: {' '.join(f'{one:.2f}' for one in by_block)}; all weights {whole:.2f}", flush=True)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def cost(options: argparse.Namespace) -> None:
    """Time single steps of the methods in turn, behind the frozen prefix, and the bare clean forward."""
    steps = {
        "clean forward": ["method=mezo"],
        "zoft, a step without probes": ["method=zoft"],
        "nodes, a step with a probe": ["method=nodes"],
        "mezo": ["method=mezo"],
        "adamw": ["method=adamw"],
    }
    runs: dict[str, tuple[Any, Any]] = {}
    model: Any = None
    small = ["task.num_train=32", "task.num_dev=2", "task.num_test=2", "trainer.per_device_train_batch_size=16"]
    for name, words in steps.items():
        trainer, rows = trainer_of([*TASKS["sms"], *words, *small, *options.set], model)
        model = trainer.model.eval()
        runs[name] = (trainer, trainer._prepare_inputs(trainer.data_collator(rows["train"][:16])))
    costs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    memory = PeakMemory("cpu")
    for turn in range(options.rounds + 2):
        for name, (trainer, batch) in runs.items():
            memory.reset()
            held, began = memory.current_mb(), time.perf_counter()
            if name == "clean forward":
                with torch.inference_mode(), trainer.query_forward.reusing_prefix():
                    trainer.zo_objective.loss(trainer.model, batch)
            else:
                with trainer.query_forward.querying():
                    estimate = trainer.run_steps.next(StepBatch([dict(batch)]), share_done=0.0)
            asked = time.perf_counter()
            if name != "clean forward":
                trainer.zo_optimizer.apply(estimate)
            if turn > 1:  # the first one probes, and both keep hidden states
                costs[name].append((asked - began, time.perf_counter() - began, memory.peak_mb() - held))
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in costs.items()}
    bare, mezo, adamw = (medians[name][1] for name in ("clean forward", "mezo", "adamw"))
    print(f"{'':<28} {'queries':>10} {'step':>10} {'queries / clean':>16} {'/ mezo':>7} {'/ adamw':>8} {'peak':>9}")
    for name, (asking, taken, peak) in medians.items():
        print(
            f"{name:<28} {1000 * asking:7.1f} ms {1000 * taken:7.1f} ms {asking / bare:16.2f} {taken / mezo:7.2f} "
            f"{taken / adamw:8.2f} {peak:6.0f} MB"
        )


MEMORY = {"inference": 0, "zoft": 7, "nodes": 6, "mezo": 6, "adamw": 9}
"""What is measured -> queries of three steps of it."""


def memory(options: argparse.Namespace) -> None:
    """Peak resident memory of a few steps of each method, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for name in MEMORY:
        with context.Pool(1) as pool:
            peaks[name] = pool.apply(_peak, (name, options.blocks))
        print(f"{name:<10} {peaks[name]:8.1f} MiB  {peaks[name] / peaks['inference']:6.3f} x inference", flush=True)


def _peak(name: str, blocks: int) -> float:
    """Three steps, or forwards, and the peak of the last two: the first one loads what the others have."""
    words = ["trainer.per_device_train_batch_size=16", "trainer.keep_frozen_prefix=false"]
    words += [f"trainable.num_blocks={blocks}", "trainer.eval_steps=1000000"]
    words += [f"method={name}", f"budget.queries={MEMORY[name]}"] if MEMORY[name] else ["method=mezo"]
    trainer, rows = trainer_of([*TASKS["sms"], *words])
    peak = FromSecond()
    if MEMORY[name]:
        trainer.add_callback(peak)
        trainer.train()
        return peak.found
    batch = trainer.collated(rows["train"][:16])
    for step in range(3):
        with torch.inference_mode():
            trainer.zo_objective.loss(trainer.model.eval(), batch)
        peak.at(step + 1)
    return peak.found


class FromSecond(TrainerCallback):
    """The most memory from the second step on."""

    def __init__(self) -> None:
        self.memory, self.found = PeakMemory("cpu"), 0.0

    def at(self, step: int) -> None:
        """A step has ended."""
        self.found = self.memory.peak_mb()
        if step == 1:
            self.memory.reset()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As :meth:`at`."""
        self.at(state.global_step)


def main() -> None:
    """Read the command line."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("learn")
    one.add_argument("tasks", nargs="+", choices=[*TASKS, *OWN])
    one.add_argument("--method", default="zoft")
    one.add_argument("--rate", help="learning rate; the method's own if left out")
    one.add_argument("--seeds", type=int, nargs="+", default=[0])
    one.add_argument("--marks", type=int, nargs="+", default=[30, 60])
    one.add_argument("--set", nargs="*", default=[], help="further arguments of zoft train")
    one.set_defaults(run=learn)
    four = verbs.add_parser("cosine")
    four.add_argument("tasks", nargs="+", choices=list(TASKS))
    four.set_defaults(run=cosine)
    two = verbs.add_parser("cost")
    two.add_argument("--rounds", type=int, default=10)
    two.add_argument("--set", nargs="*", default=[], help="further arguments of zoft train")
    two.set_defaults(run=cost)
    three = verbs.add_parser("memory")
    three.add_argument("--blocks", type=int, default=1, help="how many last blocks are trained")
    three.set_defaults(run=memory)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
