"""`zoft data show`, and a user's own data of every kind from its file to a report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import WORDS, data_file, model_folder, tiny_tokenizer
from zoft.cli import main
from zoft.cli.data import lines, safe
from zoft.config import compose
from zoft.errors import UserError
from zoft.lm.data import preview
from zoft.lm.data.examples import MASK, Piece
from zoft.lm.tasks import Example
from zoft.lm.tasks.sst2 import SST2
from zoft.run.build import load_rows
from zoft.run.train import run

TEMPLATE = "{% for m in messages %}{{ bos_token }} {{ m.role }} : {{ m.content }} {{ eos_token }} {% endfor %}"


def rows_of(kind: str) -> list[dict[str, Any]]:
    def words(place: int, count: int = 3) -> str:
        return " ".join(WORDS[(place + k) % len(WORDS)] for k in range(count))

    if kind == "text_label":
        return [{"text": words(i), "label": ("ham", "spam")[i % 2]} for i in range(24)]
    if kind == "multiple_choice":
        return [{"question": words(i), "choices": ["yes", "no", "later home"], "answer": i % 3} for i in range(24)]
    if kind == "completion":
        return [{"prompt": words(i), "completion": f" {words(i, 2)}"} for i in range(24)]
    if kind == "chat":
        turns = [("user", words), ("assistant", lambda i: words(i, 2))] * 2
        return [{"messages": [{"role": role, "content": say(i)} for role, say in turns]} for i in range(24)]
    if kind == "preference":
        return [{"prompt": words(i), "chosen": " yes", "rejected": " no"} for i in range(24)]
    return [{"prompt": words(i), "reward": i % 2} for i in range(24)]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = model_folder(tmp_path_factory.mktemp("chatty") / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def arguments(model: Path, data: Path, *more: str) -> list[str]:
    return [
        *(f"model.name={model}", "task=custom", f"task.train={data}"),
        *("task.num_train=12", "task.num_dev=4", "task.num_test=8", "budget.queries=8", "optimizer.learning_rate=1e-2"),
        *("trainer.per_device_train_batch_size=4", "trainer.logging_steps=1", "trainer.eval_steps=2"),
        *more,
    ]


LABELLED = ("task.template='{text} is it'", "task.words={ham: 'no', spam: 'yes'}")
TRAINED = {
    "text_label.tsv": ("accuracy", LABELLED),
    "text_label.csv": ("accuracy", ("task.prompt=head", "objective=classes")),
    "multiple_choice.json": ("accuracy", ()),
    "multiple_choice.parquet": ("accuracy", ("objective=cross_entropy",)),
    "completion.csv": ("loss", ("objective=cross_entropy",)),
    "chat.parquet": ("loss", ("objective=cross_entropy", "method=fzoo", "budget.queries=18")),
    "chat.jsonl": ("loss", ("objective=cross_entropy", "method=adamw")),
}


@pytest.mark.parametrize("name", TRAINED)
def test_every_format_goes_from_its_file_to_a_report(tmp_path, capsys, model, name):
    metric, more = TRAINED[name]
    data = written(tmp_path / name, rows_of(name.partition(".")[0]))
    facts = run(compose(arguments(model, data, f"output_dir={tmp_path / 'out'}", *more)))
    assert facts["metric"] == metric
    assert facts["zero_shot"] != facts["final"] or metric == "accuracy"
    for reached in ("zero_shot", "final"):
        low, high = json.loads((tmp_path / "out" / "report.json").read_text())[f"{reached}_interval"]
        assert low <= facts[reached] <= high
    output = capsys.readouterr().out
    assert f"final     held-out {metric}" in output
    assert (tmp_path / "out" / "curve.png").is_file()
    if metric == "loss":
        assert facts["final_perplexity"] == pytest.approx(2.718281828 ** facts["final"], rel=1e-6)
        assert "nats per token, perplexity" in (tmp_path / "out" / "report.md").read_text()
        rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        assert any("eval_perplexity" in row for row in rows)
        assert not any("eval_accuracy" in row for row in rows)


def test_the_best_checkpoint_is_that_of_the_lowest_perplexity(tmp_path, model, capsys):
    data = written(tmp_path / "chat.jsonl", rows_of("chat"))
    best = ("trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.load_best_model_at_end=true")
    words = arguments(model, data, "objective=cross_entropy", f"output_dir={tmp_path / 'out'}", *best)
    with pytest.raises(UserError, match=r"metric_for_best_model=accuracy is not computed by an evaluation"):
        run(compose([*words, "trainer.metric_for_best_model=accuracy"]))
    assert not (tmp_path / "out").exists()
    run(compose([*words, "trainer.metric_for_best_model=perplexity"]))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    states = (tmp_path / "out").glob("checkpoint-*/trainer_state.json")
    state = max(states, key=lambda file: int(file.parent.name.partition("-")[2]))
    evaluated = {row["step"]: row["eval_perplexity"] for row in rows if "eval_perplexity" in row and row["step"]}
    lowest, last = min(evaluated.values()), max(evaluated)
    (best,) = (step for step, perplexity in evaluated.items() if perplexity == lowest)
    sentence = f"kept      the weights of step {best} of {last}, the best dev perplexity on the way: {lowest:.4g}"
    assert (sentence in capsys.readouterr().out) is (best != last)
    assert json.loads(state.read_text())["best_metric"] == pytest.approx(lowest)


@pytest.mark.parametrize(
    ("kind", "objective", "message"),
    [
        ("chat", "options", r"has texts to continue, and objective=options is computed from answers.*=cross_entropy"),
        ("completion", "options", r"has texts to continue, and objective=options is computed from answers"),
        ("preference", "cross_entropy", "has preference pairs, .*set objective=preference"),
        ("reward", "cross_entropy", "has prompts with what a reward judges by, .*set objective=reward"),
    ],
)
def test_data_that_the_objective_cannot_use_is_refused_before_the_model_is_looked_for(
    tmp_path, kind, objective, message
):
    data = written(tmp_path / f"{kind}.jsonl", rows_of(kind))
    words = arguments(tmp_path / "no-such-model", data, f"objective={objective}", f"output_dir={tmp_path / 'out'}")
    with pytest.raises(UserError, match=message):
        run(compose(words))
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------- show


def test_show_names_the_classes_of_a_head(tmp_path, capsys, model):
    data = written(tmp_path / "a.jsonl", rows_of("text_label"))
    text = shown(capsys, *arguments(model, data, "task.prompt=head", "objective=classes", "--rows", "1"))
    assert "task    custom, " in text
    assert "(format=text_label, found: text=text, label=label)" in text
    assert "\nclasses 0 ham, 1 spam\n" in text
    assert "none of them count" in text


def shown(capsys, *words: str) -> str:
    assert main(["data", "show", *words]) == 0
    return capsys.readouterr().out


def test_show_counts_the_right_answers_tokens_where_options_are_compared(tmp_path, capsys, model):
    """The header says of a row what the ^ below it mark: not the tokens of all options together."""
    data = written(tmp_path / "a.jsonl", rows_of("text_label"))
    words = arguments(model, data, *LABELLED, "--rows", "1")
    train = json.loads(shown(capsys, *words, "--json"))["splits"]["train"]
    marked = sum(train["first"][0]["parts"][0]["counted"])
    assert train["counted"] == {"min": marked, "median": marked, "max": marked, "total": marked * train["rows"]}
    assert f"; {marked} of them count" in shown(capsys, *words)


def test_show_needs_no_weights_and_marks_what_counts(tmp_path, capsys, model):
    """As text and as JSON, which say the same."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    data = written(tmp_path / "chat.jsonl", rows_of("chat"))
    words = arguments(bare, data, "objective=cross_entropy", "--rows", "1")
    facts = json.loads(shown(capsys, *words, "--json"))
    assert facts["read_as"] == {"format": "chat", "columns": {"messages": "messages"}, "unused": []}
    train = facts["splits"]["train"]
    assert (train["rows"], train["cut"], train["labels"]) == (12, {"rows": 0, "tokens": 0}, {})
    (part,) = train["first"][0]["parts"]
    counted = [token for token, counts in zip(part["tokens"], part["counted"], strict=True) if counts]
    assert counted[2::3] == ["<eos>", "<eos>"]
    assert len(counted) == 6
    assert train["counted"] == {"min": 6, "median": 6, "max": 6, "total": 72}
    text = shown(capsys, *words)
    assert "chat messages (format=chat, found: messages=messages)" in text
    assert "12 rows; 26 tokens (median 26); 6 of them count (23 % of all); none cut" in text
    parts = [split["first"][0]["parts"][0] for split in facts["splits"].values()]
    marked = [token for one in parts for token, counts in zip(one["tokens"], one["counted"], strict=True) if counts]
    assert text.count("^") == len("".join(marked)) + 1  # and one in the line that explains the mark
    tokens, marks = text.split("  tokens   ")[1].split("\n")[0], text.split("  counted  ")[1].split("\n")[0]
    under = "".join(c for c, mark in zip(tokens, marks.ljust(len(tokens)), strict=True) if mark == "^")
    assert "".join(counted).startswith(under)
    assert "\x1b" not in text
    repeats = [split["in_train"] for name, split in facts["splits"].items() if name != "train"]
    assert sum(repeats) > 0  # 24 rows of 15 kinds
    assert text.count(" OF THEM STAND IN TRAIN TOO") == sum(map(bool, repeats))


def test_show_tells_labels_options_and_what_is_cut(tmp_path, capsys, model):
    data = data_file(tmp_path / "data.jsonl", count=40)
    text = shown(capsys, *arguments(model, data, *LABELLED, "task.max_length=8"))
    assert "labels: no " in text
    assert " cut by " not in text  # five words, two of the template and the answer are eight tokens
    words = arguments(model, data, "task.template='free free free {text} is it'", LABELLED[1], "task.max_length=8")
    text, facts = shown(capsys, *words), json.loads(shown(capsys, *words, "--json"))
    cut = facts["splits"]["train"]["cut"]
    assert f"{cut['rows']} cut by {cut['tokens']} tokens" in text
    assert cut["rows"] == 12
    assert "options  ' no' (1 token) <- right, ' yes' (1 token)" in text


WRITTEN = (
    "objective.max_new_tokens=30",
    "task.max_length=40",
    "task.template='free free free free free free free free {prompt}'",
)
JUDGED = ("objective=reward", "objective.function=zoft.lm.rewards:countdown", *WRITTEN)


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("preference", ["objective=preference"], "objective=preference looks at the tokens marked ^\n"),
        ("reward", JUDGED, "objective=reward judges what the model writes behind the prompt\n"),
        ("completion", ["objective=metric", *WRITTEN], "objective=metric judges what the model writes"),
        ("completion", JUDGED, "objective=reward judges what the model writes"),
        (
            "completion",
            ["objective=options"],
            "objective=cross_entropy looks at the tokens marked ^\nnote    zoft train refuses this: ",
        ),
        ("reward", ["objective=reward"], "zoft train refuses this: objective=reward needs objective.function="),
    ],
)
def test_show_shows_what_training_would_see(tmp_path, capsys, model, kind, more, expected):
    """The tokens that a run's rows have, cut as they are there, and the sentence where there would be no run."""
    words = arguments(model, written(tmp_path / f"{kind}.jsonl", rows_of(kind)), *more)
    text, facts = shown(capsys, *words, "--rows=1"), json.loads(shown(capsys, *words, "--json", "--rows=1"))
    assert expected in text
    first, split = facts["splits"]["train"]["first"][0], facts["splits"]["train"]
    if facts["refusal"]:
        with pytest.raises(UserError) as caught:
            load_rows(compose(words))
        assert str(caught.value) == facts["refusal"]
        assert f"note    zoft train refuses this: {facts['refusal']}\n" in text
        return
    (row, *_), (part, *others) = load_rows(compose(words))[1]["train"], first["parts"]
    if kind == "preference":
        assert [part["ids"], others[0]["ids"]] == [row[side]["input_ids"] for side in ("chosen", "rejected")]
        assert text.count("  chosen: ") == text.count("  rejected: ") == 3
        assert split["counted"]["min"] > 0
        return
    assert (part["name"], part["ids"], others) == ("prompt", row["prompt_ids"], [])
    assert len(part["ids"]) == 10  # 40 - 30; there were eleven
    assert part["cut"] == 1
    assert "kept (task.max_length), 30 of them free for an answer\n" in text
    assert "none of them count; 12 cut by 12 tokens" in text
    assert ("  reward   " in text) == (kind == "reward")
    assert ("  answers  " in text) == (kind == "completion")


def test_show_works_for_a_task_of_the_house(capsys, model, monkeypatch, tmp_path):
    monkeypatch.setattr(SST2, "words", (" no", " yes"))  # words that the tiny tokenizer knows
    rows = [{"sentence": f"free home {i}", "label": i % 2} for i in range(40)]
    sources = [f"task.{name}={written(tmp_path / f'{name}.jsonl', rows)}" for name in ("train", "validation")]
    counts = ("task.num_train=8", "task.num_dev=4", "task.num_test=40")
    text = shown(capsys, f"model.name={model}", "task=sst2", *sources, *counts, "--rows=0")
    assert text.startswith("task    sst2\n")
    assert "test    40 rows" in text
    assert "labels: no 20, yes 20" in text
    assert "---" not in text


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (Example("", (" no", " yes"), 1, pieces=(Piece("free home"), MASK, Piece("spam"))), "options  ' no' (1 token)"),
        (Example("free home", (), 1), "labels: class 1 2"),
    ],
)
def test_show_knows_masked_models_and_heads(example, expected):
    tokenizer = tiny_tokenizer()
    encoded = [{"input_ids": [4, 3, 14]} | ({"mask_position": 1} if example.pieces else {})] * 2
    way = preview.Way("mask" if example.pieces else "head", lambda *_: encoded, 100)
    split = preview.preview([example] * 2, way, tokenizer, 1)
    facts = {"task": "t", "sentence": None, "model": "m", "vocabulary": 9, "max_length": 8, "objective": "label_words"}
    text = "\n".join(lines(facts | {"splits": {"train": split}}))
    assert expected in text
    assert ("free|<unk>|spam|\n  counted       ^^^^^" in text) == bool(example.pieces)


BROKEN = {
    "ragged.csv": b"prompt,completion\na,b\na,b,c\n",
    "text.parquet": b"PAR1 and no more",
    "deep.jsonl": b"[" * 10_000,
    "chat.jsonl": b'{"messages": [{"role": "user", "content": {"$ref": "/etc/passwd"}}]}\n',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence_with_its_place_and_exit_code_2(tmp_path, capsys, model, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    assert main(["data", "show", *arguments(model, tmp_path / name)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"zoft: error: {tmp_path / name}:")


def test_what_data_says_cannot_move_the_cursor():
    evil = "a\x1b[2Jb\u202ec\td\x07"
    assert safe(evil) == "a\\x1b[2Jb\\u202ec\\td\\x07"
    part = {"name": "row", "text": evil, "ids": [1], "tokens": [evil], "counted": [True], "cut": 0, "cut_end": 0}
    split = {
        "rows": 1,
        "tokens": {"min": 1, "median": 1, "max": 1, "total": 1},
        "counted": {"min": 1, "median": 1, "max": 1, "total": 1},
        "cut": {"rows": 0, "tokens": 0},
        "labels": {evil: 1},
        "first": [{"where": "a.jsonl:1", "parts": [part], "reward": evil}],
    }
    facts = {
        "task": "custom",
        "sentence": evil,
        "model": "m",
        "vocabulary": 9,
        "max_length": 8,
        "objective": "options",
        "splits": {"train": split},
    }
    assert all(line.isprintable() for line in lines(facts))
    assert any("\x1b[32m" in line for line in lines(facts, colour=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say `zoft data show`"),
        (["tell"], "say `zoft data show`"),
        (["show", "--jsn"], "has no flag '--jsn'. Did you mean --json"),
        (["show", "--rows", "many"], "--rows must be a whole number up to 1000, got 'many'"),
        (["show", "--rows"], "--rows is followed by a value"),
        (["show", "task=custom"], "there are no rows to train on: set task.train=FILE"),
        (["show", "config=classify"], "there are no rows to train on: set task.train=FILE"),
        (["show", "task=custm"], "custom"),
    ],
)
def test_a_wrong_command_is_one_sentence(capsys, words, message):
    assert main(["data", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
