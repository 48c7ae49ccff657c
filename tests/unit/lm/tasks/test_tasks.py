"""Tasks: templates, options, and three disjoint splits that depend on the data seed alone."""

from __future__ import annotations

import json
import random

import numpy
import pytest
import torch

from zoft.errors import UserError
from zoft.lm.tasks import Example
from zoft.lm.tasks._custom_formats import listed
from zoft.lm.tasks.custom import Custom
from zoft.lm.tasks.sms_spam import SmsSpam
from zoft.lm.tasks.sst2 import SST2


def file_of(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sst2_files(tmp_path):
    def rows(tag, count):
        return [{"sentence": f" {tag} {i} ", "label": i % 2} for i in range(count)]

    return {
        "train": file_of(tmp_path / "train.jsonl", rows("t", 50)),
        "validation": file_of(tmp_path / "val.jsonl", rows("v", 20)),
    }


def test_sst2_template_and_mezos_sampler(sst2_files):
    splits = SST2(num_train=30, num_dev=10, num_test=15, data_seed=3, **sst2_files).load()
    order = numpy.random.RandomState(3).permutation(50)[:40]
    assert [e.prompt for e in splits.train] == [f"t {i} It was" for i in order[:30]]
    assert [e.prompt for e in splits.dev] == [f"t {i} It was" for i in order[30:]]
    assert [e.prompt for e in splits.test] == [
        f"v {i} It was" for i in numpy.random.RandomState(3).permutation(20)[:15]
    ]
    assert splits.train[0].options == (" terrible", " great")
    assert [e.label for e in splits.train] == [int(i % 2) for i in order[:30]]


def test_sst2_first_rows_of_the_real_split_are_the_published_ones():
    """reference: SST-2, seed 0: train [43787, 16159, 59015], dev [2307, 42285], eval [372, 676]."""
    order = numpy.random.RandomState(0).permutation(67_349)[:1500].tolist()
    assert order[:3] == [43787, 16159, 59015]
    assert order[1000:1002] == [2307, 42285]
    assert numpy.random.RandomState(0).permutation(872)[:2].tolist() == [372, 676]


def test_sst2_dev_does_not_eat_the_training_rows_silently(sst2_files):
    """WSC's trap: 1000 + 500 rows wanted of 554 leave 54 to train on."""
    with pytest.raises(UserError, match=r"rows.*(num_train|num_dev)"):
        SST2(num_train=30, num_dev=45, num_test=5, **sst2_files).load()


def test_sst2_names_the_row_that_is_broken(tmp_path, sst2_files):
    rows = [{"sentence": "fine", "label": 1}, {"text": "no sentence", "label": 1}, {"sentence": "x", "label": 0}]
    bad = file_of(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match=r"bad.jsonl: row 2 has no 'sentence'"):
        SST2(num_train=2, num_dev=1, **(sst2_files | {"train": bad})).load()


@pytest.mark.parametrize("label", ["positive", 2, -1, ""])
def test_sst2_names_a_label_that_is_none(tmp_path, sst2_files, label):
    bad = file_of(tmp_path / "bad.jsonl", [{"sentence": "x", "label": label}, {"sentence": "y", "label": 0}])
    with pytest.raises(UserError, match=r"bad.jsonl: row 1.*label"):
        SST2(num_train=1, num_dev=1, **(sst2_files | {"train": bad})).load()


def test_loading_leaves_the_global_generators_alone(sst2_files):
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    SST2(num_train=30, num_dev=10, **sst2_files).load()
    SST2().balanced({0: [Example("a", (" x",), 0)] * 4, 1: [Example("b", (" x",), 1)] * 4}, (2, 2))
    assert random.getstate() == before[0]
    assert numpy.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


# ------------------------------------------------------------------------------------------------------------- balanced


def pools(sizes) -> dict[int, list[Example]]:
    return {label: [Example(f"{label}-{i}", (" a", " b"), label) for i in range(n)] for label, n in enumerate(sizes)}


@pytest.mark.parametrize("counts", [(10, 4, 6), (7, 5, 3), (1, 1, 1)])
def test_balanced_splits_are_disjoint_exact_and_even(counts):
    splits = SmsSpam(data_seed=1).balanced(pools([20, 15, 12]), counts)
    assert tuple(map(len, splits)) == counts
    prompts = [e.prompt for split in splits for e in split]
    assert len(set(prompts)) == len(prompts)
    for split in splits:
        shares = [sum(e.label == label for e in split) for label in range(3)]
        assert max(shares) - min(shares) <= 1


def test_balanced_splits_depend_on_the_seed_and_nothing_else():
    splits = [SmsSpam(data_seed=seed).balanced(pools([30, 30]), (10, 10)) for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


def test_the_first_splits_do_not_change_with_the_later_ones():
    few, many = (SmsSpam().balanced(pools([30, 30]), (10, count)) for count in (4, 20))
    assert {e.prompt for e in few[0]} == {e.prompt for e in many[0]}


def test_too_few_rows_of_a_label_say_which():
    with pytest.raises(
        UserError, match=r"task=sms_spam has too few rows with label 1: 5 more wanted.*3 left.*num_train"
    ):
        SmsSpam().balanced(pools([30, 3]), (10,))


def test_sms_spam_template():
    example = SmsSpam(max_chars=5).example("hello world", 1)
    assert example == Example("SMS: hello\nIs this SMS spam? Answer:", (" No", " Yes"), 1)


# --------------------------------------------------------------------------------------------------------------- custom


def custom(source: str, **fields) -> Custom:
    given = {
        "train": source,
        "template": "{text} Spam?",
        "words": {"ham": "No", "spam": "Yes"},
        "num_dev": 3,
        "num_test": 4,
    }
    return Custom(**(given | fields))


@pytest.fixture
def own_file(tmp_path) -> str:
    return file_of(tmp_path / "own.jsonl", [{"text": f"m{i}", "label": ("ham", "spam")[i % 2]} for i in range(20)])


def test_custom_cuts_three_disjoint_splits(own_file):
    splits = custom(own_file, num_train=100).load()
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (13, 3, 4)
    prompts = [e.prompt for e in splits.train + splits.dev + splits.test]
    assert sorted(prompts) == sorted(f"m{i} Spam?" for i in range(20))
    example = splits.train[0]
    assert example.options == (" No", " Yes")
    assert example.label == int(example.prompt[1:].split()[0]) % 2
    assert custom(own_file).load().dev == splits.dev
    assert custom(own_file, data_seed=5).load().dev != splits.dev


def test_custom_takes_held_out_rows_from_its_own_file(own_file, tmp_path):
    held = file_of(tmp_path / "held.jsonl", [{"text": f"h{i}", "label": "ham"} for i in range(9)])
    splits = custom(own_file, validation=held).load()
    assert len(splits.test) == 4
    assert all(e.prompt.startswith("h") for e in splits.test)
    assert all(e.prompt.startswith("m") for e in splits.train + splits.dev)


def test_custom_template_does_not_reach_into_values(tmp_path):
    path = file_of(tmp_path / "a.jsonl", [{"text": "{label} {0}", "label": "ham"}] * 9)
    assert {e.prompt for e in custom(path).load().train} == {"{label} {0} Spam?"}


def test_custom_text_that_looks_like_another_column_is_left_alone(tmp_path):
    path = file_of(tmp_path / "a.jsonl", [{"one": "{two}", "two": "x", "label": "ham"}] * 9)
    prompts = {e.prompt for e in custom(path, template="{one}|{two}").load().train}
    assert prompts == {"{two}|x"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": ""}, "there are no rows to train on: set task.train=FILE"),
        ({"template": ""}, "task.template must be the prompt"),
        ({"words": {"ham": "No"}}, "task.words must be a word for each label"),
        ({"words": {"hem": "No", "spam": "Yes"}}, "label 'ham' has no word. Did you mean hem"),
        ({"template": "{txt} Spam?"}, r"own.jsonl:1 has no 'txt' \(its columns: text, label\)"),
        ({"label": "lable"}, r"own.jsonl:1 has no 'lable'.*Did you mean label"),
        ({"num_test": 18}, r"too few rows \(20\) for num_test=18 and num_dev=3"),
    ],
)
def test_custom_says_what_is_wrong(own_file, fields, message):
    with pytest.raises(UserError, match=message):
        custom(own_file, **fields).load()


def test_counts_that_nobody_chose_are_shares_of_a_small_file(tmp_path, caplog):
    path = file_of(tmp_path / "own.jsonl", [{"text": f"m{i}", "label": ("ham", "spam")[i % 2]} for i in range(40)])
    given = {"train": path, "template": "{text} Spam?", "words": {"ham": "No", "spam": "Yes"}}
    splits = Custom(**given).load()
    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [28, 4, 8]
    assert "own.jsonl has only 40 rows, hence task.num_test=8 and task.num_dev=4" in caplog.text
    splits = Custom(**given, num_test=16).load()
    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [20, 4, 16]
    splits = Custom(**given, validation=file_of(tmp_path / "held.jsonl", [{"text": "n", "label": "ham"}])).load()
    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [36, 4, 1]
    assert "task.num_train" not in caplog.text  # nobody asked for a number
    Custom(**given, num_train=200).load()
    assert "task.num_train=200, and 28 rows are there to train on" in caplog.text


def test_a_file_without_a_header_is_told_by_its_columns(tmp_path):
    (tmp_path / "own.csv").write_text("I liked it very much,1\nNot for me,0\n")
    for fields in ({"format": "text_label", "words": {"0": "bad", "1": "good"}}, {"template": "{text}"}, {}):
        with pytest.raises(UserError, match="if these are a row, put a line with the columns' names above it"):
            Custom(train=str(tmp_path / "own.csv"), **fields).load()
    assert "if these are a row" not in listed(["text", "label", "how it went"])


@pytest.mark.parametrize("template", ["{text", "text}", "{text.__class__}", "{text[0]}", "{}"])
def test_custom_refuses_a_template_that_cannot_be_filled(own_file, template):
    with pytest.raises(UserError):
        custom(own_file, template=template).load()
