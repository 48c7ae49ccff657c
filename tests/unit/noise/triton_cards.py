"""The GPU's noise compiles for the cards there are, and rounds as eager torch does; test_triton.py runs it.

Triton is imported inside of functions: the collection of doctests imports every file, where it is not installed too.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.noise.test_kernels import CPU, DTYPES, F32, HERE
from zoft.noise import counter, kernels
from zoft.noise.counter import random_words, squared_norm
from zoft.noise.kernels import cuda
from zoft.noise.source import CounterNoise

CARDS = (75, 80, 90, 100)
"""Compute capabilities: Turing, Ampere, Hopper, Blackwell."""

KERNELS = ("words", "draw", "perturb", "gather", "squared_norm", "add_product")


class NoCard:
    """What Triton asks of a driver, of a card that is not there: kernels are compiled for it, and launches noted."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)
        self.launched: list[tuple[tuple[int, ...], int]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 48 << 10},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> Any:
        return self.target

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *numbers: self.launched.append((numbers[:3], metadata.shared))


@pytest.mark.parametrize("capability", CARDS)
def test_it_compiles_for_every_card_and_rounds_every_product_by_itself(capability, monkeypatch):
    from triton.runtime import driver

    from zoft.noise.kernels import noise_triton

    card, noise = NoCard(capability), cuda.load()
    monkeypatch.setattr(type(driver), "active", card)
    for name in KERNELS:
        getattr(noise_triton, name).device_caches.clear()  # what was compiled for the card before
    weight = torch.zeros(5001)
    with kernels.using(CPU, noise):
        for law in counter.LAWS:
            source = CounterNoise(law, {"w": 6000})
            source.draw(HERE, "w", 3, 5004, CPU, F32)
            source.gather(HERE, "w", torch.arange(50))
            for dtype in DTYPES if law == "gaussian" else DTYPES[1:2]:
                other = weight.to(dtype)
                source.perturb(other, HERE, "w", 64, [0.1, -0.1], [other.clone(), other.clone()])
            source.add_(weight, HERE, "w", 3, 0.1)
        random_words(5, 1, 4000)
        squared_norm(5, 4000)
        noise.add_product(torch.zeros(20, 2), torch.zeros(2, 30), torch.zeros(600), 0.1)
    assert len(card.launched) == 14
    assert {grid for grid, _ in card.launched} <= {(1, 1, 1), (2, 1, 1), (3, 1, 1)}
    for name in KERNELS:
        compiled = list(getattr(noise_triton, name).device_caches[0][0].values())
        assert compiled, name
        for kernel in compiled:
            assert kernel.asm["cubin"], name
            assert not re.search(r"\bfma\.|\.ftz\b", kernel.asm["ptx"]), name
