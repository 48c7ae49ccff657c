"""The rows of the fingerprint: what zoft computes in some two hundred tiny runs, each as a hash and as a few figures.

One file fingerprints an old tree and a new one, so it asks for zoft's public names only and reads what a run leaves
behind by content: modules, classes and fields may be renamed between the two. Run by `fingerprint.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, field
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import models, runs

RECORDED = Path(__file__).parents[1] / "assets" / "mezo_trajectory"
STEPS = 8
VARIANTS = (("fp32", "auto"), ("fp32", "in_place"), ("bf16", "auto"), ("lora", "auto"))

# What a preset needs on a model of 16 columns: ranks below that, and bases that are refreshed within eight steps.
THIN = ["subspace.rank=4", "subspace.interval=3"]
THREE = ["estimator.num_directions=3"]
SMALL = {
    "addax": ["estimator.long_tokens=5"],
    "aim_zo": [*THREE, "subspace.rank=4", "subspace.basis_columns=8", "subspace.shared_columns=3"],
    "deepzero": ["estimator.num_directions=4"],
    "eggroll": THREE,
    "es": THREE,
    "lezo": ["subspace.block_size=1"],
    "lozo": ["subspace.interval=3"],
    "lozo_m": ["subspace.interval=3"],
    "mezo_svrg": ["estimator.interval=3", "estimator.anchor_batches=2"],
    "s_mezo": ["subspace.interval=3"],
    "spsa_1_5": THREE,
    "subzero": THIN,
    "subzero_plus": [*THREE, *THIN],
    "tezo": ["subspace.rank=4"],
    "zo_act": ["subspace.rank=4"],
    "zo_mopi": THIN,
    "zo_muon": THIN,
}


@dataclass
class Row:
    """One run.

    Args:
        name: what ran: "mezo fp32 in_place", "minimize bowl", ...
        sha: the first 16 digits of a SHA-256 over all that the run decided; "refused" and an error's class where the
            parts of a preset do not fit.
        exact: figures that are equal on every machine: numbers of queries, seeds.
        near: figures that are equal within a tolerance on every machine: losses, scores.
    """

    name: str
    sha: str
    exact: dict[str, Any] = field(default_factory=dict)
    near: dict[str, list[float]] = field(default_factory=dict)


def sha_of(*values: Any) -> str:
    """The first 16 digits of a SHA-256 over values, floats to the last bit."""
    return hashlib.sha256(json.dumps(values, default=_plain).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        return hashlib.sha256(value.tobytes()).hexdigest()
    return value.item() if isinstance(value, np.generic) else str(value)


def rounded(values: Any) -> list[float]:
    """Six digits are enough for what is compared within a tolerance."""
    return [float(f"{float(value):.6g}") for value in values]


# ------------------------------------------------------------------------------------------------------------- training


def lora() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(models.tiny_opt(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


MODELS: dict[str, Callable[[], Any]] = {
    "fp32": models.tiny_opt,
    "bf16": lambda: models.tiny_opt().to(torch.bfloat16),
    "lora": lora,
}


@cache
def sequences() -> list[dict[str, torch.Tensor]]:
    batch = models.batch_for(models.tiny_opt(), rows=12, length=9)
    return [{name: value[i] for name, value in batch.items()} for i in range(12)]


def observer() -> Any:
    """A callback that keeps the loss of every step and the hash of the weights after it."""
    from transformers import TrainerCallback

    class Observer(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.weights: list[str] = []

        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            self.weights.append(sha_of(*model.parameters()))

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Observer()


def journal(path: Path) -> Any:
    """The contents of a journal; its module has moved once."""
    for name in ("zoft.journal.file", "zoft.journal.journal"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name).read(path)
    raise ModuleNotFoundError("zoft has no reader of journals where fingerprint_rows.py looks for it")


def either(record: Any, *names: str) -> Any:
    """A field of a record under the first of its names, old or new, that there is."""
    return next(getattr(record, name) for name in names if hasattr(record, name))


def trained(name: str, folder: Path, seen: Any) -> Row:
    """A row of a training that is over."""
    contents = journal(folder / "journal.bin")
    records = [
        (
            r.step,
            r.seed,
            either(r, "lr", "learning_rate"),
            r.eps,
            either(r, "queries", "num_queries"),
            r.flags,
            list(r.coefficients),
            list(r.curvatures),
            r.extra.get("directions"),
        )
        for r in contents.records
    ]
    digests = sorted(contents.digests.items())
    return Row(
        name,
        sha_of(records, digests, seen.losses, seen.weights),
        {"queries": records[-1][4], "steps": len(records), "seeds": [r[1] for r in records[:3]]},
        {"losses": rounded(seen.losses)},
    )


def preset(method: str, kind: str, engine: str) -> Row:
    """Eight steps of a method preset."""
    from zoft import UserError, ZOConfig, ZOTrainer
    from zoft.config import compose

    name = f"{method} {kind} {engine}"
    cfg = compose([f"method={method}", "budget.queries=20000", *SMALL.get(method, [])])
    cfg.optimizer.learning_rate = None  # the trainer's
    parts = {part: getattr(cfg, part) for part in ("subspace", "estimator", "weighting", "optimizer")}
    with tempfile.TemporaryDirectory() as folder:
        args = ZOConfig(
            output_dir=folder,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            per_device_train_batch_size=3,
            dataloader_pin_memory=False,
            max_steps=STEPS,
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            journal_hash_steps=1,
            seed=3,
        )
        seen = observer()
        try:
            trainer = ZOTrainer(
                MODELS[kind](), args, train_dataset=sequences(), engine=engine, callbacks=[seen], **parts
            )
            trainer.train()
        except UserError as error:
            return Row(name, f"refused {type(error).__name__}")
        return trained(name, Path(folder), seen)


def mezo() -> Row:
    """The recorded run of MeZO: twenty steps with its seeds, batches and generator."""
    from transformers import AutoModelForCausalLM

    from zoft import ZOConfig, ZOTrainer
    from zoft.estimators.central import Central

    model = AutoModelForCausalLM.from_pretrained(
        RECORDED / "model", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = json.loads((RECORDED / "sst2_full" / "batches.json").read_text())
    batches = [{key: torch.tensor(value["data"]) for key, value in row.items()} for row in rows]
    batches = [{"attention_mask": (batch["input_ids"] != 1).long()} | batch for batch in batches]
    steps = json.loads((RECORDED / "sst2_full" / "trajectory.json").read_text())["steps"]
    with tempfile.TemporaryDirectory() as folder:
        args = ZOConfig(
            output_dir=folder,
            max_steps=20,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
        )
        seen = observer()
        ZOTrainer(
            model=model,
            args=args,
            train_dataset=batches,
            data_collator=lambda rows: rows[0],
            estimator=Central(eps=1e-3, noise="torch_sequential"),
            objective="options",
            direction_seeds=[step["seed"] for step in steps],
            callbacks=[seen],
        ).train()
        return trained("mezo recorded", Path(folder), seen)


# ------------------------------------------------------------------------------------------------------------ black box

SCALES = np.logspace(0, 2, 10)


def noisy_bowl() -> Callable[[Any], float]:
    generator = np.random.default_rng(0)
    return lambda x: float((x**2).sum() + 0.01 * generator.standard_normal())


FUNCTIONS: dict[str, tuple[Callable[[], Callable[[Any], float]], Any, dict[str, Any]]] = {
    "bowl": (lambda: lambda x: float(((x - 1) ** 2).sum()), np.zeros(5), {}),
    "rosenbrock": (
        lambda: lambda x: float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()),
        np.array([-1.2, 1.0]),
        {"bounds": (-2.0, 2.0)},
    ),
    "stretched": (lambda: lambda x: float((SCALES * x**2).sum()), np.ones(10), {"num_directions": 4}),
    "waves": (
        lambda: lambda x: float((x**2 - 10 * np.cos(2 * np.pi * x) + 10).sum()),
        np.full(4, 2.2),
        {"bounds": (-5.12, 5.12), "bounds_by": "reparameterize"},
    ),
    "noisy": (noisy_bowl, np.ones(6), {"noisy": True}),
    "textbook": (
        lambda: lambda x: float((x["a"] ** 2).sum() + ((x["b"] - 2) ** 2).sum()),
        {"a": np.ones((2, 3)), "b": np.zeros(4, np.float32)},
        {"learning_rate": 0.05, "optimizer": "momentum", "estimator": "one_sided"},
    ),
}


def minimized(name: str) -> Row:
    """A search of 200 queries: every point that f was asked at, and the history."""
    import zoft

    make, x0, settings = FUNCTIONS[name]
    f, queries = make(), []

    def recorded(x: Any) -> float:
        value = f(x)
        queries.append((list(x.values()) if isinstance(x, dict) else [x], value))
        queries[-1] = sha_of(*queries[-1])
        return value

    result = zoft.minimize(recorded, x0, budget=200, **settings)
    history = [sorted(map(repr, astuple(record))) for record in result.history]  # whatever the fields are called
    x = list(result.x.values()) if isinstance(result.x, dict) else [result.x]
    return Row(
        f"minimize {name}",
        sha_of(queries, history, x, result.fun, result.num_queries),
        {"queries": result.num_queries},
        {"fun": rounded([result.fun])},
    )


def attacked() -> Row:
    """`zoft attack` on three digits: its results.json."""
    with tempfile.TemporaryDirectory() as folder:
        command("attack", "data=digits", "radius=0.2", "images=3", "budget=200", f"output_dir={folder}/attack")
        results = json.loads((Path(folder) / "attack" / "results.json").read_text())
    images = [image for image in results["images"] if not image["skipped"]]
    return Row(
        "attack digits",
        sha_of(results),
        {"queries": results["summary"]["num_queries"]},
        {"probabilities": rounded(image["before"]["probability"] for image in images)},
    )


def tuned(search: str) -> Row:
    """`zoft.tune` on a function: the points it was asked at, and what its record holds of them."""
    import zoft

    space = {"rate": "log(1e-5,1e-1)", "share": "uniform(0,1)", "depth": "int(1,8)", "kind": "choice(a,b,c)"}
    points = []

    def f(point: dict[str, Any]) -> float:
        points.append(dict(point))
        penalty = {"a": 0.0, "b": 0.3, "c": 0.1}[point["kind"]]
        return float((np.log10(point["rate"]) + 3) ** 2 + (point["share"] - 0.4) ** 2 + point["depth"] / 8 + penalty)

    with tempfile.TemporaryDirectory() as folder:
        result = zoft.tune(f, space, budget=12, search=search, output_dir=folder, seed=1)
        again = zoft.tune(f, space, budget=12, search=search, output_dir=folder, seed=1)
    evaluations = [(evaluation.number, evaluation.values, evaluation.value) for evaluation in again.evaluations]
    return Row(
        f"tune {search}",
        sha_of(points, evaluations, result.x, result.fun),
        {"points": len(points), "journal": again.num_resumed},
        {"fun": rounded([result.fun])},
    )


# --------------------------------------------------------------------------------------------------------- command line


def command(*arguments: str) -> None:
    """A command of zoft, quietly."""
    from zoft.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(list(arguments))
    if code:
        raise RuntimeError(f"zoft {' '.join(arguments)} ended with {code}: {printed.getvalue()[-500:]}")


def task_words(folder: Path) -> list[str]:
    """A tiny model and a file of messages, as arguments."""
    if not (folder / "model").exists():
        runs.model_folder(folder / "model")
        runs.data_file(folder / "data.jsonl")
    return [
        f"model.name={folder / 'model'}",
        "task=custom",
        f"task.train={folder / 'data.jsonl'}",
        "task.template='{text} is it spam'",
        "task.words={ham: 'no', spam: 'yes'}",
        "task.num_train=24",
        "task.num_dev=8",
        "task.num_test=16",
    ]


def commanded() -> Row:
    """`zoft train` of twelve steps, and `zoft eval` of what came out of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command(
            "train",
            *task_words(folder),
            "budget.queries=24",
            "optimizer.learning_rate=1e-2",
            "trainer.per_device_train_batch_size=4",
            f"output_dir={folder / 'run'}",
        )
        records = journal(folder / "run" / "journal.bin").records
        steps = [(r.seed, list(r.coefficients)) for r in records]
        command("eval", f"run={folder / 'run'}")
        (path,) = (folder / "run").rglob("predictions.jsonl")
        predictions = path.read_text().splitlines()
    return Row(
        "zoft train",
        sha_of(steps, predictions),
        {"queries": either(records[-1], "queries", "num_queries"), "seeds": [seed for seed, _ in steps[:3]]},
        {"scores": rounded(json.loads(predictions[0])["scores"])},
    )


def evaluated(mode: str) -> Row:
    """`zoft eval` of a model that nobody trained: its predictions."""
    more = ["k=3", "task.max_length=60"] if mode == "icl" else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command("eval", *task_words(folder), f"mode={mode}", *more, f"output_dir={folder / 'eval'}")
        predictions = (folder / "eval" / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in predictions]
    return Row(
        f"eval {mode}", sha_of(rows), {"rows": len(rows)}, {"scores": rounded(s for row in rows for s in row["scores"])}
    )


# ----------------------------------------------------------------------------------------------------------------- rows


def presets() -> list[str]:
    """The names of the method presets that come with the zoft that is imported."""
    import zoft

    return sorted(path.stem for path in (Path(zoft.__file__).parents[1] / "configs" / "method").glob("*.yaml"))


def all_rows() -> dict[str, Callable[[], Row]]:
    """Name of each row -> what makes it."""
    rows: dict[str, Callable[[], Row]] = {"mezo recorded": mezo, "attack digits": attacked, "zoft train": commanded}
    rows |= {f"minimize {name}": partial(minimized, name) for name in FUNCTIONS}
    rows |= {f"tune {search}": partial(tuned, search) for search in ("zo", "random")}
    rows |= {f"eval {mode}": partial(evaluated, mode) for mode in ("zero_shot", "calibrated", "icl")}
    for method in presets():
        rows |= {f"{method} {kind} {engine}": partial(preset, method, kind, engine) for kind, engine in VARIANTS}
    return rows


def make_rows(patterns: list[str]) -> Iterator[Row]:
    """The rows whose names match one of the patterns (all of them without patterns), each made when it is asked for.

    A row that fails is one as well, with the error's class: the others still say what they have to say.
    """
    for name, make in all_rows().items():
        if not patterns or any(fnmatch(name, pattern) for pattern in patterns):
            try:
                yield make()
            except Exception as error:
                yield Row(name, f"failed {type(error).__name__}: {str(error)[:200]}")


def main() -> None:
    """Print rows as JSON lines; the arguments are the tree whose zoft it has to be, and patterns."""
    import zoft

    tree, *patterns = sys.argv[1:]
    if Path(tree).resolve() not in Path(zoft.__file__).resolve().parents:
        sys.exit(f"zoft comes from {zoft.__file__} and not from {tree}")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    out, sys.stdout = sys.stdout, sys.stderr  # trainers print
    for row in make_rows(patterns):
        print(json.dumps(asdict(row)), file=out, flush=True)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
