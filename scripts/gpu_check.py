"""What only a GPU can show, in under ten minutes and in one table: `make gpu-check`.

Every part is a process of its own with a limit of time, so that one that fails or hangs leaves the others their rows.
Nothing is downloaded: models have random weights, made where they compute. The table, what each part printed and the
figures go into build/gpu-check; docs/performance.md says which of its rows they fill. `--rehearse` goes the same way on
a CPU with models of a few thousand weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 600
HERE = str(Path(__file__).resolve())
BENCH = str(Path(__file__).with_name("bench_step.py"))


@dataclass(frozen=True)
class Part:
    """One row of the table: what is run, and how many seconds it may take."""

    name: str
    seconds: int
    command: Callable[[argparse.Namespace], list[str]]
    read: Callable[[Path, str], tuple[str, str]]
    """(folder of the part, what it printed) -> (ok, left out or failed; what it found), where it exited with 0."""


# ---- the parts that are other programs -------------------------------------------------------------------------------


def tests(args: argparse.Namespace) -> list[str]:
    """The tests that are marked cuda."""
    return [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", str(ROOT / "tests" / "cuda")]


def read_tests(folder: Path, printed: str) -> tuple[str, str]:
    """pytest's closing line."""
    last = printed.strip().splitlines()[-1].strip("= ")
    return ("ok" if " passed" in last else "failed"), last


def bench(size: str) -> Callable[[argparse.Namespace], list[str]]:
    """One size of `make bench-gpu`."""

    def command(args: argparse.Namespace) -> list[str]:
        sizes = ["--sizes", "micro" if args.rehearse else size, "--device", args.device]
        return [sys.executable, BENCH, "--preset", "check", *sizes, "--steps", "50", "--no-memory"]

    return command


def read_bench(folder: Path, printed: str) -> tuple[str, str]:
    """Milliseconds of each variant, and why others are missing."""
    result = json.loads((folder / "step.json").read_text())
    rows = []
    for case in result["cases"]:
        ms, peak = case["milliseconds"], case["peak_mb"].get("zoft")
        row = f"{case['variant']} {case['engine']}: {ms['zoft']:.0f} ms a step, forwards alone {ms['limit']:.0f}"
        row += f", MeZO {ms['mezo']:.0f} ({ms['mezo'] / ms['zoft']:.1f}x)" if "mezo" in ms else ""
        rows.append(row + (f", {peak:,.0f} MB above the weights" if peak is not None else ""))
    rows += [f"{skip['variant']} left out: {skip['why']}" for skip in result["skipped"]]
    return ("ok" if result["cases"] else "left out"), "; ".join(rows)


# ---- the parts that are functions of this file -----------------------------------------------------------------------


def own(name: str, size: str = "") -> Callable[[argparse.Namespace], list[str]]:
    """This file again, for one of :data:`OWN`."""

    def command(args: argparse.Namespace) -> list[str]:
        words = [sys.executable, HERE, "--part", name, "--size", "micro" if args.rehearse else size]
        return words + ["--rehearse"] * args.rehearse

    return command


def read_own(folder: Path, printed: str) -> tuple[str, str]:
    """Its last line."""
    report = json.loads(printed.strip().splitlines()[-1])
    return report["how"], report["what"]


def seconds_of(call: Callable[[], Any], device: str, times: int = 5) -> float:
    """The median time of a call after a first one."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken = []
    for _ in range(times + 1):
        wait()
        began = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - began)
    return median(taken[1:])


def noise(args: argparse.Namespace) -> tuple[str, str]:
    """Compiled and eager noise: whether their bits are the same, and ns an element."""
    import torch

    from zoft.noise import kernels
    from zoft.noise.counter import LAWS
    from zoft.noise.direction import Direction
    from zoft.noise.kernels import cpu, cuda
    from zoft.noise.source import CounterNoise, agrees

    device, size = torch.device(args.device), 1 << (16 if args.rehearse else 26)
    compiled = cpu.load() if device.type == "cpu" else cuda.load()
    if not agrees(compiled, device):
        return "failed", f"{compiled.about}: other bits than the eager code's"
    weight, rows = torch.zeros(size, dtype=torch.bfloat16, device=device), []
    total, outs = torch.zeros(size, device=device), [torch.empty_like(weight) for _ in range(2)]
    for law in LAWS:
        source, times = CounterNoise(law, {"w": size}), []
        added = partial(source.add_, total, Direction(0, 0), "w", 0, 1e-3)
        two = partial(source.perturb, weight, Direction(0, 0), "w", 0, (1e-3, -1e-3), outs)
        for chosen in (compiled, None):
            with kernels.using(device, chosen):
                times += [1e9 * seconds_of(call, args.device) / size for call in (added, two)]
        rows.append(
            f"{law} added {times[0]:.3f} ns an element (eager {times[2]:.3f}), "
            f"two points in bfloat16 {times[1]:.3f} (eager {times[3]:.3f})"
        )
    return "ok", f"{compiled.about}: the eager code's bits; {'; '.join(rows)}"


def stepped(model: Any, variant: str, engine: str, args: argparse.Namespace) -> tuple[str, str]:
    """Milliseconds and peak memory of a step on 16 rows of up to 64 tokens."""
    import bench_step as steps
    import torch

    from zoft.report.memory import PeakMemory

    plan = steps.Plan(args.size, *((2, 8) if args.rehearse else (16, 64)))
    batch, _ = steps.batches_of(plan, args.device)
    stepper = steps.ZoftStep(model, steps.VARIANTS[variant], 1, engine, batch)
    stepper.step()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    memory = PeakMemory(args.device)
    memory.reset()
    taken = seconds_of(stepper.step, args.device, 1 if engine == "offload" else 5)
    return "ok", f"{variant} {stepper.engine}: {1000 * taken:.0f} ms a step, {memory.peak_mb():,.0f} MB at its peak"


def quantised(kind: str) -> Callable[[argparse.Namespace], tuple[str, str]]:
    """LoRA on a base of 4 or 8 bits."""

    def run(args: argparse.Namespace) -> tuple[str, str]:
        if importlib.util.find_spec("bitsandbytes") is None:
            return "left out", "bitsandbytes is not installed: pip install 'zoft[quant]'"
        import bench_step as steps

        from zoft.component import create

        model = steps.build(args.size, "none", args.device, args.dtype)
        before = sum(p.numel() * p.element_size() for p in model.parameters())
        in_few_bits(model, kind, args)
        after = sum(p.numel() * p.element_size() for p in model.parameters())
        model = create("peft", "lora", "none").wrap(model, seed=0)
        how, what = stepped(model, "lora", "auto", args)
        return how, f"{what}; weights {before / 2**20:,.1f} -> {after / 2**20:,.1f} MB"

    return run


def in_few_bits(model: Any, kind: str, args: argparse.Namespace) -> None:
    """Every linear layer but the head by bitsandbytes' own, one after the other, as transformers replaces them."""
    import bitsandbytes as bnb
    from torch import nn

    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or name.endswith("lm_head"):
            continue
        sizes, has_bias, weight = (linear.in_features, linear.out_features), linear.bias is not None, linear.weight
        if kind == "nf4":
            new = bnb.nn.Linear4bit(*sizes, has_bias, args.dtype, quant_type="nf4", device="meta")
            stored = bnb.nn.Params4bit(weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*sizes, has_bias, has_fp16_weights=False, device="meta")
            stored = bnb.nn.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
        parent, _, last = name.rpartition(".")
        linear.weight = None
        new.weight, new.bias = stored.to(args.device), linear.bias
        setattr(model.get_submodule(parent), last, new)
    model.is_quantized = True
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)


def offload(args: argparse.Namespace) -> tuple[str, str]:
    """All weights trained, two blocks on the device at a time."""
    import bench_step as steps

    return stepped(steps.build(args.size, "none", args.device, args.dtype), "gaussian", "offload", args)


OWN = {"noise": noise, "nf4": quantised("nf4"), "int8": quantised("int8"), "offload": offload}

PARTS = [
    Part("tests marked cuda", 150, tests, read_tests),
    Part("noise", 40, own("noise"), read_own),
    Part("step, OPT-1.3B size", 80, bench("opt_1.3b"), read_bench),
    Part("step, OPT-13B size", 100, bench("opt_13b"), read_bench),
    Part("nf4, OPT-13B size", 50, own("nf4", "opt_13b"), read_own),
    Part("int8, OPT-13B size", 50, own("int8", "opt_13b"), read_own),
    Part("offload, OPT-13B size", 70, own("offload", "opt_13b"), read_own),
    Part("step, OPT-66B size", 60, bench("opt_66b"), read_bench),
]


# ---- running them ----------------------------------------------------------------------------------------------------


def run(part: Part, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One part, in a process group that is ended as a whole when its time is up."""
    folder = args.output / part.name.replace(",", "").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    command = part.command(args)
    if BENCH in command:
        command += ["--output", str(folder)]
    began, log = time.perf_counter(), folder / "printed.txt"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    env |= {"HF_HUB_OFFLINE": "1", "ZOFT_COMPILE": "always", "ZOFT_TEST_DEVICE": args.device}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    printed = log.read_text()
    if code is None:
        how, what = "stopped", f"not done after {seconds:.0f} s: {log}"
    elif code:
        how, what = "failed", f"{last_line(printed) or f'exit code {code}'}: {log}"
    else:
        try:
            how, what = part.read(folder, printed)
        except (OSError, ValueError, KeyError, IndexError) as error:
            how, what = "failed", f"what it left cannot be read ({error}): {log}"
    return {"part": part.name, "how": how, "what": what, "seconds": time.perf_counter() - began}


def last_line(printed: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "")


def table(rows: list[dict[str, Any]]) -> str:
    """As it goes into docs/performance.md."""
    lines = ["| part | | what it found | s |", "|:--|:--|:--|--:|"]
    lines += [
        f"| {row['part']} | {row['how']} | {row['what'].replace('|', '/')} | {row['seconds']:.0f} |" for row in rows
    ]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with tiny models: the way, not the figures"
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=f"of {names}")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check", help="folder")
    parser.add_argument("--patience", type=float, default=1.0, help="times the limits, on a machine that is shared")
    parser.add_argument("--part", choices=list(OWN), help=argparse.SUPPRESS)
    parser.add_argument("--size", default="micro", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.device = "cpu" if args.rehearse else "cuda"
    return args


def main(arguments: list[str] | None = None) -> int:
    """0 where every part was run or had a reason to be left out, 1 where one failed or was stopped, 2 without a GPU."""
    args = parse(arguments)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu_check.py: torch {torch.__version__} sees no NVIDIA GPU, and everything here needs one: run it where "
            "there is one (--rehearse goes the same way on a CPU with tiny models)",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(ROOT / "scripts"))
    args.dtype = torch.float32 if args.rehearse else torch.bfloat16
    if args.part:
        try:
            how, what = OWN[args.part](args)
        except torch.OutOfMemoryError as error:
            how, what = "left out", str(error).split(". GPU")[0]
        print(json.dumps({"how": how, "what": what}))
        return 0
    rows, until = [], time.perf_counter() + args.patience * TOTAL_SECONDS
    for part in (part for part in PARTS if part.name in args.only):
        seconds = max(1.0, min(args.patience * part.seconds, until - time.perf_counter()))
        print(f"{part.name} (at most {seconds:.0f} s) ...", file=sys.stderr, flush=True)
        rows.append(run(part, args, seconds))
        store(rows, args)
    print(f"{about(args)}\n\n{table(rows)}")
    return int(any(row["how"] in ("failed", "stopped") for row in rows))


def about(args: argparse.Namespace) -> str:
    """Where and with what: a figure means nothing without."""
    import torch

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    card = "rehearsed on a CPU: no figure here means anything"
    if args.device == "cuda":
        card = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    return f"`make gpu-check`, {time.strftime('%Y-%m-%d')}, {card}; torch {torch.__version__}, zoft {commit}"


def store(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """What there is so far: a machine may be taken away."""
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "table.md").write_text(f"{about(args)}\n\n{table(rows)}\n")
    (args.output / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
