"""Peak memory of queries and steps above the resident weights, in MiB: run as a process of its own, prints JSON."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

from zoft.component import create
from zoft.estimators.central import Central
from zoft.step.estimate import StepEstimate
from zoft.step.update import ZOOptimizer
from zoft.weights.tensors import Weights

ROWS, TOKENS = 16, 128


def main(engines: list[str]) -> dict[str, float]:
    small, large = model_of(64, 128, 256), model_of(256, 4096, 8192)
    sizes = {}
    for name in ("bare", *engines):  # the small one loads every library and compiles every kernel beforehand
        use(name, small, 1)()
    for name in ("bare", *engines):
        for q in (1, 16):
            sizes[f"{name} q={q}"] = peak_of(use(name, large, q))
    session = bind("layerwise", large, lambda batch: objective(large, batch))
    sizes["scratch"] = (
        max(sum(t.numel() * 4 for t in m.parameters(recurse=False)) for m in session.weights.owners) / 2**20
    )
    sizes["scratch"] = min(sizes["scratch"], session.swapper.piece_bytes / 2**20)
    return sizes


def model_of(width: int, ffn: int, vocabulary: int) -> Any:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 256}
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": ffn, "vocab_size": vocabulary}
    return OPTForCausalLM._from_config(OPTConfig(**heads, **sizes)).eval()


def objective(model: Any, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch, use_cache=False, logits_to_keep=torch.tensor([TOKENS - 1])).logits[:, -1]
    return torch.nn.functional.cross_entropy(logits.float(), batch[:, 0])


def bind(engine: str, model: Any, evaluate: Any) -> Any:
    name, *fields = engine.split(":")
    chosen = create("engine", name, "auto", **dict(field.split("=") for field in fields))
    return chosen.bind(model, create("subspace", "full", "full").bind(Weights(model)), evaluate)


def use(name: str, model: Any, q: int) -> Callable[[], None]:
    """2 q bare forwards (8 at most), or three steps of an engine with q directions."""
    batch = torch.randint(4, model.config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(2 * min(q, 4)):  # one after the other: more of them need no more memory
                objective(model, batch)

    def steps() -> None:
        estimator = Central(num_directions=q)
        session = bind(name, model, lambda inputs: objective(model, inputs))
        zo_optimizer = ZOOptimizer(
            [{"params": list(model.parameters())}], create("optimizer", "sgd", "sgd"), session, 1e-6
        )
        for step in range(3 if q == 1 else 1):
            directions = estimator.directions(0, step)
            losses = session.losses(batch, estimator.points(directions))
            slopes = (estimator.projected_grads(losses) / estimator.num_directions).tolist()
            zo_optimizer.apply(StepEstimate.of(list(zip(directions, slopes, strict=True))))

    return bare if name == "bare" else steps


def peak_of(call: Callable[[], None]) -> float:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = field("VmRSS")
    call()
    return field("VmHWM") - before


def field(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
