"""The table of docs/quantised.md: one method on bases that are held in different ways.

    build/quant/bin/python scripts/bench_bases.py                        # the environment of `make test-quant`
    build/quant/bin/python scripts/bench_bases.py --method qzo --base nf4 --rates 1e-4 1e-3

Each cell trains the demo's model (SmolLM2-135M) for a budget of queries on the same rows, in a process of its own, and
prints the mean loss over the same held-back rows before and after, CPU seconds of a query, and the most memory that the
process had in training, without the interpreter and its libraries. Cells run one after the other; one that zoft
refuses is printed with its sentence. A base is left out where a method asks for another one (``qzo`` for a quantised
one).
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import os
import tempfile
import time
from typing import Any

import torch
import transformers

from zoft.config import compose
from zoft.errors import UserError
from zoft.report.memory import PeakMemory
from zoft.run.build import load
from zoft.run.rehearsal import rehearsing, rehearsing_trainer

BASES = {
    "fp32": [],
    "bf16": ["model.dtype=bfloat16"],
    "int8": ["model.quantization=int8"],
    "nf4": ["model.quantization=nf4"],
    "int8_torchao": ["model.quantization=int8_torchao"],
    "onnx int8": ["engine=onnx", "engine.quantization=int8"],
    "offload": ["engine=offload"],
}
LORA = ["peft=lora", "trainable=adapter"]
PLAIN, FEW_BITS = ["fp32", "bf16"], ["int8", "nf4"]
METHODS: dict[str, tuple[list[str], float, list[str]]] = {
    "mezo + LoRA": (["method=mezo", *LORA, "estimator.eps=1e-2"], 1e-3, [*PLAIN, *FEW_BITS, "onnx int8", "offload"]),
    "zoft + LoRA": (["method=zoft", *LORA], 1.0, [*PLAIN, *FEW_BITS]),
    "qzo": (["method=qzo"], 1e-4, FEW_BITS),
}
"""Arguments, a learning rate, and bases."""


def words(method: str, base: str, rate: float | None, args: argparse.Namespace) -> list[str]:
    """The command line of a cell."""
    settings, usual, _ = METHODS[method]
    return [
        "model.name=zoft:smollm2-135m-instruct",
        "task=sms_spam",
        "task.num_train=64",
        "task.num_dev=16",
        "task.num_test=8",
        "task.max_length=32",
        "trainer.lr_scheduler_type=constant",
        f"trainer.per_device_train_batch_size={args.batch}",
        f"trainer.per_device_eval_batch_size={args.batch}",
        f"budget.queries={args.queries}",
        f"seed={args.seed}",
        *settings,
        *BASES[base],
        f"optimizer.learning_rate={usual if rate is None else rate:g}",
        *args.set,
    ]


def cell(method: str, base: str, rate: float | None, args: argparse.Namespace) -> dict[str, Any]:
    """One training."""
    memory = PeakMemory("cpu")
    before = memory.current_mb()
    with tempfile.TemporaryDirectory() as folder:
        try:
            cfg = compose([*words(method, base, rate, args), f"output_dir={folder}"])
            model, tokenizer, rows = load(cfg)
            trainer = rehearsing_trainer(rehearsing(cfg, folder, args.queries), model, tokenizer, rows)
            first = trainer.evaluate()["eval_loss"]
            gc.collect()
            memory.reset()  # what reading and quantising the file took is not counted
            began = time.process_time()  # of one thread: what else runs on the machine does not count
            trainer.train()
            seconds = time.process_time() - began
            last = trainer.evaluate()["eval_loss"]
        except UserError as error:
            return {"refused": str(error)}
    queries = trainer.progress.num_queries
    peak = memory.peak_mb() - before
    return {"first": first, "last": last, "seconds": seconds / queries, "peak": peak, "queries": queries}


def in_a_process(*given: Any) -> dict[str, Any]:
    """The same, where what it holds is given back afterwards."""
    context = multiprocessing.get_context("fork")  # with everything imported
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        logging.disable(logging.WARNING)
        try:
            sender.send(cell(*given))
        except BaseException as error:
            sender.send({"refused": f"{type(error).__name__}: {error}"})
            raise

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        return dict(receiver.recv())
    except EOFError:
        return {"refused": "the process ended"}
    finally:
        process.join()


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--base", nargs="+", choices=list(BASES), help="all that go with the method")
    parser.add_argument("--rates", nargs="+", type=float, default=[None])
    parser.add_argument("--queries", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], help="further arguments of zoft train")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{args.queries} queries, batches of {args.batch}, one thread, {versions}\n")
    print("| method | base | rate | dev loss before | after | CPU s a query | peak MiB |")
    print("|:--|:--|--:|--:|--:|--:|--:|", flush=True)
    for method in args.method:
        for base in args.base or METHODS[method][2]:
            for rate in args.rates:
                result, shown = in_a_process(method, base, rate, args), METHODS[method][1] if rate is None else rate
                if "refused" in result:
                    print(f"| {method} | {base} | {shown:g} | {result['refused']} |", flush=True)
                    continue
                numbers = f"{result['first']:.4f} | {result['last']:.4f} | {result['seconds']:.2f}"
                print(f"| {method} | {base} | {shown:g} | {numbers} | {result['peak']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
