"""Files that would run code, or fill the memory, if they were believed; and secrets that must not get out."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults.damage import STEPS, Damaged, digest, forge_manifest, trainer
from tests.runs import model_folder
from zoft.errors import UserError
from zoft.journal import snapshot
from zoft.lm.models.load import load_model, load_tokenizer

NAMES = (
    "pytorch_model.bin",
    "model.pt",
    "training_args.bin",
    "adapter_model.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "journal.pkl",
)
"""What is pickled where others are believed."""

SECRETS = {"HF_TOKEN": "hf_canaryABCDEFGHIJKLMNOPQRSTUVWXYZ", "WANDB_API_KEY": "canary" + "0123456789abcdef" * 2 + "01"}


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.made = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def _plant(folder: Path, target: Path, names: tuple[str, ...] = NAMES) -> None:
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Payload(target)))


def _says(call: Callable[[], Any]) -> str:
    """What a refusal says; anything but a `UserError` is none."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def pickles(folder: Path) -> tuple[int, int]:
    """Payloads in every name that somebody unpickles: (files planted, payloads carried out)."""
    target, damaged = folder / "executed", Damaged(folder / "run")
    planted = 0
    for name in NAMES:  # beside what a snapshot holds: refused by name, the one before is used
        _plant(damaged.newest, target, (name,))
        damaged.is_noticed(damaged.newest / name)
        (damaged.newest / name).unlink()
        planted += 1
    _plant(damaged.newest, target)  # and where the manifest was forged with them: not looked at
    _plant(damaged.folder, target)
    forge_manifest(damaged.newest)
    planted += 2 * len(NAMES)
    assert snapshot.newest(damaged.folder, damaged.run) == damaged.newest
    damaged.goes_on()
    for name in ("optimizer.safetensors", "scheduler.json", "random.json", "trainer_state.json"):
        data = (damaged.newest / name).read_bytes()  # in the place of what is read
        _plant(damaged.newest, target, (name,))
        forge_manifest(damaged.newest)
        planted += 1
        with suppress(Exception):  # that it is refused, in whatever words, is not the point here
            trainer(damaged.folder, max_steps=STEPS + 1).train(resume_from_checkpoint=str(damaged.newest))
        (damaged.newest / name).write_bytes(data)
    planted += _pickled_models(folder, target)
    return planted, int(target.exists())


def _pickled_models(folder: Path, target: Path) -> int:
    """A model, an adapter and a tokenizer as pickles alone."""
    base = model_folder(folder / "base")
    for name in ("pytorch_model.bin", "model.safetensors"):
        place = folder / f"as-{name}"
        shutil.copytree(base, place)
        (place / "model.safetensors").unlink()
        _plant(place, target, (name,))
        assert "could not load" in _says(lambda place=place: load_model(str(place)))
    return 2


def remote_code(folder: Path) -> int:
    """`auto_map` of a model's and a tokenizer's config: code of the folder that ran, of two files."""
    target, place = folder / "executed", model_folder(folder / "remote")
    (place / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(target)!r})\n")
    config = json.loads((place / "config.json").read_text())
    auto = {
        "AutoConfig": "modeling_evil.C",
        "AutoModelForCausalLM": "modeling_evil.M",
        "AutoTokenizer": "modeling_evil.T",
    }
    (place / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    load_model(str(place))  # a kind that transformers knows: its own code is used
    load_tokenizer(str(place))
    (place / "config.json").write_text(json.dumps(config | {"auto_map": auto, "model_type": "evil"}))
    assert "could not load" in _says(lambda: load_model(str(place)))
    assert not target.exists()
    return int(target.exists())


def header_bombs(folder: Path) -> int:
    """Safetensors whose header claims more than there is, in a model and in a snapshot; how many were refused."""
    bombs = {
        "size": (1 << 62).to_bytes(8, "little") + b"{}",
        "cut": (100 << 20).to_bytes(8, "little") + b"{",
        "offsets": _header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        "shape": _header({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}}) + b"\0" * 4,
        "nested": (200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995,
        "tree": _header({"__metadata__": {"tree": "[" * 50_000}}),
    }
    from zoft.journal import state

    refused = 0
    for name, data in bombs.items():
        place = model_folder(folder / name)
        (place / "model.safetensors").write_bytes(data)
        if name != "tree":  # to a model that is a file without tensors, and its header is none of a bomb
            assert "could not load" in _says(lambda place=place: load_model(str(place)))
            refused += 1
        assert "cannot be read" in _says(lambda data=data: state.unpack(data))
        refused += 1
    return refused


def _header(said: dict[str, Any]) -> bytes:
    text = json.dumps(said).encode()
    return len(text).to_bytes(8, "little") + text


def leaks(folder: Path) -> list[str]:
    """The files below a folder that hold a secret of :data:`SECRETS`."""
    lines = []
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            lines += [f"{name} in {path}" for name, value in SECRETS.items() if value.encode() in data]
    return lines


__all__ = ["STEPS", "digest", "header_bombs", "leaks", "pickles", "remote_code"]
