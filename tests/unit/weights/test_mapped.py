"""Tensors in files: what is written into a scratch copy is kept, and a checkpoint's file is never written."""

from __future__ import annotations

import hashlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoft.errors import DiskFullError
from zoft.weights import mapped
from zoft.weights.mapped import is_mapped, mapped_where_it_lies, release, scratch_copies


def test_scratch_copies_keep_what_is_written_into_them():
    tensors = [torch.arange(5000.0), torch.ones(3, 4, dtype=torch.bfloat16), torch.arange(7, dtype=torch.int8)]
    copies = scratch_copies(tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
        assert is_mapped(copy, to_write=True)
        assert copy.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        copy.mul_(2)
        release(copy)
        assert torch.equal(copy, tensor * 2)


def test_scratch_leaves_no_file(tmp_path):
    (copy,) = scratch_copies([torch.ones(10)], str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert copy.sum() == 10


def test_one_thread_releases_while_another_maps():
    """The copying thread of engine=offload does so while other models come and are collected."""
    (scratch,) = scratch_copies([torch.ones(10)])
    others = [scratch_copies([torch.ones(10)]) for _ in range(20)]
    ended = threading.Event()

    def releases():
        while not ended.is_set():
            release(scratch)

    before = sys.getswitchinterval()
    with ThreadPoolExecutor(1) as thread:
        sys.setswitchinterval(1e-6)
        try:
            released = thread.submit(releases)
            for _ in range(100):
                scratch_copies([torch.ones(10)])
        finally:
            ended.set()
            sys.setswitchinterval(before)
    released.result()
    assert len(others) == 20


def test_no_room_for_the_scratch_file_is_a_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "_reserve", full)
    with pytest.raises(DiskFullError, match="is full"):
        scratch_copies([torch.ones(10)], str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells what is mapped where on Linux")
def test_a_checkpoint_is_mapped_where_it_lies_and_never_written(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(3000.0), "b": torch.arange(4.0)}, path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = load_file(path)
    again = mapped_where_it_lies(loaded["a"])
    assert again is not None
    assert torch.equal(again, loaded["a"])
    assert is_mapped(again)
    assert not is_mapped(again, to_write=True)
    again.add_(1)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    release(again)
    assert torch.equal(again, torch.arange(3000.0))
    assert mapped_where_it_lies(torch.ones(10)) is None
    loaded["b"].add_(1)  # no longer what the file says
    assert mapped_where_it_lies(loaded["b"]) is None


def test_a_map_is_forgotten_with_its_last_tensor():
    count = len(mapped._maps)
    (copy,) = scratch_copies([torch.ones(10)])
    assert len(mapped._maps) == count + 1
    del copy
    assert len(mapped._maps) == count
