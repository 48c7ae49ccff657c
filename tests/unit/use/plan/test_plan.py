"""Estimates stand within 15 % of measured peaks; a check finds what is wrong before a weight is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import tiny_llama
from tests.runs import WORDS, arguments, data_file, environment, report, tiny_tokenizer
from zoft.cli import main
from zoft.config import compose
from zoft.lm.models.load import load_model_as
from zoft.lm.models.meta import meta_model, quantize_on_meta
from zoft.lm.models.peft.lora import Lora
from zoft.lm.models.trainable.scales import Scales
from zoft.use.plan.estimate import of_rows
from zoft.use.plan.memory import Size, of_backprop

SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 27 million weights (104 MiB), large beside what a batch of a few tokens takes."""
    root = tmp_path_factory.mktemp("large")
    tiny_llama(**SIZES, num_key_value_heads=8, vocab_size=8192).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    data_file(root / "data.jsonl")
    return root


def words_of(folder: Path, *more: str) -> list[str]:
    return arguments(folder, folder / "out", "trainer.eval_steps=100", "trainer.save_strategy='no'", *more)


@pytest.mark.parametrize(
    "more",
    [[], ["optimizer=adam"], ["peft=lora"], ["engine=in_place"], ["method=zoft", "trainable=last_blocks"]],
    ids=["mezo", "adam", "lora", "in_place", "zoft"],
)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(more: list[str], large: Path, tmp_path: Path):
    """Started as a user does: a fork of a process that has loaded all counts pages that it shares."""
    given = [*words_of(large, "budget.queries=8", *more)[:-1], *more, "budget.queries=8"]
    given = [word for word in dict.fromkeys(given) if not word.startswith("output_dir=")]
    both = """
import sys
from zoft.cli import main
words = sys.argv[1:]
sys.exit(main(["estimate", *words, "--json"]) or main(["train", *words]))
"""  # one after the other in one process: what it has loaded is half of the time
    command = [sys.executable, "-c", both, *given, f"output_dir={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    estimate = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    measured = report(tmp_path / "out")["peak_memory_mb"]
    assert abs(estimate["method_mb"] / measured - 1) < 0.15, (estimate, measured)
    assert estimate["method_mb"] < estimate["adamw_mb"]


def test_no_weight_is_loaded(tmp_path: Path, capsys: Any):
    words = arguments(tmp_path, tmp_path / "out")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert main(["estimate", *words]) == 0
    said = capsys.readouterr().out
    assert "this run" in said
    assert "LoRA" in said
    assert main(["check", *words, "--quick"]) == 0
    assert "Ready" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_time_comes_from_three_steps(tmp_path: Path, capsys: Any):
    words = arguments(tmp_path, tmp_path / "out", "budget.queries=24000")
    assert main(["estimate", *words, "--time", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 24 < estimate["seconds"] < 24_000  # between a millisecond and a second a query
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_the_meta_model_has_the_shapes_of_the_loaded_one(kind: str, tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_model_as(kind, str(tmp_path), dtype="bfloat16", num_labels=4)
    meta = meta_model(kind, str(tmp_path), revision=None, dtype="bfloat16", attention=None, num_labels=4)
    shapes = [{n: (t.shape, t.dtype) for n, t in model.state_dict().items()} for model in (loaded, meta)]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in meta.parameters())


@pytest.mark.parametrize(("quantization", "bytes_a_weight"), [("nf4", 0.5), ("int8", 1.0), ("int8_torchao", 1.0)])
def test_a_quantised_base_is_its_codes_and_scales(quantization: str, bytes_a_weight: float):
    """Head and embeddings stay as they are; what is trained can be an adapter or the scales."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    with torch.device("meta"):
        model, adapted = tiny_llama(**sizes), Lora(r=2).wrap(tiny_llama(**sizes), 0)
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    count, rows = sum(m.weight.numel() for m in linear), sum(m.out_features for m in linear)
    for each in (model, adapted):
        quantize_on_meta(each, quantization)
    codes = [p for p in model.parameters() if not p.is_floating_point()]
    assert sum(p.numel() for p in codes) == count * bytes_a_weight
    assert len([p for p in adapted.parameters() if not p.is_floating_point()]) == len(codes) == len(linear)
    trained, total = Scales().apply(model)
    assert trained == (count // 64 if quantization == "nf4" else rows)
    assert total - trained == sum(p.numel() for p in tiny_llama(**sizes).parameters())


def test_backpropagation_is_estimated_with_what_a_process_holds():
    model = tiny_llama()
    size = Size(batch=4, eval_batch=8, longest=16, positions=1)
    lora, full = (of_backprop(model, size, 500.0, lora=lora) for lora in (True, False))
    assert 500 < lora.total_mb < full.total_mb
    assert full.total_mb == pytest.approx(500 + sum(full.parts.values()))


def test_a_long_row_of_dev_sees_no_backward_pass():
    """One dev row of 1,600 tokens made backpropagation on rows of twelve look like 34 GiB."""

    def row(length: int) -> dict[str, Any]:
        return {"sequences": [[5] * length] * 2, "lengths": [1, 1], "input_ids": [5] * length, "label": 0}

    cfg, short = compose(["config=smoke"]), {name: [row(8)] * 4 for name in ("train", "dev", "test")}
    plain, with_long = of_rows(cfg, short), of_rows(cfg, short | {"dev": [row(800)]})
    assert (with_long.lora.parts, with_long.adamw.parts) == (plain.lora.parts, plain.adamw.parts)
    assert with_long.method.parts["forward"] > plain.method.parts["forward"]


def ticks(capsys: Any) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


def test_a_run_in_order_has_ticks_alone(tmp_path: Path, capsys: Any):
    counts = ["task.num_train=8", "task.num_dev=20", "task.num_test=20"]
    words = arguments(tmp_path, tmp_path / "out", *counts)
    rows = [
        {"text": f"{a} {b}", "label": ("ham", "spam")[k % 2]}
        for k, (a, b) in enumerate((a, b) for a in WORDS[:7] for b in WORDS[:7])
    ][:48]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["check", *words, "--json"]) == 0
    checks = ticks(capsys)
    names = ["config", "data", "leaks", "tokenizer", "options", "length", "model", "memory", "rehearsal"]
    assert list(checks) == names
    assert {check["state"] for check in checks.values()} == {"ok"}, checks
    assert "2 steps, 4 queries, loss" in checks["rehearsal"]["text"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "name", "state", "text"),
    [
        (["task.train=nowhere.jsonl"], "data", "failed", "there is no data file nowhere.jsonl"),
        (["task.words={ham: 'lunching', spam: 'winning'}"], "options", "failed", "are the same tokens to this model"),
        (["model.name=./nowhere"], "model", "failed", "there is no model folder ./nowhere"),
        (["objective=preference"], "objective", "failed", "objective=preference is computed from"),
        (
            ["task.max_length=8", "task.template='{text} is it spam you no yes'"],
            "length",
            "note",
            "rows are cut at 8 tokens (task.max_length)",
        ),
        (["task.template='{text} unheard'"], "tokenizer", "note", "do not come back from their tokens"),
        ([], "leaks", "note", "repeats another"),
        ([], "held out", "note", "only 8 dev and 16 test rows"),
        (["task.num_test=30"], "held out", "note", "only 8 dev rows"),
    ],
)
def test_what_is_wrong_is_a_line(more: list[str], name: str, state: str, text: str, tmp_path: Path, capsys: Any):
    words = arguments(tmp_path, tmp_path / "out", *more)
    assert main(["check", *words, "--quick", "--json"]) == (2 if state == "failed" else 0)
    checks = ticks(capsys)
    assert checks[name]["state"] == state, checks
    assert text in checks[name]["text"]


@pytest.mark.parametrize("verb", ["check", "estimate"])
def test_wrong_requests_are_one_sentence(verb: str, capsys: Any):
    for words, message in (
        ([], "there is nothing to train on"),
        (["task.train=own.csv"], "there is nothing to train on"),
        (["config=quickstart", "--tim"], "has no flag '--tim'"),
        (["config=nowhere"], "there is no config called 'nowhere'"),
    ):
        assert main([verb, *words]) == 2
        assert message in capsys.readouterr().err
