"""How many CPU seconds a query takes in another runtime, as a share of torch's: the figures of docs/elsewhere.md.

    OMP_NUM_THREADS=1 python scripts/bench_elsewhere.py [--hidden 256] [--layers 6] [--repeats 10]
    OMP_NUM_THREADS=1 build/llamacpp/bin/python scripts/bench_elsewhere.py --llamacpp
    OMP_NUM_THREADS=1 python scripts/bench_elsewhere.py --url http://127.0.0.1:8000 --group 123

ONNX Runtime: a random OPT. llama.cpp (`make test-llamacpp` installs it): the demo's model, written as GGUF in 32 to 4
bits. A server (scripts/serve_vllm.md): one of the demo's model, whose processes are a group of their own. A LoRA on q
and v; batches of 16 left-padded prompts with two options of one token; two directions, so four points and the clean one
a step. CPU seconds of this process and that group, best of the repeats, engines by turns.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from zoft.engines.base import Engine, Session
from zoft.engines.llamacpp import LlamaCpp
from zoft.engines.onnx import Onnx
from zoft.engines.server import Server
from zoft.engines.side_path import SidePath
from zoft.estimators.base import Point
from zoft.lm.models.files import placed
from zoft.lm.models.load import load_model
from zoft.lm.models.peft.lora import Lora
from zoft.lm.objectives.options import Options
from zoft.noise.direction import Direction
from zoft.subspaces.full import Full
from zoft.use.export.gguf_file import QUANTIZATIONS, write_gguf
from zoft.weights.tensors import Weights

DEMO = "zoft:smollm2-135m-instruct"
POINTS = [Point(Direction(0, 0, i), s) for i in range(2) for s in (1e-3, -1e-3)] + [Point()]


def random_opt(hidden: int, layers: int) -> Any:
    config = transformers.OPTConfig(
        vocab_size=50272, hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, word_embed_proj_dim=hidden,
        num_attention_heads=hidden // 64, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(config).eval()


def llamas(folder: Path) -> dict[str, Engine]:
    """The demo's model as GGUF, in 32 to 4 bits."""
    model, tokenizer = load_model(DEMO), AutoTokenizer.from_pretrained(placed(DEMO))
    files = {kind: write_gguf(model, tokenizer, folder / f"{kind}.gguf", kind, "demo") for kind in QUANTIZATIONS}
    for kind, file in files.items():
        print(f"{kind:<5} {file.stat().st_size / 2**20:6.0f} MiB")
    return {f"llamacpp {kind}": LlamaCpp(file=str(file)) for kind, file in files.items()}


def session_of(engine: Engine, make: Callable[[], Any]) -> Session:
    model = Lora().wrap(make(), seed=0)
    coordinates = Full().bind(Weights(model), "counter")
    for name, tensor in coordinates.weights.tensors.items():  # B is zero at the start
        tensor.data.add_(0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    return engine.bind(model, coordinates, lambda batch: Options().loss(model, batch))


def batch_of(rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(rows):
        mask[row, : row * length // (2 * rows)] = 0
    ids, options = torch.randint(4, 49000, (rows, length)), torch.tensor([[100, 200]] * rows)
    return {"input_ids": ids, "attention_mask": mask, "option_tokens": options, "labels": torch.arange(rows) % 2}


def seconds_of(call: Callable[[], object], group: int) -> float:
    began = time.process_time() + seconds_of_group(group)
    call()
    return time.process_time() + seconds_of_group(group) - began


def seconds_of_group(group: int) -> float:
    """CPU seconds of a group of processes; 0 of none."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat") if group else ():
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()  # behind the name: state, parent, group, ...
            ticks += (int(fields[11]) + int(fields[12])) * (int(fields[2]) == group)
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 6), ("rows", 16), ("length", 48), ("repeats", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--llamacpp", action="store_true")
    parser.add_argument("--url", default="")
    parser.add_argument("--group", type=int, default=0)
    given = parser.parse_args()
    engines: dict[str, Engine] = {"side_path": SidePath()}
    with tempfile.TemporaryDirectory() as folder:
        if given.llamacpp:
            engines |= llamas(Path(folder))
        elif given.url:
            engines |= {"server": Server(url=given.url)}
        else:
            engines |= {"onnx": Onnx(), "onnx int8": Onnx("int8"), "onnx int4": Onnx("int4")}
        is_demo = given.llamacpp or given.url
        make = partial(load_model, DEMO) if is_demo else partial(random_opt, given.hidden, given.layers)
        measure({name: session_of(engine, make) for name, engine in engines.items()}, given)


def measure(sessions: dict[str, Session], given: argparse.Namespace) -> None:
    batch = batch_of(given.rows, given.length, seed=1)
    losses = {name: session.losses(batch, POINTS) for name, session in sessions.items()}  # the export is here
    best = dict.fromkeys(sessions, float("inf"))
    for repeat in range(given.repeats):
        batch = batch_of(given.rows, given.length, seed=2 + repeat)  # a server knows the rows that it has seen
        for name, session in sessions.items():
            best[name] = min(best[name], seconds_of(partial(session.losses, batch, POINTS), given.group))
    for name, seconds in best.items():
        off, share = float((losses[name] - losses["side_path"]).abs().max()), seconds / best["side_path"]
        print(f"{name:<14} {1000 * seconds / len(POINTS):8.1f} ms a query  {share:5.2f} x  off by {off:.1e}")


if __name__ == "__main__":
    main()
