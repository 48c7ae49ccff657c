"""How fast is one step? zoft against MeZO's published step and against bare forwards, paired, in one process.

Every round times, one after the other and on the same rows: MeZO's step (mezo_step.py), the forwards alone as MeZO runs
them, the forwards alone as zoft runs them (the limit), and zoft's own step. Ratios are medians over the rounds of the
ratio within a round. Shares of time come from one further step with clocks in it; peak memory on the CPU from a process
of its own per scheme. `make bench` and `make bench-gpu` run this file. docs/performance.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
import transformers
from bench_probes import clock_in, in_processes_of_their_own, noise_of, peak_mb_above_now
from bench_report import draw, slopes_of, table
from mezo_step import MezoStep, option_loss
from transformers.initialization import no_init_weights

from zoft.component import components, create
from zoft.engines.base import Session
from zoft.errors import UserError
from zoft.estimators.base import Estimator
from zoft.lm.data.tokens import OptionCollator
from zoft.lm.objectives.options import Options
from zoft.report.memory import PeakMemory
from zoft.step.estimate import StepEstimate
from zoft.step.update import ZOOptimizer
from zoft.trainer.loss import with_float32_losses
from zoft.weights.rounding import Rounding
from zoft.weights.tensors import Weights

ROOT = Path(__file__).resolve().parent.parent
EPS, LEARNING_RATE, SEED = 1e-3, 1e-7, 0
MIN_ROUNDS, MAX_ROUNDS = 3, 25
BEGAN = time.perf_counter()
Key = tuple[str, int]  # (name of a scheme, number of directions q)

# ---- what is measured ------------------------------------------------------------------------------------------------


def opt(layers: int, hidden: int, heads: int, vocab: int = 50272) -> tuple[str, dict[str, Any]]:
    """An OPT configuration: feed-forward 4 x hidden, learned positions, tied head."""
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "vocab_size": vocab}
    return "OPTConfig", sizes | {"ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, "dropout": 0.0}


_SMOLLM2 = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
_SMOLLM2 |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    **{"micro": opt(2, 32, 2, vocab=512), "small": opt(4, 256, 4), "opt_125m": opt(12, 768, 12)},
    "smollm2_135m": ("LlamaConfig", _SMOLLM2),
    **{"opt_1.3b": opt(24, 2048, 32), "opt_6.7b": opt(32, 4096, 32), "opt_13b": opt(40, 5120, 40)},
    "opt_66b": opt(64, 9216, 72),
}


@dataclass(frozen=True)
class Variant:
    """What is trained: a subspace of everything, or the whole of an adapter."""

    subspace: str = "full"
    fields: dict[str, Any] = field(default_factory=dict)
    peft: str = "none"


VARIANTS = {
    "gaussian": Variant(fields={"law": "gaussian"}),
    "rademacher": Variant(fields={"law": "rademacher"}),
    "low_rank": Variant("low_rank"),
    "lora": Variant(peft="lora"),
    "prefix": Variant(peft="prefix"),
}


@dataclass(frozen=True)
class Plan:
    """One size and shape; each adapter's rounds go on for ``seconds``, and are three at least (one where that is 0)."""

    size: str
    rows: int = 4
    tokens: int = 32
    qs: tuple[int, ...] = (1,)
    seconds: float = 15.0
    variants: tuple[str, ...] = tuple(VARIANTS)
    mezo: bool = True


ALL_Q = (1, 8, 16)
PRESETS = {
    ("cpu", "micro"): [Plan("micro", 2, 8, (1, 2), 0.3, ("gaussian", "low_rank", "lora"))],
    ("cpu", "small"): [
        Plan("small", qs=(1, 8), seconds=4),
        Plan("opt_125m", seconds=8, variants=("gaussian", "rademacher", "low_rank", "lora")),
    ],
    ("cpu", "full"): [
        *(Plan("small", rows, tokens, ALL_Q, 25) for rows, tokens in ((4, 32), (16, 64))),
        *(Plan(size, qs=ALL_Q, seconds=90) for size in ("opt_125m", "smollm2_135m")),
        *(Plan(size, 16, 64, seconds=45) for size in ("opt_125m", "smollm2_135m")),
    ],
    ("cpu", "check"): [Plan("micro", 2, 8, (1,), 0.1, ("gaussian",))],  # how gpu_check.py rehearses the next one
    ("cuda", "check"): [
        Plan("opt_1.3b", 16, 64, seconds=4),
        Plan("opt_13b", 16, 64, seconds=6, variants=("gaussian", "lora")),
        Plan("opt_66b", 16, 64, seconds=0, variants=("gaussian",), mezo=False),
    ],
    ("cuda", "small"): [Plan("opt_1.3b", 16, 64, (1, 8))],
    ("cuda", "full"): [
        *(Plan(size, 16, 64, ALL_Q, 30) for size in ("opt_1.3b", "opt_6.7b", "opt_13b")),
        Plan("opt_1.3b", qs=ALL_Q, seconds=30),
        Plan("opt_66b", seconds=0, variants=("gaussian",), mezo=False),
    ],
}

# ---- models and rows -------------------------------------------------------------------------------------------------


def build(size: str, peft: str, device: str, dtype: torch.dtype) -> Any:
    """A model with random weights, made where it is to be in its own dtype: weights of 66 B parameters exist once."""
    kind, fields = SIZES[size]
    with no_init_weights(), torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**fields), dtype=dtype)
    model.tie_weights()
    torch.manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02)
        else:
            parameter.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return create("peft", peft, "none").wrap(model.eval(), seed=SEED)


def batches_of(plan: Plan, device: str) -> list[dict[str, Any]]:
    """The same SST-2-like rows as zoft's batch (one row a prompt) and as MeZO's (one row an option).

    Prompts of half to all of ``plan.tokens``, the option counted; two options of one token each. MeZO's code pads to
    the longest and up to a multiple of 8.
    """
    generator = numpy.random.default_rng(SEED)
    rows = []
    others = generator.integers(plan.tokens // 2, plan.tokens + 1, plan.rows - 1)
    for index, length in enumerate([plan.tokens, *others]):
        prompt = generator.integers(8, SIZES[plan.size][1]["vocab_size"], length - 1).tolist()
        rows.append({"sequences": [[*prompt, 5], [*prompt, 6]], "lengths": [1, 1], "label": index % 2})
    zoft_batch, mezo_batch = OptionCollator(1)(rows), OptionCollator(1, one_row_per_option=True, multiple_of=8)(rows)
    mezo_batch["position_ids"] = (mezo_batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return [{key: value.to(device) for key, value in batch.items()} for batch in (zoft_batch, mezo_batch)]


# ---- the schemes -----------------------------------------------------------------------------------------------------


def bind(model: Any, variant: Variant, estimator: Estimator, engine: str, objective: Any) -> tuple[str, Session]:
    """An engine chosen and bound as ``ZOMixin.create_optimizer`` does it: (its name, the session)."""
    weights = Weights(model)
    coordinates = create("subspace", variant.subspace, "full", **variant.fields).bind(weights, estimator.noise)
    chosen = create("engine", engine, "auto").choose(estimator, coordinates, model)
    return chosen.name(), chosen.bind(model, coordinates, with_float32_losses(objective))


class ZoftStep:
    """Central differences along q directions and plain SGD, driven as the trainer drives them."""

    def __init__(self, model: Any, variant: Variant, q: int, engine: str, batch: dict[str, Any]) -> None:
        self.model, self.batch, self.objective = model, batch, Options().loss
        self.estimator = create("estimator", "central", "central", num_directions=q, eps=EPS)
        self.engine, self.session = bind(model, variant, self.estimator, engine, lambda b: self.objective(model, b))
        groups = [{"params": list(self.session.weights.tensors.values())}]
        rounding = Rounding.chosen("auto", SEED, self.estimator.noise)
        self.zo_optimizer = ZOOptimizer(
            groups, create("optimizer", "sgd", "sgd"), self.session, LEARNING_RATE, rounding
        )

    def step(self) -> None:
        """Query, estimate, update."""
        progress = self.zo_optimizer.progress
        directions = self.estimator.directions(SEED, progress.steps)
        losses = self.session.losses(self.batch, self.estimator.points(directions))
        progress.steps += 1
        slopes = (self.estimator.projected_grads(losses) / self.estimator.num_directions).tolist()
        self.zo_optimizer.apply(StepEstimate.of(list(zip(directions, slopes, strict=True))))


@torch.inference_mode()
def forwards(loss: Callable[..., Any], model: Any, batch: dict[str, Any], count: int) -> list[float]:
    """Bare evaluations of the objective at the weights as they are."""
    return torch.stack([loss(model, batch) for _ in range(count)]).tolist()


class Contest:
    """The schemes that are compared for one plan and one adapter; MeZO and every variant have weights of their own.

    Args:
        plan: size, shape and numbers of directions.
        peft: adapter on the model.
        labels: the variants with that adapter.
        args: command line.
    """

    def __init__(self, plan: Plan, peft: str, labels: list[str], args: argparse.Namespace) -> None:
        self.plan, self.peft, self.device, self.engine = plan, peft, args.device, args.engine
        self.batch, self.mezo_batch = batches_of(plan, args.device)
        self.model = build(plan.size, peft, args.device, args.dtype)
        self.mezo = MezoStep(copy.deepcopy(self.model), LEARNING_RATE, EPS) if plan.mezo else None
        self.loss_difference = self._compare_losses(1e-4 if args.dtype == torch.float32 else 0.1)
        self.peaks: dict[Key, float] = {}  # MiB above what was allocated before; on CUDA only
        self.skipped: dict[str, str] = {}
        self.zoft: dict[Key, ZoftStep] = {}
        for label in labels:
            try:
                model = copy.deepcopy(self.model) if self.zoft else self.model
                for q in plan.qs:
                    self._warm_up((label, q), lambda key, model=model: self._first_step(key, model))
            except (UserError, torch.OutOfMemoryError) as error:
                self.skipped[label] = str(error).split(". ")[0]
                self.zoft = {key: value for key, value in self.zoft.items() if key[0] != label}

    def _first_step(self, key: Key, model: Any) -> None:
        self.zoft[key] = ZoftStep(model, VARIANTS[key[0]], key[1], self.engine, self.batch)
        self.zoft[key].step()

    def _compare_losses(self, tolerance: float) -> float | None:
        """MeZO's loss and zoft's at the clean weights must agree, or nothing is comparable."""
        if self.mezo is None:
            return None
        (loss,) = forwards(Options().loss, self.model, self.batch, 1)
        difference = abs(loss - self.mezo.loss(self.mezo_batch))
        if not difference <= tolerance:
            raise SystemExit(f"{self.plan.size}: MeZO's loss and zoft's differ by {difference:g} at the same weights")
        return difference

    def _schemes(self, q: int) -> dict[str, tuple[Callable[[], Any], int]]:
        """name -> (what to time, how many of it make a step of q directions)."""
        schemes: dict[str, tuple[Callable[[], Any], int]] = {}
        if self.mezo is not None:
            mezo, batch = self.mezo, self.mezo_batch
            schemes["mezo"] = (lambda: mezo.step(batch), q)
            schemes["mezo_forwards"] = (lambda: forwards(option_loss, mezo.model, batch, 2), q)
        schemes["limit"] = (lambda: forwards(Options().loss, self.model, self.batch, 2 * q), 1)
        return schemes | {label: (zoft.step, 1) for (label, number), zoft in self.zoft.items() if number == q}

    def rounds(self) -> dict[Key, list[float]]:
        """Seconds of every scheme in every round; all numbers of directions are in each round."""
        schemes = {(name, q): scheme for q in self.plan.qs for name, scheme in self._schemes(q).items()}
        for key in schemes.keys() - self.zoft.keys():
            self._warm_up(key, lambda key: schemes[key][0]())
        seconds: dict[Key, list[float]] = {key: [] for key in schemes}
        began = time.perf_counter()
        for number in range(MAX_ROUNDS):
            if number >= (MIN_ROUNDS if self.plan.seconds else 1) and time.perf_counter() - began > self.plan.seconds:
                break
            for key, (call, times) in schemes.items():
                seconds[key].append(times * self._timed(call))
        return seconds

    def _timed(self, call: Callable[[], Any]) -> float:
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - began

    def _warm_up(self, key: Key, call: Callable[[Key], Any]) -> None:
        """The first time, when what is kept is made; on CUDA its peak is taken."""
        if self.device == "cpu":
            call(key)
            return
        memory = PeakMemory(self.device)
        memory.reset()
        before = memory.current_mb()
        call(key)
        self.peaks[key] = memory.peak_mb() - before


# ---- where the time goes, and memory ---------------------------------------------------------------------------------


def shares_of(contest: Contest) -> dict[Key, dict[str, float]]:
    """Shares of one more step of each scheme; MeZO's four passes over the weights are noise."""
    shares = {}
    for key, zoft in contest.zoft.items():
        with clock_in(zoft.model, contest.device, (zoft, "objective"), noise_of(zoft.session)) as clock:
            zoft.step()
            shares[key] = clock.shares()
    mezo = contest.mezo
    if mezo is not None:
        with clock_in(mezo.model, contest.device, (mezo, "loss"), [(mezo, "perturb"), (mezo, "update")]) as clock:
            mezo.step(contest.mezo_batch)
            shares |= {("mezo", q): clock.shares() for q in contest.plan.qs}
    return shares


def peak_of(plan: Plan, peft: str, key: Key, engine: str, threads: int) -> float:
    """Peak MiB of one scheme on the CPU, in a process that does nothing else."""
    quiet()
    torch.set_num_threads(threads)
    model = build(plan.size, peft, "cpu", torch.float32)
    batch, mezo_batch = batches_of(plan, "cpu")
    step: Callable[[], Any] = partial(forwards, Options().loss, model, batch, 2)
    step()  # what libraries allocate once is there before the count begins
    if key[0] == "mezo":
        step = partial(MezoStep(model, LEARNING_RATE, EPS).step, mezo_batch)
    elif key[0] != "limit":
        step = ZoftStep(model, VARIANTS[key[0]], key[1], engine, batch).step
    return peak_mb_above_now(step)


def peaks_on_cpu(contest: Contest, args: argparse.Namespace) -> dict[Key, float]:
    """MiB above the weights of every scheme: zoft's at the fewest directions, with --preset full at the most too."""
    qs = contest.plan.qs
    some = {qs[0], qs[-1]} if args.preset == "full" else {qs[0]}
    alike: list[Key] = [("limit", qs[0])] + [("mezo", qs[0])] * (contest.mezo is not None)
    keys = alike + [key for key in contest.zoft if key[1] in some]
    jobs = [(contest.plan, contest.peft, key, contest.engine, args.threads) for key in keys]
    peaks = dict(zip(keys, in_processes_of_their_own(peak_of, jobs), strict=True))
    return peaks | {(name, q): peaks[name, qs[0]] for name, _ in alike for q in qs}  # theirs do not depend on q


# ---- records ---------------------------------------------------------------------------------------------------------


def spread(above: list[float] | None, below: list[float]) -> dict[str, float] | None:
    """Median and quartiles over the rounds of a ratio within each; None where there is nothing to divide."""
    if above is None:
        return None
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return dict(zip(("q1", "median", "q3"), numpy.percentile(ratios, [25, 50, 75]).tolist(), strict=True))


def run_contest(plan: Plan, peft: str, labels: list[str], args: argparse.Namespace) -> tuple[list[Any], dict[str, str]]:
    """What is stored about each case of one plan and adapter, and the variants that were skipped with the reason."""
    contest = Contest(plan, peft, labels, args)
    seconds, shares = contest.rounds(), shares_of(contest)
    peaks = peaks_on_cpu(contest, args) if args.device == "cpu" and args.memory else contest.peaks
    records = []
    for (label, q), zoft in contest.zoft.items():
        keys = {name: (name, q) for name in ("mezo", "mezo_forwards", "limit")} | {"zoft": (label, q)}
        raw = {name: seconds[key] for name, key in keys.items() if key in seconds}
        about = {"size": plan.size, "rows": plan.rows, "tokens": plan.tokens, "variant": label, "q": q}
        about |= {"engine": zoft.engine, "what": asdict(VARIANTS[label]), "rounds": len(raw["zoft"]), "seconds": raw}
        about |= {"milliseconds": {name: 1000 * median(values) for name, values in raw.items()}}
        about |= {
            "trained": zoft.session.weights.num_elements,
            "x_mezo": spread(raw.get("mezo"), raw["zoft"]),
            "x_limit": spread(raw["zoft"], raw["limit"]),
            "limit_x_mezo": spread(raw.get("mezo"), raw["limit"]),
            "queries_per_second": 2 * q / median(raw["zoft"]),
            "peak_mb": {name: peaks.get(key) for name, key in keys.items() if name != "mezo_forwards"},
            "shares": {name: shares[key] for name, key in keys.items() if key in shares},
            "loss_difference": contest.loss_difference,
        }
        records.append(about)
    return records, contest.skipped


def endurance(label: str, args: argparse.Namespace) -> dict[str, Any]:
    """Many steps of a micro model: the median time of the last tenth over that of the first.

    A busy machine slows everything: a bare forward is timed beside each step, and the ratio to it is compared too.
    """
    torch.set_num_threads(1)  # there is nothing to share in a model of this size
    model = build("micro", VARIANTS[label].peft, args.device, args.dtype)
    batch, _ = batches_of(Plan("micro"), args.device)
    zoft = ZoftStep(model, VARIANTS[label], 1, args.engine, batch)
    times = []
    for _ in range(args.steps):
        began = time.perf_counter()
        zoft.step()  # the losses have been read before the update, so a device is at most one update behind
        middle = time.perf_counter()
        forwards(Options().loss, model, batch, 2)
        times.append((middle - began, time.perf_counter() - middle))
    tenth = max(1, args.steps // 10)
    first, last = (median(step for step, _ in part) for part in (times[:tenth], times[-tenth:]))
    paired = [median(step / bare for step, bare in part) for part in (times[:tenth], times[-tenth:])]
    about = {"variant": label, "engine": zoft.engine, "steps": args.steps, "first_ms": 1e3 * first}
    return about | {"last_ms": 1e3 * last, "ratio": last / first, "x_limit": paired[1] / paired[0]}


# ---- command ---------------------------------------------------------------------------------------------------------


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Versions, hardware, date: what a figure means nothing without."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpus = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **{"preset": args.preset, "engine": args.engine, "dtype": str(args.dtype).removeprefix("torch.")},
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        **{"cpu": (cpus or [platform.processor()])[0], "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        **{"zoft": commit or "unknown", "torch": torch.__version__, "transformers": transformers.__version__},
        "python": platform.python_version(),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="small", choices=["micro", "small", "full", "check"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--engine", default="auto", choices=list(components("engine")))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), metavar="SIZE", help="only these of the preset's")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--steps", type=int, default=1000, help="of the endurance run")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out peak memory on the CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench", help="folder (default build/bench)")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device; `make bench` measures on the CPU")
    if (args.device, args.preset) not in PRESETS:
        parser.error(f"--preset {args.preset} is for the CPU")
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    return args


def quiet() -> None:
    """No advice from libraries between the lines."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("zoft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def measure(plan: Plan, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Add one plan's cases to the result, adapter by adapter, and what had to be left out."""
    wanted = [v for v in plan.variants if v in args.variants]
    why = {v: f"there is no subspace called {VARIANTS[v].subspace}" for v in wanted if not exists(v)}
    for peft in dict.fromkeys(VARIANTS[v].peft for v in wanted if v not in why):
        labels = [v for v in wanted if v not in why and VARIANTS[v].peft == peft]
        about = f"{time.perf_counter() - BEGAN:4.0f} s  {plan.size} {plan.rows}x{plan.tokens}: {', '.join(labels)}"
        print(about, file=sys.stderr, flush=True)
        try:
            cases, skipped = run_contest(plan, peft, labels, args)
        except torch.OutOfMemoryError as error:
            cases, skipped = [], dict.fromkeys(labels, str(error).split(". ")[0])
        result["cases"] += cases
        why |= skipped
        gc.collect()  # the models are in cycles with what is timed
        if args.device == "cuda":
            torch.cuda.empty_cache()
    result["skipped"] += [{"size": plan.size, "variant": variant, "why": reason} for variant, reason in why.items()]


def exists(variant: str) -> bool:
    """Whether its subspace has been written."""
    return VARIANTS[variant].subspace in components("subspace")


def store(result: dict[str, Any], folder: Path) -> None:
    """JSON, table and picture of what there is so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "step.txt").write_text(table(result) + "\n")
    draw(result, folder / "step.png")


def main() -> None:
    """Measure, store after each plan, print."""
    args = parse()
    quiet()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"environment": environment(args), "cases": [], "slopes": [], "skipped": []}
    result["endurance"] = []
    for plan in PRESETS[args.device, args.preset]:
        if args.sizes is None or plan.size in args.sizes:
            measure(plan, args, result)
            result["slopes"] = slopes_of(result["cases"])
            store(result, args.output)
    of_each = "variant" if args.preset == "full" else "engine"
    for case in {case[of_each]: case for case in reversed(result["cases"])}.values():
        result["endurance"].append(endurance(case["variant"], args))
    store(result, args.output)
    print(f"{table(result)}\n\nstored: step.json, step.txt and step.png in {args.output}")


if __name__ == "__main__":
    main()
