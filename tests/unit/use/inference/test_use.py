"""New rows labelled, texts written, conversations held by finished runs; every wrong request is one sentence."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.cli.test_cli_start import ROWS, words_of
from tests.runs import model_folder, tiny_tokenizer, zoft
from zoft.cli import main
from zoft.config import compose
from zoft.errors import UserError
from zoft.run.train import run
from zoft.use.inference.chat import beside
from zoft.use.inference.generate import plain_ids
from zoft.use.inference.load import Loaded, load_run, require_writer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}is {% endif %}"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on labels, one on completions, one on conversations; and a run with an adapter."""
    root = tmp_path_factory.mktemp("runs")
    model_folder(root / "model", max_position_embeddings=1200)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "model")
    for name in ("classify", "instruct", "chat"):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
        more = ["budget.queries=10", "optimizer.learning_rate=1", *["peft=lora"] * (name == "chat")]
        run(compose([*words_of(root, name), *more, f"output_dir={root / 'out' / name}"]))
    return root


def new_rows(path: Path, count: int = 5) -> Path:
    path.write_text("id,text\n" + "".join(f"{k},you call {k}\n" for k in range(count)))
    return path


def test_new_rows_get_labels_with_probabilities(runs: Path, tmp_path: Path, capsys: Any):
    data = new_rows(tmp_path / "new.csv")
    assert main(["predict", f"run={runs / 'out/classify'}", f"data={data}", f"output={tmp_path / 'out.csv'}"]) == 0
    assert "5 rows with prediction, probability, probabilities" in capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert list(rows[0]) == ["id", "text", "prediction", "probability", "p(no)", "p(yes)"]
    assert [row["id"] for row in rows] == list("01234")
    for row in rows:
        shares = {label: float(row[f"p({label})"]) for label in ("no", "yes")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max(shares, key=lambda label: shares[label])
        assert float(row["probability"]) == max(shares.values())


def test_what_is_said_of_predictions_fits_a_terminal(runs: Path, tmp_path: Path):
    """No note of the training rows, no bar of a library, and texts that end between words."""
    data = tmp_path / "new.csv"
    data.write_text("text\n" + "you call me later and you meet me at home for lunch is it free or is it spam\n" * 9)
    done = zoft(
        *("predict", f"run={runs / 'out/classify'}", f"data={data}", f"output={tmp_path / 'out.csv'}"),
        cwd=tmp_path,
        columns=80,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert all(line.endswith(" ...") for line in lines[:5])
    path = str(tmp_path / "out.csv")
    assert all(len(line) <= 80 for line in lines if path not in line)


@pytest.mark.parametrize("columns", [80, 120])
def test_what_verbs_print_fits_a_terminal(columns: int, runs: Path, tmp_path: Path, capsys: Any, monkeypatch: Any):
    """Between words, on lines no longer than the terminal's but for one long word (a path, a hash)."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(tmp_path)
    run_dir, other = str(runs / "out/classify"), str(runs / "out/instruct")
    new_rows(tmp_path / "new.csv")
    verbs = [
        ["eval", f"run={run_dir}", "output_dir=eval"],
        ["predict", f"run={run_dir}", "data=new.csv", "output=out.csv"],
        ["replay", run_dir],
        ["journal", "show", run_dir],
        ["compare", run_dir, other],
        ["diff", run_dir, other],
        ["data", "show", "config=classify", f"task.train={runs / 'classify.jsonl'}", f"model.name={runs / 'model'}"],
        ["show", "estimator.eps"],
    ]
    for verb in verbs:
        assert main(verb) == int(verb[0] == "diff"), capsys.readouterr().err
        said = capsys.readouterr()
        for line in (said.out + said.err).splitlines():
            assert len(line) <= columns or max(map(len, line.split())) > columns // 2, f"zoft {verb[0]}: {line}"


def test_a_run_is_used_from_another_folder_and_without_its_training_rows(tmp_path: Path, monkeypatch: Any, capsys: Any):
    """A run that was begun with paths beside it, moved: new rows are read as the report says that the others were."""
    begun, elsewhere = tmp_path / "begun", tmp_path / "elsewhere"
    begun.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(begun)
    model_folder(tmp_path / "model")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["classify"]))
    words = ["config=classify", "task.train=rows.jsonl", f"model.name={tmp_path / 'model'}", "budget.queries=4"]
    run(compose([*words, "output_dir=out"]))
    assert main(["predict", "run=out", f"data={new_rows(tmp_path / 'new.csv')}", f"output={tmp_path / 'a.csv'}"]) == 0
    Path("rows.jsonl").unlink()
    Path("out").rename(elsewhere / "moved")
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    assert main(["predict", "run=moved", "data=../new.csv", "output=../b.csv"]) == 0, capsys.readouterr().err
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
    for verb in (["replay", "run=moved"], ["journal", "show", "run=moved"], ["plot", "run=moved"]):
        assert main(verb) == 0, capsys.readouterr().err
    assert main(["predict", "run=moved", "data=../new.csv", "task.label=sort"]) == 2  # read anew, as was asked for
    assert "there is no data file rows.jsonl" in capsys.readouterr().err


def test_predictions_are_those_of_an_evaluation(runs: Path, tmp_path: Path, capsys: Any):
    """The same rows as test rows: the same choices and scores, whatever label stands there."""
    run_dir = runs / "out/classify"
    assert main(["eval", f"run={run_dir}", f"output_dir={tmp_path / 'eval'}"]) == 0
    predictions = [json.loads(line) for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    texts = [row["prompt"].removesuffix("\nLabel:") for row in predictions]
    data = tmp_path / "again.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": "whatever"}) + "\n" for text in texts))
    assert main(["predict", f"run={run_dir}", f"data={data}", f"output={tmp_path / 'out.jsonl'}", "--json"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == [("no", "yes")[row["chosen"]] for row in predictions]
    assert all(row["label"] == "whatever" for row in rows)
    capsys.readouterr()


def test_completions_are_written(runs: Path, tmp_path: Path, capsys: Any):
    data = tmp_path / "new.jsonl"
    data.write_text(json.dumps({"prompt": "is it free"}) + "\n")
    where = runs / "out/instruct"
    assert main(["predict", f"run={where}", f"data={data}", "--json"]) == 0
    (tmp_path / "new.tsv").write_text("prompt\nis it not\n")
    assert main(["predict", f"run={where}", f"data={tmp_path / 'new.tsv'}"]) == 0  # it went over predictions-new.jsonl
    assert "1 row with prediction" in capsys.readouterr().out
    assert (where / "predictions-new.tsv.jsonl").is_file()
    (row,) = [json.loads(line) for line in (where / "predictions-new.jsonl").read_text().splitlines()]
    assert row["prompt"] == "is it free"
    assert isinstance(row["prediction"], str)
    capsys.readouterr()


def test_texts_are_written_alike_by_a_seed(runs: Path, capsys: Any):
    def text(*words: str) -> str:
        assert main(["generate", f"run={runs / 'out/instruct'}", "prompt=is it free", "max_new_tokens=6", *words]) == 0
        return capsys.readouterr().out

    assert text() == text()
    assert text("temperature=5", "seed=1") == text("temperature=5", "seed=1")
    assert len({text("temperature=5", f"seed={seed}") for seed in range(4)}) > 1
    assert json.loads(text("--json"))["prompt"] == "is it free"
    assert main(["generate", f"model={runs / 'model'}", "prompt=is it", "max_new_tokens=3", "--chat"]) == 0


def test_texts_of_a_file_keep_its_columns_in_the_kind_that_is_named(runs: Path, tmp_path: Path, capsys: Any):
    """A .csv had lines of JSON in it, and the other columns were left out."""
    data, words = tmp_path / "prompts.tsv", [f"run={runs / 'out/instruct'}", "max_new_tokens=3"]
    data.write_text("prompt\tid\nis it free\t7\nis it\t8\n")
    for name in ("out.csv", "out.jsonl"):
        assert main(["generate", *words, f"data={data}", f"output={tmp_path / name}"]) == 0
    written = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert written == [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [list(row) for row in written] == [["prompt", "id", "text"]] * 2
    assert [row["id"] for row in written] == ["7", "8"]


def test_new_rows_that_are_cut_are_said(runs: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "long.csv").write_text("text\nyou call\n" + "you call " * 2000 + "\n")
    words = [f"run={runs / 'out/classify'}", f"data={tmp_path / 'long.csv'}", f"output={tmp_path / 'out.csv'}"]
    assert main(["predict", *words]) == 0
    assert "1 of 2 new rows are cut at" in capsys.readouterr().err
    new_rows(tmp_path / "long.csv")
    assert main(["predict", *words]) == 0
    assert "cut" not in capsys.readouterr().err


def test_lines_that_are_no_text_end_a_conversation_with_a_sentence(runs: Path):
    import subprocess
    import sys

    for locale in ("C.UTF-8", "C"):
        done = subprocess.run(
            [sys.executable, "-m", "zoft", "chat", f"model={runs / 'model'}"],
            input=b"is \xff\n", capture_output=True, env={**os.environ, "LC_ALL": locale}, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert b"not UTF-8 text: re-encode it" in done.stderr.splitlines()[-1]


def test_a_prompt_is_continued_before_the_mark_that_its_tokenizer_ends_texts_with(runs: Path):
    from tokenizers.processors import TemplateProcessing

    loaded = load_run(str(runs / "out/instruct"), [])
    assert plain_ids(loaded, "is it", 1198) == loaded.tokenizer("is it")["input_ids"]
    loaded.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 2)]
    )
    assert plain_ids(loaded, "is it", 9) == loaded.tokenizer("is it")["input_ids"][:-1]


def test_who_can_write_is_asked_of_the_model(tmp_path: Path, capsys: Any):
    """And not of its class's name: GPT-2's and BERT's are both LMHeadModel, and BERT's tokens see what follows."""
    from transformers import BertConfig, BertLMHeadModel

    models.tiny_gpt2().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert main(["generate", f"model={tmp_path}", "prompt=is it", "max_new_tokens=3"]) == 0
    bert = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    for model in (BertLMHeadModel(BertConfig(**bert)), models.tiny_bert_classifier()):
        with pytest.raises(UserError, match=r"mine is a Bert.*, which writes no text: zoft predict gives its labels"):
            require_writer(Loaded(model, None, "mine"))
    require_writer(Loaded(models.tiny_llama(), None, "mine"))


def test_a_conversation_in_a_process(runs: Path):
    done = zoft(
        "chat", f"run={runs / 'out/chat'}", "--compare", "max_new_tokens=4", cwd=runs, input="is it\n/reset\nyes\n"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("│ tuned") == 2
    assert "a new conversation" in done.stdout


def test_the_base_of_a_run_is_the_model_before_training(runs: Path):
    import torch

    ids = torch.tensor([[4, 5, 6]])
    plain = load_run(str(runs / "out/classify"), [], with_base=True)
    adapter = load_run(str(runs / "out/chat"), [], with_base=True)
    assert adapter.base_model is None
    with torch.no_grad(), plain.base() as one, adapter.base() as two:
        before = [one(input_ids=ids).logits, two(input_ids=ids).logits]
    torch.testing.assert_close(before[0], before[1])
    with torch.no_grad():
        for loaded in (plain, adapter):
            assert not torch.equal(loaded.model(input_ids=ids).logits, before[0])


def test_columns_fit_the_terminal():
    for width in (80, 120):
        assert max(map(len, beside("word " * 60, "other " * 40, width).splitlines())) <= width


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "data=new.csv"], "run= is missing"),
        (["predict", "run=RUN"], "data= is missing"),
        (["predict", "run=RUN", "data=new.csv", "optimizer.learning_rate=5"], "was of the training of run="),
        (["predict", "run=RUN", "data=new.csv", "model.name=other"], "model.name was of the training of run="),
        (["eval", "run=RUN", "estimator.eps=7"], "estimator.eps was of the training of run="),
        (["predict", "run=RUN", "data=new.csv", "estimator=./nowhere.py:Wide"], "there is no file"),  # a file is named
        (["predict", "run=nowhere", "data=new.csv"], "run=nowhere holds no config.yaml"),
        (["predict", "run=RUN", "data=nowhere.csv"], "there is no data file nowhere.csv"),
        (["predict", "run=RUN", "data=new.csv", "output=x.txt"], "must end in .csv or .jsonl"),
        (["predict", "run=RUN", "data=new.csv", "output=new.csv"], "is the file that is read"),
        (["predict", "run=RUN", "data=bad.csv"], "bad.csv:2 has no 'text' (its columns: id, txt)"),
        (["predict", "run=WRITER", "data=bad.csv"], "bad.csv:2 has no 'prompt' (its columns: id, txt)"),
        (["predict", "run=RUN", "data=taken.jsonl"], "taken.jsonl has a column called 'prediction'"),
        (["predict", "run=RUN", "data=p.csv"], "p.csv has a column called 'p(no)'"),
        (["predict", "run=CHAT", "data=new.csv"], "try the model with zoft chat"),
        (["predict", "runs/mine"], "Did you mean run=runs/mine?"),
        (["predict", "--data=x"], "Did you mean data=x?"),
        (["predict", "run=RUN", "data=new.csv", "tsk.x=1"], "there is no key 'tsk'"),
        (["generate", "prompt=x"], "give run=DIR (a finished run) or model=NAME"),
        (["generate", "run=RUN"], 'give prompt="..." or data=FILE'),
        (["generate", "run=RUN", "prompt=x", "max_new_tokens=0"], "max_new_tokens must be at least 1"),
        (["generate", "run=RUN", "prompt=x", "temperature=hot"], "temperature must be a number, got 'hot'"),
        (
            ["generate", "model=MODEL", "prompt=x", "temperature=1", "seed=1", "task.x=1"],
            "task.x=1 could be a run's key",
        ),
        (["generate", "model=MODEL", "prompt=x", "max_tokens=1"], "leave it out. Did you mean max_new_tokens?"),
        (["generate", "run=RUN", "prompt=is \udcff it"], "the prompt is not UTF-8 text"),
        (["generate", "run=RUN", "data=prompts.jsonl", "output=prompts.jsonl"], "is the file that is read"),
        (["generate", "run=RUN", "data=prompts.jsonl", "output=x.txt"], "must end in .csv or .jsonl"),
        (["generate", "run=RUN", "data=prompts.jsonl"], "prompts.jsonl has a column called 'text'"),
        (["generate", "run=RUN", "data=half.jsonl"], "half.jsonl:1: 'prompt' holds half a character"),
        (["generate", "run=RUN", "data=numbers.jsonl"], "numbers.jsonl:1: 'prompt' is no text"),
        (["generate", "run=RUN", "prompt="], "the prompt is empty"),
        (["generate", "run=RUN", "prompt=is it", "max_new_tokens=1199"], "leaves 1,198 for max_new_tokens=1199"),
        (["generate", "run=CHAT", "prompt=is it", "max_new_tokens=1197"], "1,200 tokens at most, of which the prompt"),
        (["chat", "model=MODEL", "--compare"], "give run=DIR, not model="),
        (["chat", "--compar"], "Did you mean --compare"),
    ],
)
def test_wrong_requests_are_one_sentence(
    words: list[str], message: str, runs: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    new_rows(tmp_path / "new.csv")
    (tmp_path / "bad.csv").write_text("id,txt\n1,x\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x", "text": "y"}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "is \\ud800 it"}\n')
    (tmp_path / "numbers.jsonl").write_text('{"prompt": 5}\n')
    (tmp_path / "p.csv").write_text("text,p(no)\nx,mine\n")
    (tmp_path / "taken.jsonl").write_text('{"text": "x"}\n{"text": "y", "prediction": "mine"}\n')
    names = sorted(path.name for path in tmp_path.iterdir())
    places = {
        "RUN": runs / "out/classify",
        "CHAT": runs / "out/chat",
        "WRITER": runs / "out/instruct",
        "MODEL": runs / "model",
    }
    given = [
        f"{key}={places.get(value, value)}" if sign else key for key, sign, value in (w.partition("=") for w in words)
    ]
    assert main(given) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_house_task_labels_new_rows(tmp_path: Path):
    from zoft.lm.tasks.sms_spam import SmsSpam
    from zoft.lm.tasks.sst2 import SST2

    to_example, labels = SmsSpam().for_new_rows()
    assert to_example({"text": "win a  prize"}, "x.csv:2").prompt.startswith("SMS: win a prize\n")
    assert labels == ("ham", "spam")
    to_example, labels = SST2().for_new_rows()
    assert to_example({"sentence": "a dull film "}, "x.csv:2").prompt == "a dull film It was"
    assert labels == ("negative", "positive")


@pytest.mark.parametrize("adapter", ["lora", "prefix", "prompt"])
def test_fault_13_an_adapter_by_its_folder_finds_its_base_from_anywhere(adapter, tmp_path, monkeypatch):
    """As plain peft writes it: the base's relative path, of the folder that it was trained in."""
    import torch

    from tests.runs import model_folder
    from zoft.component import create
    from zoft.lm.models.load import load_model
    from zoft.use.inference.load import load_named

    base = model_folder(tmp_path / "tiny")
    wrapped = create("peft", adapter, adapter).wrap(load_model(str(base)), 0).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(file.read_text())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ids = torch.arange(4, 10).view(1, 6)
    for name in ("tiny", "../tiny"):
        file.write_text(json.dumps(said | {"base_model_name_or_path": name}))
        with torch.no_grad():
            assert torch.equal(load_named(str(tmp_path / "adapter")).model(input_ids=ids).logits, wrapped(ids).logits)
    for name, message in (("./gone", "there is no model folder ./gone"), (None, "names no base_model_name_or_path")):
        file.write_text(json.dumps(said | {"base_model_name_or_path": name}))
        with pytest.raises(UserError, match=message):
            load_named(str(tmp_path / "adapter"))
