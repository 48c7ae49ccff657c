"""The one module that knows of streams: order and counts are the same with a card (stood in for here) and without."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from zoft.engines import _transfer
from zoft.engines._transfer import CudaTransfer, Transfer, transfer_for


@pytest.fixture
def card(monkeypatch):
    """torch.cuda's names with nothing behind them; the list says what was called, in order."""
    calls = []

    class Event:
        def record(self, stream):
            calls.append(("record", stream.name))

        def synchronize(self):
            calls.append(("synchronize",))

    class Stream:
        def __init__(self, device, name="copies"):
            self.name = name

        def wait_event(self, event):
            calls.append(("wait", self.name))

    @contextmanager
    def nothing(*_):
        yield

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "computes"))
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "device", nothing)
    pinned, empty_like, copy = set(), torch.empty_like, torch.Tensor.copy_

    def pin(tensor):
        calls.append(("pin",))
        pinned.add(tensor.data_ptr())
        return tensor

    def empty(like, *, pin_memory=False, **more):
        buffer = empty_like(like, **more)
        return pin(buffer) if pin_memory else buffer

    def copied(target, source, non_blocking=False):
        calls.append(("copy", non_blocking))
        return copy(target, source)

    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in pinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pin(tensor.clone()))
    monkeypatch.setattr(torch, "empty_like", empty)
    monkeypatch.setattr(_transfer.torch, "empty_like", empty)  # where it has been asked for before, it is kept
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    return calls


class OnTheCard(torch.Tensor):
    """Memory that says that it is a card's."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


def use(transfer, *, in_memory=False):
    """Up, compute, down."""
    resting, released = torch.arange(4.0), []
    here = transfer.buffer(16).view(torch.float32).as_subclass(OnTheCard)
    if in_memory:
        resting = transfer.resting(resting)
    transfer.wait(transfer.up([(resting, here)], lambda: released.append("up")))
    here.mul_(2)
    transfer.drain([transfer.down([(here, resting)], lambda: released.append("down"))])
    transfer.close()
    assert resting.tolist() == [0, 2, 4, 6]
    assert released == ["up", "down"]
    return transfer.counts


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_stand_in_counts_what_the_card_would(card, in_memory):
    """And what the card is said to have done, it has: pins, copies that nobody waits for, waits."""
    counts = use(Transfer(torch.device("cpu")), in_memory=in_memory)
    card.clear()
    assert counts == use(CudaTransfer(torch.device("cpu")), in_memory=in_memory)
    assert counts["pins"] == card.count(("pin",)) == 1
    assert counts["non_blocking"] == card.count(("copy", True)) == 1 + in_memory
    assert counts["waits"] == card.count(("wait", "computes"))
    assert transfer_for(torch.device("cpu")).counts == {}


def test_copies_wait_for_what_computes_and_what_computes_waits_for_copies(card):
    transfer = CudaTransfer(torch.device("cpu"))
    here = transfer.buffer(16).view(torch.float32).as_subclass(OnTheCard)
    transfer.wait(transfer.up([(torch.ones(4), here)]))
    copies = [("pin",), ("copy", True), ("record", "copies")]
    assert card == [("record", "computes"), ("wait", "copies"), *copies, ("wait", "computes")]
    transfer.close()


def test_an_error_of_a_copy_is_raised_where_it_is_waited_for():
    transfer = Transfer(torch.device("cpu"))
    ticket = transfer.up([(torch.ones(4), torch.ones(3))])
    with pytest.raises(RuntimeError, match="size of tensor"):
        transfer.wait(ticket)
    transfer.close()


def test_nothing_else_names_streams():
    """What cannot be tested without a card is in one file."""
    from pathlib import Path

    package = Path(_transfer.__file__).parents[1]
    users = [path.name for path in package.rglob("*.py") if "cuda.Stream" in path.read_text()]
    assert users == ["_transfer.py"]
