"""How many CPU seconds a query takes in ONNX Runtime, as a share of torch's: the figure of docs/elsewhere.md.

    OMP_NUM_THREADS=1 python scripts/bench_elsewhere.py [--hidden 256] [--layers 6] [--repeats 10]

A random OPT with a LoRA on q and v; batches of 16 left-padded prompts with two options of one token; two directions, so
four points and the clean one a step. CPU seconds of the process, best of the repeats, engines by turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import transformers

from zoft.engines.base import Engine, Session
from zoft.engines.onnx import Onnx
from zoft.engines.side_path import SidePath
from zoft.estimators.base import Point
from zoft.lm.models.peft.lora import Lora
from zoft.lm.objectives.options import Options
from zoft.noise.direction import Direction
from zoft.subspaces.full import Full
from zoft.weights.tensors import Weights

POINTS = [Point(Direction(0, 0, i), s) for i in range(2) for s in (1e-3, -1e-3)] + [Point()]


def session_of(engine: Engine, hidden: int, layers: int) -> Session:
    config = transformers.OPTConfig(
        vocab_size=50272, hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, word_embed_proj_dim=hidden,
        num_attention_heads=hidden // 64, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Lora().wrap(transformers.OPTForCausalLM(config).eval(), seed=0)
    coordinates = Full().bind(Weights(model), "counter")
    return engine.bind(model, coordinates, lambda batch: Options().loss(model, batch))


def batch_of(rows: int, length: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(rows):
        mask[row, : row * length // (2 * rows)] = 0
    ids, options = torch.randint(4, 50000, (rows, length)), torch.tensor([[100, 200]] * rows)
    return {"input_ids": ids, "attention_mask": mask, "option_tokens": options, "labels": torch.arange(rows) % 2}


def seconds_of(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 6), ("rows", 16), ("length", 48), ("repeats", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    engines = {"side_path": SidePath(), "onnx": Onnx(), "onnx int8": Onnx("int8"), "onnx int4": Onnx("int4")}
    sessions = {name: session_of(engine, given.hidden, given.layers) for name, engine in engines.items()}
    batch = batch_of(given.rows, given.length)
    losses = {name: session.losses(batch, POINTS) for name, session in sessions.items()}  # the export is here
    best = dict.fromkeys(sessions, float("inf"))
    for _ in range(given.repeats):
        for name, session in sessions.items():
            best[name] = min(best[name], seconds_of(lambda session=session: session.losses(batch, POINTS)))
    for name, seconds in best.items():
        off, share = float((losses[name] - losses["side_path"]).abs().max()), seconds / best["side_path"]
        print(f"{name:<10} {1000 * seconds / len(POINTS):8.1f} ms a query  {share:5.2f} x  off by {off:.1e}")


if __name__ == "__main__":
    main()
