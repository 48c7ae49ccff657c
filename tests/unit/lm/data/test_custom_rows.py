"""A user's own data: formats found and named, every row checked, one sentence with its place for what does not fit."""

from __future__ import annotations

import json
import logging
import random
import re
import shlex
from pathlib import Path

import pytest

from zoft.config import compose
from zoft.errors import UserError
from zoft.lm.data import choosing
from zoft.lm.data.examples import Chat, Completion, PreferencePair, Rated
from zoft.lm.tasks import Example
from zoft.lm.tasks._custom_formats import FORMATS
from zoft.lm.tasks._layouts import ALPACA
from zoft.lm.tasks.custom import Custom

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SMALL = {"num_dev": 2, "num_test": 2, "num_train": 4}


def custom(folder, rows, **fields) -> Custom:
    """A task over a jsonl file of these rows; one row stands for eight."""
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows] * 8)))
    return Custom(train=str(path), **SMALL | fields)


def first(folder, row, **fields):
    return custom(folder, row, **fields).load().train[0]


# -------------------------------------------------------------------------------------------------------- what is found

FOUND = {
    "completion": ({"prompt": "a", "completion": " b"}, ("a", " b")),
    "completion, as Alpaca names it": (
        {"instruction": "a", "output": "b", "id": 3},
        (ALPACA.format(instruction="a"), "b"),
    ),
    "completion, whatever the case": ({"Question": "a", "Answer": 7}, ("Question: a\nAnswer:", " 7")),
    "chat": ({"messages": CHAT}, CHAT),
    "chat, as ShareGPT has it": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        CHAT,
    ),
    "chat, with parquet's empty keys": ({"messages": [message | {"name": None} for message in CHAT]}, CHAT),
    "reward": ({"prompt": "a", "reward": 0.5}, ("a", 0.5)),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, (("a", "b"), ("a", "c"))),
    "preference, of chats": ({"chosen": CHAT, "rejected": [CHAT[0], CHAT[1] | {"content": "no"}]}, None),
    "multiple_choice": (
        {"question": "q?", "choices": ["x", "y"], "answer": 1},
        ("Question: q?\nAnswer:", (" x", " y"), 1),
    ),
    "multiple_choice, by its text": (
        {"question": "q?", "choices": ["x", "y"], "answer": "y"},
        ("Question: q?\nAnswer:", (" x", " y"), 1),
    ),
    "multiple_choice, as ARC has it": (
        {"question": "q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2", "id": "a"},
        ("Question: q?\nAnswer:", (" x", " y"), 1),
    ),
}


def plain(example):
    if isinstance(example, Completion):
        return (example.prompt, example.completion)
    if isinstance(example, Chat):
        return list(example.messages)
    if isinstance(example, Rated):
        return (example.prompt, example.reward)
    if isinstance(example, PreferencePair):
        return (plain(example.chosen), plain(example.rejected))
    return (example.prompt, example.options, example.label)


@pytest.mark.parametrize("name", FOUND)
def test_the_format_is_found_and_told(tmp_path, caplog, name):
    row, wanted = FOUND[name]
    with caplog.at_level(logging.WARNING):
        example = first(tmp_path, row)
    assert plain(example) == wanted or wanted is None
    format = name.partition(",")[0]
    assert f"(format={format}, found: " in caplog.text
    assert all(f"not used: {column}" in caplog.text for column in row if column == "id")
    assert plain(first(tmp_path, row, format=format)) == plain(example)  # and the same where it is said


@pytest.mark.parametrize("prompt", ["hi", " hi\n", None, "", "hey"])
@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "be brief"}]])
def test_a_text_prompt_of_chats_is_asked_by_the_user(tmp_path, prompt, before):
    """Whether the chats hold it already or are the answers alone."""
    answers = {"chosen": [*before, CHAT[1]], "rejected": [*before, CHAT[1] | {"content": "no"}]}
    if prompt == "hey":
        wanted = [*before, CHAT[0] | {"content": "hey"}, CHAT[1]]
    else:
        answers = {role: [*before, CHAT[0], chat[-1]] for role, chat in answers.items()}
        wanted = [*before, *CHAT]
    chosen, rejected = plain(first(tmp_path, {"prompt": prompt, **answers}))
    assert chosen == wanted
    assert rejected == [*wanted[:-1], {"role": "assistant", "content": "no"}]
    if before:
        held = first(tmp_path, {"prompt": "be brief", **answers})  # a system message may be it
        assert plain(held.chosen) == answers["chosen"]


def test_what_is_named_is_not_told_again(tmp_path, caplog):
    row = {"a": "x", "b": " y", "prompt": "z"}
    example = first(tmp_path, row, format="completion", columns={"prompt": "a", "completion": "b"})
    assert plain(example) == ("x", " y")
    assert caplog.text == ""
    assert plain(first(tmp_path, row, columns={"prompt": "a", "completion": "b"})) == ("x", " y")


def test_a_template_is_the_prompt(tmp_path):
    row = {"instruction": " add ", "input": "1 2", "output": "3"}
    assert plain(first(tmp_path, row, template="{instruction}: {input}\n")) == ("add: 1 2\n", "3")
    row = {"q": "q?", "a": "x", "b": "y", "gold": "b"}
    example = first(
        tmp_path, row, format="multiple_choice", template="{q} A:", columns={"choices": ["a", "b"], "answer": "gold"}
    )
    assert example == Example("q? A:", (" x", " y"), 1, domain="A:")


def test_labels_that_are_words_are_their_own(tmp_path, caplog):
    rows = [{"text": f"m{i}", "label": ("spam", "ham")[i % 2]} for i in range(8)]
    splits = custom(tmp_path, rows, template="{text} is").load()
    assert {example.options for example in splits.train} == {(" ham", " spam")}
    assert all(example.label == 1 - int(example.prompt[1]) % 2 for example in splits.train)
    assert "task.words is not given: the labels are their own words: ham (4 rows), spam (4 rows)" in caplog.text


@pytest.mark.parametrize("labels", [(0, 1), (0.0, 1.0), ("0", "1"), (False, True)])
def test_a_label_is_the_same_as_a_number_and_as_text(tmp_path, labels):
    rows = [{"text": f"m{i}", "label": labels[i % 2]} for i in range(8)]
    keys = ("False", "True") if labels[0] is False else (0, 1)
    splits = custom(tmp_path, rows, template="{text}:", words=dict(zip(keys, ("no", "yes"), strict=True))).load()
    assert all(example.label == int(example.prompt[1]) % 2 for example in splits.train)


TEXTS = [{"sentence": f" m{i} ", "more": "it", "grade": (10, 9)[i % 2]} for i in range(8)]
BARE = [
    ({"label": "grade", "template": "{sentence} Good?"}, "m{i}"),
    ({"label": "grade", "template": "{more}, {sentence}: good?"}, "it\nm{i}"),
    ({"label": "grade"}, "m{i}"),  # found by its name
    ({"columns": {"text": "more", "label": "grade"}}, "it"),
]


@pytest.mark.parametrize(("fields", "wanted"), BARE)
def test_a_raw_text_stands_before_words_or_a_head(tmp_path, caplog, fields, wanted):
    """Of the same rows in the same splits as the template's."""
    aligned = custom(tmp_path, TEXTS, label="grade", template="{sentence}", words={10: "yes", 9: "no"}).load()
    numbers = [example.prompt[1:] for example in aligned.train]
    wanted = [wanted.format(i=i) for i in numbers]
    task = custom(tmp_path, TEXTS, prompt="none", words={10: "yes", 9: "no"}, **fields)
    assert (task.kind, task.labels) == ("options", ())
    examples = task.load().train
    assert [example.prompt for example in examples] == wanted
    assert all((example.options, example.domain) == ((" yes", " no"), "") for example in examples)
    assert [example.label for example in examples] == [int(i) % 2 for i in numbers]
    for words, labels in (({}, ("9", "10")), ({10: "yes", 9: "no"}, ("10", "9"))):
        task = custom(tmp_path, TEXTS, prompt="head", words=words, **fields)
        assert (task.kind, task.labels) == ("head", labels)
        examples = task.load().train
        assert [example.prompt for example in examples] == wanted
        assert [(example.options, labels[example.label]) for example in examples] == [
            ((), ("10", "9")[int(i) % 2]) for i in numbers
        ]
    assert caplog.text.count("the labels are their own classes: 9 (4 rows), 10 (4 rows)") == 1


# -------------------------------------------------------------------------------------------------------- what is wrong

DOES_NOT_FIT = [
    ({"a": 1, "b": 2}, {}, r"own.jsonl:1: the columns \(a, b\) fit no format: name one"),
    ({"prompt": "a", "completion": "b", "reward": 1}, {}, r"own.jsonl:1 could be completion or reward by its columns"),
    ({"prompt": "a", "completion": "b", "label": 1}, {}, r"could be text_label or completion"),
    ({"prompt": "a"}, {"format": "completion"}, r"own.jsonl:1 has no column for 'completion' of format=completion"),
    ({"prompt": "a"}, {"columns": {"prompt": "prmpt"}}, r"own.jsonl:1 has no 'prmpt'.*Did you mean prompt"),
    ({"prompt": "a"}, {"format": "chat", "columns": {"mssages": "prompt"}}, r"has no 'mssages'. Did you mean messages"),
    (
        {"text": "a", "label": 0},
        {"template": "{text}"},
        r"every row of .* has the same label, 0 \(8 rows\): .* task.label=",
    ),
    (
        {"text;label": "a;0"},
        {"format": "text_label"},
        r"parted by commas in a \.csv .*, not by ';'; convert it, or name it",
    ),
    ({"text": "a", "label": 0}, {"prompt": "head"}, r"a head needs two classes or more; the labels of.*are 0 \(8 rows"),
    (
        {"t": "a", "label": 0},
        {"prompt": "head"},
        r"own.jsonl:1 has no column called text .its columns: t, label.: name it,.*text: C",
    ),
    (
        {"t": " ", "label": 0},
        {"prompt": "none", "template": "{t}?", "words": {0: "a", 1: "b"}},
        r"own.jsonl:1: 't' is e",
    ),
    ({"t": "a", "label": 2}, {"prompt": "head", "template": "{t}", "words": {0: "a", 1: "b"}}, r"'2' has no class"),
    ({"t": "a", "text": "b", "label": 0}, {"columns": {"text": "t"}, "template": "{t}"}, r"leave one of them out"),
    *(
        (row, {"template": f"{{{column}}} {{{text}}}"}, rf"task.template names '{column}', .*the {role}")
        for row, text, column, role in (
            ({"text": "a", "label": 0}, "text", "label", "label"),
            ({"question": "a", "options": ["b", "c"], "correct": "b"}, "question", "correct", "answer"),
            ({"prompt": "a", "response": "b"}, "prompt", "response", "completion"),
            ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prompt", "rejected", "rejected"),
            ({"prompt": "a", "reward": 1}, "prompt", "reward", "reward"),
        )
    ),
    ({"text": "a", "label": 0}, {"prompt": "head", "template": "{label} {text}"}, r"task.template names 'label'"),
    (
        {"text": "b", "label": 0},
        {"columns": {"text": "text"}},
        r"task.columns is not read by .*aligned: task.template and",
    ),
    ({"messages": CHAT}, {"prompt": "head"}, r"task.prompt=head is for text \+ label, .*format=chat, which have no cl"),
    ({"prompt": "a", "completion": None}, {}, r"own.jsonl:1 has no 'completion'"),
    ({"prompt": "", "completion": "b"}, {}, r"own.jsonl:1: 'prompt' is empty"),
    ({"prompt": "a", "completion": ["b"]}, {}, r"own.jsonl:1: 'completion' must be text, got a list"),
    ({"prompt": {"x": 1}, "completion": "b"}, {}, r"own.jsonl:1: 'prompt' must be text, got a mapping"),
    ({"prompt": True, "completion": "b"}, {}, r"own.jsonl:1: 'prompt' must be text, got true or false"),
    ({"prompt": "a\ud800", "completion": "b"}, {}, r"own.jsonl:1: 'prompt' holds half a character"),
    ({"prompt": "a", "reward": [1]}, {}, r"own.jsonl:1: 'reward' must be a number or text, got a list"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, {}, r"own.jsonl:1: chosen and rejected are the same: remove"),
    ({"chosen": "b", "rejected": "c"}, {}, r"own.jsonl:1 has no prompt"),
    (
        {"prompt": "ho", "chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "no"}]},
        {},
        r"own.jsonl:1: 'chosen' begins with the user's 'hi' and the prompt is 'ho': make them the same",
    ),
    ({"messages": []}, {}, r"own.jsonl:1: 'messages' must be a list of messages, got an empty one"),
    ({"messages": ["hi"]}, {}, r"own.jsonl:1: messages\[0\] must be a message with role and content, got text"),
    ({"messages": CHAT[:1]}, {}, r"own.jsonl:1: no message of 'messages' is the assistant's"),
    ({"messages": [{"role": "root", "content": "a"}]}, {}, r"messages\[0\]: the role must be one of system, user"),
    ({"messages": [*CHAT, {"role": "assistant", "content": " "}]}, {}, r"'messages\[2\].content' is empty"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, r"'messages\[0\].content' must be text"),
    ({"messages": [CHAT[0] | {"tool_calls": []}]}, {}, r"messages\[0\] has 'tool_calls', which is not read"),
    ({"question": "q", "choices": ["x"], "answer": 0}, {}, r"the choices must be two or more different texts"),
    ({"question": "q", "choices": ["x", "x"], "answer": 0}, {}, r"the choices must be two or more different texts"),
    ({"question": "q", "choices": ["x", "y"], "answer": 2}, {}, r"the answer '2' is none of the choices \('x', 'y'\)"),
    ({"question": "q", "choices": ["x", "y"], "answer": "C"}, {}, r"the answer 'C' is none of the choices"),
    (
        {"question": "q", "choices": ["1", "2"], "answer": 1},
        {},
        r"the answer '1' is the text of one choice and the num",
    ),
    ({"question": "q", "choices": ["x", ["y"]], "answer": 1}, {}, r"'choices' must be text, got a list"),
    (
        {"question": "q", "choices": "x or y", "answer": 1},
        {"format": "multiple_choice"},
        r"a text that is no JSON list",
    ),
]


@pytest.mark.parametrize(("row", "fields", "message"), DOES_NOT_FIT, ids=[m for _, _, m in DOES_NOT_FIT])
def test_a_row_that_does_not_fit_is_one_sentence(tmp_path, row, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        custom(tmp_path, row, **fields).load()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_the_line_is_that_of_the_row_that_is_wrong(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] * 9 + [{"prompt": "a", "answer": "b"}]
    with pytest.raises(UserError, match=r"own.jsonl:10 has no 'completion' \(its columns: prompt, answer\)"):
        custom(tmp_path, rows).load()


UNREAD = [
    ({"prompt": "heads"}, r"custom.prompt must be one of aligned, none, head.*Did you mean head"),
    ({"format": "chat", "prompt": "none"}, r"task.prompt=none is for text \+ label, .*format=chat, whose prompt is"),
    ({"format": "reward", "prompt": "head"}, r"task.prompt=head .*format=reward, which have no classes: leave it out"),
    ({"format": "multiple_choice", "prompt": "head"}, r"format=multiple_choice, which have no classes for all rows"),
    ({"format": "chat", "template": "{a}"}, r"task.template is not read by format=chat"),
    ({"format": "completion", "words": {"a": "b", "c": "d"}}, r"task.words is not read by format=completion"),
    ({"format": "reward", "label": "x"}, r"task.label is not read by format=reward"),
    ({"format": "text_label", "columns": {"label": "x"}}, r"task.columns is not read by format=text_label"),
    ({"format": "chats"}, r"custom.format must be one of auto, text_label.*Did you mean chat"),
]


@pytest.mark.parametrize(("fields", "message"), UNREAD)
def test_a_setting_that_would_be_ignored_is_refused_before_anything_is_read(fields, message):
    with pytest.raises(UserError, match=message):
        Custom(train="nowhere.jsonl", **fields)


def test_a_template_of_a_chat_that_was_found_is_refused_too(tmp_path):
    with pytest.raises(UserError, match=r"task.template is not read by format=chat"):
        custom(tmp_path, {"messages": CHAT, "a": "b"}, template="{a}").load()


@pytest.mark.parametrize(
    ("words", "message"),
    [({"a": "x", "b": " x"}, r"another word for each label"), ({"a": "", "b": "x"}, r"none of them empty")],
)
def test_words_that_cannot_be_told_apart_are_refused(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        custom(tmp_path, {"text": "t", "label": "a"}, template="{text}", words=words).load()


def test_the_training_file_is_no_validation_file(tmp_path):
    task = custom(tmp_path, {"prompt": "a", "completion": "b"})
    (tmp_path / "link.jsonl").symlink_to(task.train)
    with pytest.raises(UserError, match=r"task.validation must be another file than task.train"):
        Custom(train=task.train, validation=str(tmp_path / "link.jsonl"), **SMALL).load()


def test_a_column_of_texts_is_no_set_of_labels(tmp_path):
    rows = [{"text": "t", "label": f"answer {i}"} for i in range(100)]
    with pytest.raises(UserError, match=r"own.jsonl:65: 'label' has more than 64 different values so far"):
        custom(tmp_path, rows, template="{text}").load()


# -------------------------------------------------------------------------------------------------- choosing, arguments


def test_of_a_large_source_only_the_chosen_rows_are_held(tmp_path, monkeypatch):
    rows = [{"prompt": f"question {i}", "completion": f" {i}"} for i in range(50)]
    held = custom(tmp_path, rows).load()
    monkeypatch.setattr(choosing, "KEPT_CHARS", 100)
    again = custom(tmp_path, rows).load()
    assert held == again
    choices = iter((50, 3))
    with pytest.raises(UserError, match=r"lost rows while it was read"):
        choosing.choose(lambda: (("a:1", "x" * 9) for _ in range(next(choices))), lambda row, where: row, 5, 0)
    order = list(range(50))
    random.Random(0).shuffle(order)  # as the examples themselves always were
    assert [int(e.completion) for e in (*held.test, *held.dev, *held.train)] == order[:8]
    assert held.train[0].where.endswith(f"own.jsonl:{order[4] + 1}")


def test_columns_and_format_come_from_the_command_line():
    arguments = ["task=custom", "task.format=multiple_choice", "task.columns={choices: [a, b], answer: gold}"]
    task = compose(arguments).task
    assert (task.format, task.columns) == ("multiple_choice", {"choices": ["a", "b"], "answer": "gold"})
    with pytest.raises(UserError, match=r"task.format must be one of.*Did you mean completion"):
        compose(["task=custom", "task.format=completions"])


# ------------------------------------------------------------------------------------------------------------- the page


def documented() -> list[tuple[str, str, str]]:
    """(format, arguments, row) of every example in docs/data.md."""
    page = (Path(__file__).resolve().parents[4] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = []
    for section in page.split("\n### ")[1:]:
        arguments = re.search(r"^    ('task\..*)$", section, re.M)
        for block in re.findall(r"```json\n(.*?)```", section, re.S):
            examples += [
                (section.split("\n")[0], arguments.group(1) if arguments else "", row) for row in block.splitlines()
            ]
    return examples


@pytest.mark.parametrize(("format", "arguments", "row"), documented())
def test_every_row_of_the_page_is_of_its_format(tmp_path, format, arguments, row):
    path = tmp_path / "own.jsonl"
    path.write_text(f"{row}\n" * 8)
    words = ["task=custom", f"task.train={path}", "task.num_dev=2", "task.num_test=2", *shlex.split(arguments)]
    task = compose(words).task
    assert task.reading().format == format
    assert len(task.load().train) == 4


def test_the_page_names_every_format():
    assert {format for format, _, _ in documented()} == set(FORMATS)
