"""Files of a run or of a model that are damaged or made up: a sentence each time, never a traceback, never long."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.faults import damage
from tests.runs import arguments
from zoft.cli import main
from zoft.errors import UserError
from zoft.journal import file as journal
from zoft.journal import snapshot
from zoft.lm.models.load import load_model, load_tokenizer

CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "brace": b"{}",
    "list": b"[]",
    "null": b"null",
    "text": b'"x"',
    "binary": bytes(range(256)) * 20,
    "deep": b"[" * 100_000,
    "zeros": b"\0" * 100,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, beside its model and data."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["train", *arguments(folder, folder / "out")]) == 0
    return folder


def _copy(finished: Path, place: Path) -> Path:
    shutil.copytree(finished / "out", place)
    return place


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["config.yaml", "journal.bin", "metrics.jsonl", "metrics.csv"])
def test_fault_25_a_damaged_file_of_a_run(
    name: str, content: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Resumed with more budget, evaluated, replayed, compared and shown: each works or says what is wrong."""
    out = _copy(finished, tmp_path / "out")
    (out / name).write_bytes(CONTENTS[content])
    commands: list[list[str]] = [
        ["eval", f"run={out}"],
        ["replay", str(out)],
        ["diff", str(out), str(finished / "out")],
    ]
    commands += [["journal", "show", str(out)], ["train", *arguments(finished, out, "budget.queries=26")]]
    for command in commands:
        code = main(command)
        error = capsys.readouterr().err
        assert code in (0, 1, 2), error
        needs = {"config.yaml": ("eval", "replay", "train"), "journal.bin": ("replay", "diff", "journal", "train")}
        if command[0] in needs.get(name, ()):
            assert code == 2
            assert name in error or "holds another run" in error


def test_fault_25_a_config_of_nothing_is_no_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It would be filled with defaults, and another model evaluated."""
    out = _copy(finished, tmp_path / "out")
    (out / "config.yaml").write_text("{}\n")
    assert main(["eval", f"run={out}"]) == 2
    assert (
        "config.yaml says nothing of model.name and budget.queries and seed: it is damaged" in capsys.readouterr().err
    )


BOMBS = {
    "aliases": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "nested": "a: " + "[" * 5000 + "]" * 5000,
    "merges": "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{l{i}: *a{i - 1}, m{i}: *a{i - 1}}}\n" for i in range(1, 40)),
    "long": "seed: 0 #" + "x" * (5 << 20),
    "itself": "a: &a [*a]\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_fault_25_a_yaml_bomb_ends_in_bounded_time(bomb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.yaml").write_text(BOMBS[bomb])
    began = time.monotonic()
    assert main(["train", f"config={tmp_path / 'mine.yaml'}", f"output_dir={tmp_path / 'out'}"]) == 2
    assert time.monotonic() - began < 20
    assert "mine.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("length", [256, 5000])
def test_fault_25_a_name_that_is_too_long(length: int, finished: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", *arguments(finished, finished / ("x" * length))]) == 2
    error = capsys.readouterr().err
    assert "cannot be a folder (File name too long): choose another one" in error
    assert len(error) < 400


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_fault_25_a_renamed_checkpoint_is_not_of_another_step(tmp_path: Path):
    damage.trainer(tmp_path / "run", max_steps=8).train()
    (tmp_path / "run" / "checkpoint-8").rename(tmp_path / "run" / "checkpoint-6")
    with pytest.raises(UserError, match="is the checkpoint of step 8: give it its name checkpoint-8 back"):
        snapshot.verify(tmp_path / "run" / "checkpoint-6")
    again = damage.trainer(tmp_path / "run")
    again.train(resume_from_checkpoint=True)
    whole = damage.trainer(tmp_path / "whole")
    whole.train()
    assert damage.digest(again) == damage.digest(whole)
    (tmp_path / "run" / "checkpoint-8").rename(tmp_path / "run" / "mine")  # any other name is as good
    damage.trainer(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "mine"))


FORGED: dict[str, dict[str, Any]] = {
    "no files": {"format": 1, "step": 4},
    "files of text": {"format": 1, "step": 4, "files": "x"},
    "an entry of nothing": {"format": 1, "step": 4, "files": {"a": {}}},
    "no format": {"step": 4, "files": {}},
    "no step": {"format": 1, "files": {}},
    "a step of text": {"format": 1, "step": "4", "files": {}},
    "a file above": {"format": 1, "step": 4, "files": {"../config.yaml": {"size": 1, "sha256": ""}}},
}


@pytest.mark.parametrize("name", FORGED)
def test_fault_25_a_forged_manifest(name: str, tmp_path: Path):
    import hashlib

    text = json.dumps(FORGED[name])
    place = tmp_path / "checkpoint-4"
    place.mkdir()
    (place / snapshot.MANIFEST).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n")
    with pytest.raises(UserError, match=r"manifest.json|config.yaml is missing"):
        snapshot.verify(place)
    assert snapshot.newest(tmp_path) is None


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun") / "run"
    damage.trainer(folder, max_steps=4).train()
    return folder


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "scheduler.json", "random.json", "optimizer.safetensors", "model.safetensors"]
)
def test_fault_25_a_file_that_was_put_into_a_checkpoint(name: str, content: str, begun: Path, tmp_path: Path):
    """With a manifest to match it is whole, and yet not what zoft writes."""
    shutil.copytree(begun, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-4" / name).write_bytes(CONTENTS[content])
    damage.forge_manifest(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(UserError, match=r"checkpoint-4.*( is not what zoft writes|saved state cannot be read)"):
        damage.trainer(tmp_path / "run", max_steps=5).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("payload", [b"{}", b"[]", b"7", b'{"format": 1, "first": "x"}', b"\xff", b'{"format": 1}'])
def test_fault_25_a_forged_journal(payload: bytes, tmp_path: Path):
    from zoft.journal import chunks

    (tmp_path / journal.NAME).write_bytes(chunks.encode(chunks.HEADER, payload, 0)[0])
    with pytest.raises(UserError, match=r"journal\.bin"):
        journal.read(tmp_path / journal.NAME)


FORGED_STEPS: dict[str, Any] = {
    "another number": {"step": 5},
    "fewer queries": {"queries": 0},
    "more queries than can be": {"queries": 2**40},
    "extra list": {"extra": [1]},
    "no directions": {"extra": {"directions": [[1]]}},
    "directions of text": {"extra": {"directions": "abc"}},
    "scalars": {"extra": {"scalars": [1]}},
    "parts": {"extra": {"parts": "x"}},
}
FORGED_CHUNKS: dict[str, Any] = {
    "note list": (b"N", b"\0\0\0\0[1]"),
    "note of a rate of text": (b"N", b'\0\0\0\0{"lr_factor": "x"}'),
    "note of no rate": (b"N", b'\0\0\0\0{"lr_factor": 0}'),
    "evaluation list": (b"E", b"\0\0\0\0[1]"),
    "second header": (b"H", b'{"format": 1, "first": 0, "run": "x"}'),
    "look": (b"L", b"x"),
    **{
        f"block {place}": (b"B", zlib.compress(struct.pack("<I", len(text)) + text))
        for place, text in enumerate(
            (
                b'{"count": 10000000000000, "code": "f", "queries": 0, "sizes": [0, 0, 0, 0, 0, 0, 0, 0, 0]}',
                b'{"count": 0, "code": "f", "queries": 0, "sizes": [0, 0, 0, 0, 0, 0, 0, 0, 0]}',
                b'{"count": 1, "code": "f", "queries": 0, "sizes": [0, 0, 0, 0, 0, 0, 0, 0, 0], "directions": [1]}',
                b'{"count": 1, "code": "f", "queries": 0, "sizes": "abcdefghi"}',
                b"[1]",
            )
        )
    },
}


@pytest.mark.parametrize("name", [*FORGED_STEPS, *FORGED_CHUNKS, "left out"])
def test_fault_25_forged_chunks_of_a_journal(name: str, tmp_path: Path):
    """Whole by their checksums, which anybody can compute."""
    from zoft.journal import chunks, records

    parts = [(chunks.HEADER, json.dumps({"format": 1, "first": 0, "run": "x"}).encode())]
    for step in range(3):
        record = records.Record(step, 7, 1e-3, 1e-3, 2 * step + 2, 64, 0.5, 1.5, (0.25,))
        forged = FORGED_STEPS.get(name, {}) if step == 2 else {}
        parts.append((chunks.STEP, records.encode(dataclasses.replace(record, **forged))))
    if name in FORGED_CHUNKS:
        parts.append(FORGED_CHUNKS[name])
    if name == "left out":
        del parts[2]
    data, check = b"", 0
    for kind, payload in parts:
        encoded, check = chunks.encode(kind, payload, check)
        data += encoded
    (tmp_path / journal.NAME).write_bytes(data)
    with pytest.raises(UserError, match=r"journal\.bin holds what zoft does not write"):
        journal.read(tmp_path / journal.NAME)


def test_fault_25_a_model_folder_that_is_a_link_is_not_written_into(finished: Path, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "config.json").write_text("mine")
    out = _copy(finished, tmp_path / "out")
    shutil.rmtree(out / "model")
    (out / "model").symlink_to(tmp_path / "precious")
    assert main(["train", *arguments(finished, out, "budget.queries=26")]) == 0
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["config.json"]
    assert (tmp_path / "precious" / "config.json").read_text() == "mine"
    assert not (out / "model").is_symlink()


# ---- models ----------------------------------------------------------------------------------------------------------


def _model(finished: Path, place: Path) -> Path:
    shutil.copytree(finished / "model", place)
    return place


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_fault_25_a_damaged_file_of_a_model(name: str, content: str, finished: Path, tmp_path: Path):
    place = _model(finished, tmp_path / "model")
    (place / name).write_bytes(CONTENTS[content])

    def load() -> None:
        load_tokenizer(str(place))
        load_model(str(place))

    with pytest.raises(UserError, match=r"model\.name="):
        load()


CONFIGS: list[dict[str, Any]] = [
    {"num_hidden_layers": 1_000_000},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": "three"},
    {"num_hidden_layers": None},
    {"num_attention_heads": 3},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 0},
    {"hidden_size": 10**9},
    {"hidden_size": "wide"},
    {"vocab_size": -5},
    {"vocab_size": 10**12},
    {"intermediate_size": []},
    {"model_type": "nonsense"},
    {"model_type": 7},
    {"architectures": "LlamaForCausalLM"},
    {"architectures": [7]},
    {"rope_parameters": {"rope_type": "none"}},
    {"rope_parameters": 5},
    {"hidden_act": "explode"},
    {"layer_types": ["full_attention"] * 100_000},
    {"quantization_config": {"quant_method": "none"}},
    {"quantization_config": 3},
    {"text_config": {"num_hidden_layers": 10**6}},
]


@pytest.mark.parametrize("changed", CONFIGS, ids=lambda changed: json.dumps(changed)[:50])
def test_fault_25_a_malformed_config_of_a_model(
    changed: dict[str, Any], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    place = _model(finished, tmp_path / "model")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | changed))
    began = time.monotonic()
    line = [word for word in arguments(finished, tmp_path / "out", "budget.queries=2") if "model.name" not in word]
    code = main(["train", *line, f"model.name={place}"])
    assert time.monotonic() - began < 60
    assert code in (0, 2)
    if code == 2:
        error = capsys.readouterr().err
        assert "model.name" in error
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "shard", ["../precious.safetensors", "/etc/passwd", "a/b.safetensors", "..", "gone.safetensors"]
)
def test_fault_25_a_shard_outside_of_the_folder(shard: str, finished: Path, tmp_path: Path):
    place = _model(finished, tmp_path / "model")
    (place / "model.safetensors").rename(tmp_path / "precious.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"outside of its folder: it is refused|gone.safetensors is missing"):
        load_model(str(place))
