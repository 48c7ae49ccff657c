"""Loads a checkpoint, trains and hashes it by engine=offload, and prints the peak in MiB beside the process itself.

Run as a process of its own: ``python -m tests.invariant.offload_memory FOLDER all|norms``.
"""

from __future__ import annotations

import json
import sys

import torch

from tests.invariant.memory_of import field, peak_of
from tests.unit.engines.test_offload import run
from zoft.engines.offload import Offload
from zoft.lm.models.load import load_model


def main(folder: str, trained: str) -> dict[str, float]:
    small = load_model(f"{folder}/small")
    run(Offload("file"), small, steps=1)  # libraries and kernels are there before anything is measured
    sizes = {}

    def train() -> None:
        model = load_model(f"{folder}/large")
        sizes["model"] = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        if trained == "norms":
            model.requires_grad_(False)
            for layer in model.model.layers:
                layer.input_layernorm.weight.requires_grad_(True)
        _, zo_optimizer = run(Offload("file"), model, steps=3)
        zo_optimizer.session.settle()
        zo_optimizer.session.weights.digest()
        sizes["blocks"] = zo_optimizer.session.transfer.counts["buffers"] / 2**20

    sizes["peak"] = peak_of(train)
    sizes["resident"] = field("VmRSS")
    return sizes


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(*sys.argv[1:])))
