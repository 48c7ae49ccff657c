"""What processes are worth: ranks x mode -> step time, bytes, efficiency; and what grows with q and d. docs/scaling.md.

    python scripts/bench_scale.py [--ranks 1 2 4] [--steps 6] [--hidden 256] [--layers 4] [--directions 8]

A random Llama, rows of random tokens, central differences, engine layerwise, gloo over loopback, one thread a process.
Every cell is a run of ZOTrainer in processes of its own, forked from one that has loaded everything; figures are
medians over the steps after the first, of the rank that needs most. Efficiency is by CPU seconds, which a busy machine
and fewer cores than ranks leave alone: those of one rank that does everything, by those of all ranks together.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from zoft import ZOConfig, ZOTrainer
from zoft.engines._stage import Stage
from zoft.estimators.central import Central
from zoft.trainer.processes import Processes
from zoft.version import __version__

MODES = ("data", "directions", "both")


class Timed(TrainerCallback):
    """Seconds and CPU seconds of each step, and CPU seconds of its writing (q directions drawn and added)."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.cpu: list[float] = []
        self.writes: list[float] = []
        self._began = self._cpu = self._asked = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clocks start."""
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The losses are there."""
        self._asked = time.process_time()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is written."""
        self.steps.append(time.perf_counter() - self._began)
        self.cpu.append(time.process_time() - self._cpu)
        self.writes.append(time.process_time() - self._asked)


def trained(given: argparse.Namespace, *, world: int, mode: str, directions: int) -> dict[str, Any]:
    """One cell: medians of this rank, and the bytes that it sent in a step."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=given.hidden, intermediate_size=4 * given.hidden, num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64, num_key_value_heads=given.hidden // 64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 2048, (4 * given.rows, given.length))
    groups = {"data": 1, "directions": world, "both": 2, "pipeline": world}[mode]
    spans = Spans()
    with tempfile.TemporaryDirectory() as folder:
        args = ZOConfig(
            output_dir=folder, max_steps=given.steps, per_device_train_batch_size=given.rows * groups // world,
            parallel=mode, parallel_directions=groups if mode == "both" else 0, logging_steps=1, save_strategy="no",
            report_to=[], disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True,
        )  # fmt: skip
        timed = Timed()
        trainer = ZOTrainer(
            model,
            args,
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            estimator=Central(num_directions=directions),
            engine="layerwise",
            callbacks=[timed],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        with spans.noted():
            trainer.train()
    return {
        "step": statistics.median(timed.steps[1:]),
        "cpu": statistics.median(timed.cpu[1:]),
        "write": statistics.median(timed.writes[1:]),
        "bytes": trainer.grid.traffic.get("bytes_sent", 0),
        "weights": sum(weight.numel() for weight in model.parameters()),
        "held": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "spans": spans.of_steps[1:],
    }


class Spans:
    """CPU seconds of every forward of a pipeline's schedules in this process."""

    def __init__(self) -> None:
        self.of_steps: list[list[float]] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within this block every schedule is timed."""
        run = Stage.run

        def timed(stage: Stage, calls: Any, kinds: Any) -> list[Any]:
            spans: list[float] = []

            def clocked(call: Callable[[], Any]) -> Any:
                began = time.process_time()
                try:
                    return call()
                finally:  # a forward ends by an exception where the next process goes on
                    spans.append(time.process_time() - began)

            results = run(stage, [partial(clocked, call) for call in calls], kinds)
            self.of_steps.append(spans[-len(calls) :])  # the ones before them found out how large hidden states are
            return results

        Stage.run = timed  # type: ignore[method-assign]
        try:
            yield
        finally:
            Stage.run = run  # type: ignore[method-assign]


def idle_share(spans: list[list[float]]) -> float:
    """How much of their time processes would wait that take this long for each forward, and have a core each.

    Args:
        spans: [stages][forwards], seconds.

    Example:
        >>> idle_share([[1.0, 1.0], [1.0, 1.0]]) == (2 - 1) / (2 + 2 - 1)
        True
    """
    ends = [0.0] * len(spans[0])
    for of_stage in spans:  # a forward begins where the stage before has ended it, and this one the forward before
        free = 0.0
        for number, seconds in enumerate(of_stage):
            free = ends[number] = max(free, ends[number]) + seconds
    return 1 - sum(map(sum, spans)) / (len(spans) * ends[-1])


def talked(world: int) -> dict[str, float]:
    """Seconds of one all-gather and one all-reduce of as many numbers, medians of 100."""
    cpu = torch.device("cpu")
    torch.distributed.init_process_group("gloo")
    processes, medians = Processes(world, int(os.environ["RANK"]), cpu), {}
    for count in (17, 4097):
        numbers = torch.zeros(count, dtype=torch.float64)
        calls: dict[str, Callable[[], Any]] = {
            "gather": lambda numbers=numbers: processes.gather_alike(numbers),
            "reduce": lambda numbers=numbers: processes.sum(numbers),
        }
        for name, call in calls.items():
            seconds = []
            for _ in range(100):
                processes.wait()
                began = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - began)
            medians[f"{name} of {8 * count} bytes"] = statistics.median(seconds)
    torch.distributed.destroy_process_group()
    return medians


def in_processes(world: int, call: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """What the call returns in each of ``world`` forked processes, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            child = os.fork()
            if child:
                children.append(child)
                continue
            code = 1
            try:
                if world > 1:
                    env = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
                    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                    os.environ.update({name: str(value) for name, value in env.items()})
                torch.set_num_threads(1)
                (Path(folder) / str(rank)).write_text(json.dumps(call()))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        if any(os.waitpid(child, 0)[1] for child in children):
            sys.exit("a process failed")
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(world)]


def bytes_of(world: int, mode: str, points: int) -> int:
    """The formula: float64 a loss and one number more, by all-reduce over rows, by all-gather over points."""
    if world == 1:
        return 0
    groups = {"data": 1, "directions": world, "both": 2}[mode]
    points_each = points // groups
    return 8 * (points_each + 1) * ((groups < world) + (groups > 1))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    for name, default in (("steps", 6), ("hidden", 256), ("layers", 4), ("rows", 8), ("length", 64), ("directions", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    gc.collect()
    gc.freeze()
    cores = len(os.sched_getaffinity(0))
    versions = f"zoft {__version__}, torch {torch.__version__}, {platform.machine()}"
    print(f"{versions}, {cores} cores, load {os.getloadavg()[0]:.1f}")
    ranks_by_modes(given)
    by_directions(given)
    by_bytes(given)
    by_stages(given)


def ranks_by_modes(given: argparse.Namespace) -> None:
    """The first table."""
    q = given.directions
    alone = in_processes(1, lambda: trained(given, world=1, mode="data", directions=q))[0]
    print(f"{alone['weights']:,} weights, {given.rows} rows of {given.length} tokens, q={q}, {2 * q} points a step\n")
    print(
        "| ranks | parallel | points x rows | s a step | CPU s | of them written | bytes sent | formula | efficiency |"
    )
    print("|--:|:--|--:|--:|--:|--:|--:|--:|--:|")
    for world in given.ranks:
        for mode in MODES if world > 1 else ("data",):
            groups = {"data": 1, "directions": world, "both": 2}[mode]
            if world % groups or (mode == "both" and world == groups):
                continue
            call = lambda world=world, mode=mode: trained(given, world=world, mode=mode, directions=q)  # noqa: E731
            ranks = in_processes(world, call) if world > 1 else [alone]
            most = {name: max(rank[name] for rank in ranks) for name in ("step", "cpu", "write", "bytes")}
            shown = f"| {world} | {mode if world > 1 else ''} | {2 * q // groups} x {given.rows * groups // world} "
            shown += f"| {most['step']:.3f} | {most['cpu']:.3f} | {most['write']:.3f} | {most['bytes']} "
            shown += f"| {bytes_of(world, mode, 2 * q)} | {alone['cpu'] / (world * most['cpu']):.0%} |"
            print(shown, flush=True)


def by_directions(given: argparse.Namespace) -> None:
    """What every rank does whatever their number: q directions drawn and added."""
    print("\n| q, one rank | CPU s a step | of them written | ms a direction | share |\n|--:|--:|--:|--:|--:|")
    for q in (1, 4, 16):
        seconds = in_processes(1, lambda q=q: trained(given, world=1, mode="data", directions=q))[0]
        step, write = seconds["cpu"], seconds["write"]
        print(f"| {q} | {step:.3f} | {write:.4f} | {1e3 * write / q:.1f} | {write / step:.1%} |", flush=True)


def by_stages(given: argparse.Namespace) -> None:
    """A pipeline: what its processes wait for, beside the formula of GPipe's bubble."""
    print("\n| stages | q | forwards | weights a rank, most | s a step | CPU s, most | bytes sent | formula ", end="")
    print("| idle, CPU | bubble | last stage, CPU |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for world in (count for count in given.ranks if count > 1):
        for q in (1, given.directions):
            call = lambda world=world, q=q: trained(given, world=world, mode="pipeline", directions=q)  # noqa: E731
            ranks = in_processes(world, call)
            most = {name: max(rank[name] for rank in ranks) for name in ("step", "cpu", "bytes", "held")}
            of_steps = zip(*(rank["spans"] for rank in ranks), strict=True)
            idle = statistics.median(idle_share(list(spans)) for spans in of_steps)
            last = sum(map(sum, ranks[-1]["spans"])) / sum(sum(map(sum, rank["spans"])) for rank in ranks)
            sent = 2 * q * given.rows * given.length * given.hidden * 4 + 8 * (2 * q + 2)
            shown = f"| {world} | {q} | {2 * q} | {most['held']:,} | {most['step']:.3f} | {most['cpu']:.3f} "
            shown += f"| {most['bytes']} | {sent} | {idle:.0%} | {(world - 1) / (2 * q + world - 1):.0%} | {last:.0%} |"
            print(shown, flush=True)


def by_bytes(given: argparse.Namespace) -> None:
    """One exchange of each kind."""
    print("\n| ranks | exchange | ms |\n|--:|:--|--:|")
    for world in given.ranks:
        if world > 1:
            for name, seconds in in_processes(world, lambda world=world: talked(world))[0].items():
                print(f"| {world} | {name} | {1e3 * seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
