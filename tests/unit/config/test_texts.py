r"""Text is text as it is written: in YAML files, in arguments, as keys; \n in an argument is a line break."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoft.config import compose, resolved_yaml
from zoft.config.catalog import config_dirs
from zoft.config.texts import argument
from zoft.errors import UserError

TYPED = (
    "No",
    "yes",
    "on",
    "OFF",
    "y",
    "01",
    "010",
    "0x1F",
    "1e1",
    "1_000",
    "12:30",
    "1.50",
    "2024-01-01",
    "true",
    "null",
    "nan",
    ".5",
)


def experiment(folder: Path, body: str) -> list[str]:
    file = folder / "mine.yaml"
    head = "# @package _global_\ndefaults:\n  - quickstart\n  - override /task: custom\n  - _self_\n"
    file.write_text(head + body)
    return [f"config={file}"]


def test_fault_2_a_word_in_a_file_is_the_word(tmp_path):
    values = "\n".join(f"    label{place}: {text}" for place, text in enumerate(TYPED))
    task = compose(experiment(tmp_path, f"task:\n  train: a.csv\n  words:\n{values}\n")).task
    assert tuple(task.words.values()) == TYPED
    keys = "\n".join(f"    {text}: word{place}" for place, text in enumerate(TYPED))
    task = compose(experiment(tmp_path, f"task:\n  train: a.csv\n  words:\n{keys}\n")).task
    assert tuple(task.words) == TYPED


FIELDS = ("task.template", "task.label", "task.train", "model.name", "model.revision", "tracker.project")


@pytest.mark.parametrize("text", [text for text in TYPED if text != "null"])
def test_fault_2_every_setting_of_text_is_read_as_it_is_written(tmp_path, text):
    task = ", ".join(f"{key.split('.')[1]}: {text}" for key in FIELDS if key.startswith("task."))
    tracker = f"{{report_to: [wandb], project: {text}}}"
    body = f"task: {{{task}}}\nmodel: {{name: {text}, revision: {text}}}\ntracker: {tracker}\n"
    given = ["config=quickstart", "task=custom", "tracker.report_to=[wandb]"]
    given += [f"{key}={text}" for key in FIELDS]
    for cfg in (compose(experiment(tmp_path, body)), compose(given)):
        for key in FIELDS:
            section, field = key.split(".")
            assert getattr(getattr(cfg, section), field) == text, key


def test_fault_2_a_word_in_an_argument_is_the_word():
    words = ", ".join(f"label{place}: {text}" for place, text in enumerate(TYPED))
    task = compose(["config=quickstart", "task=custom", "task.train=a.csv", f"task.words={{{words}}}"]).task
    assert tuple(task.words.values()) == TYPED


def test_fault_2_names_of_columns_and_lists_of_text(tmp_path):
    body = "task: {train: a.csv, format: multiple_choice, columns: {choices: [yes, no, 01], answer: on}}\n"
    assert compose(experiment(tmp_path, body)).task.columns == {"choices": ["yes", "no", "01"], "answer": "on"}
    given = "task.columns={choices: [true, 1, 1e1], answer: null}"
    cfg = compose(["config=quickstart", "task=custom", "task.train=a.csv", "task.format=multiple_choice", given])
    assert cfg.task.columns == {"choices": ["true", "1", "1e1"], "answer": "null"}


def test_fault_2_numbers_stay_numbers_and_nothing_stays_nothing(tmp_path):
    cfg = compose(experiment(tmp_path, "seed: 3\ntask: {train: a.csv, num_train: 10}\nmodel: {revision: null}\n"))
    assert (cfg.seed, cfg.task.num_train, cfg.model.revision) == (3, 10, None)
    assert compose(["config=quickstart", "estimator.eps=1e-2", "model.revision=null"]).model.revision is None
    with pytest.raises(UserError, match="words"):
        compose(experiment(tmp_path, "task: {train: a.csv, words: {neg: , pos: good}}\n"))


def test_fault_2_what_a_run_keeps_composes_the_same_words(tmp_path):
    body = "task: {train: a.csv, template: '{text}\\n', words: {no: Yes, 01: No, 1e1: null}}\n"
    cfg = compose(experiment(tmp_path, body))
    (tmp_path / "kept.yaml").write_text(resolved_yaml(cfg))
    again = compose([f"config={tmp_path / 'kept.yaml'}"])
    assert again.task == cfg.task
    assert again.task.words == {"no": "Yes", "01": "No", "1e1": "null"}


def test_fault_2_a_preset_of_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config_dirs.cache_clear() if hasattr(config_dirs, "cache_clear") else None
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "own.yaml").write_text("name: 1234567\nrevision: 12e4567\n")
    cfg = compose(["config=quickstart", "model=own"])
    assert (cfg.model.name, cfg.model.revision) == ("1234567", "12e4567")


def test_fault_2_a_truth_value_from_python_is_no_word(tmp_path):
    from zoft.lm.tasks.custom import Custom

    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": "a", "label": n % 2}) + "\n" for n in range(8)))
    with pytest.raises(UserError, match=r"task\.words must be .* each of them text"):
        Custom(train=str(tmp_path / "own.jsonl"), template="{text}", words={0: False, 1: True}).load()


def test_fault_2_a_bench_reads_its_names_as_they_are_written(tmp_path):
    from zoft.bench.reading import _content, _value

    file = tmp_path / "mine.yaml"
    file.write_text(
        "prompts: [no, 1e1]\ntasks: {on: [task=sst2]}\nmethods: {off: {arguments: [01]}, mezo: 1e-3}\nseeds: [0]\n"
    )
    content, _ = _content(str(file))
    assert content["prompts"] == ["no", "1e1"]
    assert list(content["tasks"]) == ["on"]
    assert content["methods"]["off"] == {"arguments": ["01"]}
    assert content["seeds"] == [0]
    assert list(_value("methods", "[off, 01]", {})) == ["off", "01"]


# ---------------------------------------------------------------------------------------------------------- line breaks


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"'{text}\nSpam?'", "{text}\nSpam?"),
        (r'"{text}\n\tSpam?"', "{text}\n\tSpam?"),
        (r"'{text} \\nabla'", r"{text} \nabla"),
        (r"'{text} \\\nabla'", "{text} \\\nabla"),
        (r"'{text} \\\\nabla'", r"{text} \\nabla"),
        (r"'it\'s {text}\n'", "it's {text}\n"),
        (r"'{text}\r\d'", r"{text}\r\d"),
        ("'{text}\nSpam?'", "{text}\nSpam?"),
    ],
)
def test_fault_6_line_breaks_and_tabs_in_a_template(written, meant):
    cfg = compose(["config=quickstart", "task=custom", "task.train=a.csv", f"task.template={written}"])
    assert cfg.task.template == meant


def test_fault_6_words_too_and_nothing_else():
    words = [r"task.words={a: x\ny, b: 'x\tz'}", r"task.label=a\nb"]
    task = compose(["config=quickstart", "task=custom", "task.train=a.csv", *words]).task
    assert task.words == {"a": "x\ny", "b": "x\tz"}
    assert task.label == r"a\nb"


def test_fault_6_a_file_is_read_by_yaml_alone(tmp_path):
    body = "task: {train: a.csv, template: '{text}\\nA', words: {a: \"x\\ny\", b: z\\n}}\n"
    task = compose(experiment(tmp_path, body)).task
    assert task.template == r"{text}\nA"
    assert task.words == {"a": "x\ny", "b": r"z\n"}


def test_fault_6_in_a_sweep_too(tmp_path):
    from zoft.config import multirun

    seen: list[str] = []
    words = ["config=quickstart", "task=custom", "task.train=a.csv", r"task.template='{text}\n','{text}\\n'"]

    def cell(cfg):
        seen.append(cfg.task.template)
        return {}

    results = multirun([*words, f"output_dir={tmp_path / 'sweep'}"], cell)
    assert [result.error for result in results] == [None, None]
    assert seen == ["{text}\n", r"{text}\n"]


def test_fault_6_other_arguments_are_left_alone():
    for text in (r"trainable.pattern='a\nb'", "seed=01", "estimator.eps=1e-2", "task=custom", "task.label=choice(a,b)"):
        assert argument(text) == text


@pytest.mark.parametrize("name", ["1e3", "1_000", "null", "nan", "-inf", "'12:30'"])
def test_fault_2_a_name_that_an_argument_cannot_say_is_refused(name):
    """Hydra has no quotes for names: 1e3 became 1000.0, which is another label."""
    with pytest.raises(UserError, match="an argument cannot hold the name"):
        compose(["config=quickstart", "task=custom", "task.train=a.csv", f"task.words={{{name}: yes, x: no}}"])


def test_fault_2_words_that_a_file_merges_in_are_the_words(tmp_path):
    body = "task: {train: a.csv, words: {<<: {a: yes, 2020-01-01: no}, 12:30: off}}\n"
    words = compose(experiment(tmp_path, body)).task.words
    assert dict(words) == {"12:30": "off", "a": "yes", "2020-01-01": "no"}
