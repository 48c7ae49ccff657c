"""Which rows go where: MeZO's sampler and its trap, k rows a label, and what is said of a row that does not fit."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from tests.task_rows import files, files_of, rows
from zoft.component import components
from zoft.config import compose
from zoft.errors import UserError
from zoft.lm import formats
from zoft.lm.tasks import _masked, _rows

SIZES = {  # the protocol's table: pools on the hub, and train / dev / eval that come of it
    "sst2": (67_349, 872, 1000, 500, 872),
    "rte": (2_490, 277, 1000, 500, 277),
    "cb": (250, 56, 150, 100, 56),
    "boolq": (9_427, 3_270, 1000, 500, 1000),
    "wsc": (554, 104, 54, 500, 104),
    "wic": (5_428, 638, 1000, 500, 638),
    "multirc": (27_243, 4_848, 1000, 500, 1000),
    "copa": (400, 100, 300, 100, 100),
    "record": (100_730, 10_000, 1000, 500, 1000),
    "squad": (87_599, 10_570, 1000, 500, 1000),
    "drop": (77_400, 9_535, 1000, 500, 1000),
}
FIRST = {"sst2": [43_787, 16_159, 59_015], "rte": [2_325, 1_450, 1_047], "cb": [225, 122, 92]}


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sources of so many equal rows; a task's examples are their numbers."""

    def task(name: str, train: int, held: int, **fields: Any) -> Any:
        monkeypatch.setattr(_rows, "read_rows", lambda source, split: [{}] * (train if split == "train" else held))
        new_task = components("task")[name](**fields)
        new_task.example = lambda row, source, number: _rows.Example(str(number - 1), (), 0)
        return new_task

    return task


@pytest.mark.parametrize("name", SIZES)
def test_mezos_protocol_takes_the_published_rows(name, numbered, caplog):
    train, held, *sizes = SIZES[name]
    splits = numbered(name, train, held, protocol="mezo").load()
    parts = [[int(e.prompt) for e in part] for part in (splits.train, splits.dev, splits.test)]
    assert list(map(len, parts)) == sizes
    order = numpy.random.RandomState(0).permutation(train).tolist()[: 1000 + sizes[1]]
    assert parts[0] + parts[1] == order
    assert parts[2] == numpy.random.RandomState(0).permutation(held).tolist()[:1000]
    assert parts[0][:3] == FIRST.get(name, parts[0][:3])
    assert ("54 are left to train on" in caplog.text) == (name == "wsc")
    if name != "wsc":
        assert numbered(name, train, held).load() == splits, (
            "the default differs where the published split is a trap only"
        )


def test_the_default_leaves_wsc_most_of_its_rows(numbered, caplog):
    splits = numbered("wsc", 554, 104).load()
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (454, 100, 104)
    assert "100 are chosen by and 454 trained on (as published, task.protocol=mezo: 500 and 54)" in caplog.text


@pytest.mark.parametrize(("protocol", "size"), [("default", 700), ("mezo", 500)])
def test_dev_leaves_something_to_train_on(protocol, size, numbered):
    with pytest.raises(UserError, match=rf"has {size} rows.*train.* on.*task.num_dev"):
        numbered("rte", size, 9, protocol=protocol).load()


def test_what_mezo_trains_on_something_else_is_said_once(caplog):
    formats._note_once.cache_clear()
    classes, examples = components("objective"), [_rows.Example("a", (" b", " c"), 0)]
    for name, protocol, objective in (
        ("copa", "mezo", "cross_entropy"),
        ("copa", "default", "options"),
        ("rte", "mezo", "options"),
    ):
        formats.format_of(components("task")[name](protocol=protocol), examples, classes[objective]())
    assert caplog.text == ""
    for name in ("copa", "record", "copa"):
        task = components("task")[name](protocol="mezo")
        assert formats.format_of(task, examples, classes["options"]()) == "options"
    assert caplog.text.count("task.protocol=mezo: MeZO trains task=copa on the text of the right choice") == 1
    assert caplog.text.count("objective=cross_entropy, and this run has objective=options") == 2


def test_demonstrations_are_drawn_anew_for_every_row(numbered):
    sets = numbered("rte", 2_490, 277).demonstrations(3)
    seeds = numpy.random.RandomState(0).randint(0, 10_000, 3)
    for seed, shown in zip(seeds, sets, strict=True):
        assert [int(e.prompt) for e in shown] == numpy.random.RandomState(seed).permutation(2_490)[:32].tolist()


@pytest.mark.parametrize("fields", [{"protocol": "mezzo"}, {"prompt": "raw"}, {"data_seed": 2**32}])
def test_settings_that_mean_nothing_are_refused(fields):
    with pytest.raises(UserError, match=rf"rte.{next(iter(fields))} must be"):
        components("task")["rte"](**fields)


def test_held_out_rows_are_not_those_trained_on(tmp_path):
    path = files("rte", tmp_path)["train"]
    with pytest.raises(UserError, match=r"rte.validation must be another file than train"):
        components("task")["rte"](train=path, validation=path)


# ---------------------------------------------------------------------------------------------------- k rows of a label


@pytest.mark.parametrize(("seed", "k"), [(13, 3), (87, 5)])
def test_masked_tasks_take_k_rows_of_each_label_as_published(monkeypatch, seed, k):
    pool = [{"sentence": str(i), "label": int(i % 7 < 3)} for i in range(60)]
    held = [{"sentence": f"h{i}", "label": 0} for i in range(30)]
    monkeypatch.setattr(_rows, "read_rows", lambda source, split: pool if split == "train" else held)
    splits = components("task")["masked_sst2"](num_train=k, num_dev=k, num_test=20, data_seed=seed).load()
    shuffled = list(pool)
    numpy.random.RandomState(seed).shuffle(shuffled)  # the published script shuffles the lines of the file
    groups: dict[int, list[str]] = {}
    for row in shuffled:
        groups.setdefault(row["label"], []).append(row["sentence"])
    first = lambda part: [e.pieces[0].text for e in part]  # noqa: E731
    assert first(splits.train) == [s for group in groups.values() for s in group[:k]]
    assert first(splits.dev) == [s for group in groups.values() for s in group[k : 2 * k]]
    drawn = list(held)
    numpy.random.RandomState(42).shuffle(drawn)
    assert first(splits.test) == [row["sentence"] for row in drawn[:20]]
    whole = components("task")["masked_sst2"](num_train=k, num_dev=k, num_test=30).load()
    assert first(whole.test) == [row["sentence"] for row in held], "as many as wanted stay in the file's order"


def test_masked_tasks_refuse_a_label_with_too_few_rows_or_say_so(tmp_path, caplog):
    given = files("masked_rte", tmp_path)
    task = components("task")["masked_rte"]
    with pytest.raises(UserError, match=r"has 2 rows labelled entailment, 2 \+ 1 are wanted: lower task.num_train"):
        task(num_train=2, num_dev=1, **given).load()
    splits = task(num_train=1, num_dev=2, protocol="mezo", **given).load()
    assert (len(splits.train), len(splits.dev)) == (2, 2)
    assert "2 rows labelled not_entailment" in caplog.text
    with pytest.raises(UserError, match="no demonstrations"):
        task(**given).demonstrations(1)


def test_snli_leaves_out_rows_without_a_label(tmp_path):
    splits = components("task")["masked_snli"](
        num_train=1, num_dev=1, **files_of(tmp_path, *2 * [rows("masked_snli")])
    ).load()
    assert (len(splits.train), len(splits.test)) == (3, 6)


# ------------------------------------------------------------------------------------------------ rows that do not fit

BROKEN = [
    ("rte", {"premise": None}, "has no 'premise'"),
    ("rte", {"hypothesis": 5}, "hypothesis must be text, got 5"),
    ("rte", {"label": 2}, r"label must be one of 0 \(entailment\), 1 \(not_entailment\), got 2"),
    ("cb", {"label": "neutral"}, r"label must be one of 0 \(entailment\).*got 'neutral'"),
    ("wic", {"label": -1}, "label must be one of"),
    ("boolq", {"answer": "maybe"}, "answer must be true or false, got 'maybe'"),
    ("copa", {"question": "why"}, "question must be effect or cause, got 'why'"),
    ("record", {"answers": ["Rome"]}, "the answer 'Rome' is none of its entities"),
    ("record", {"entities": []}, r"entities must be a list of one text or more, got \[\]"),
    ("squad", {"answers": {"text": []}}, r"answers.text must be a list of one text or more, got \[\]"),
    ("squad", {"answers": "40 m"}, "answers.text must be a list of one text or more"),
    ("drop", {"answers_spans": {"spans": [8]}}, "answers_spans.spans must be a list"),
    ("gsm8k", {"answer": "twelve"}, "answer must end in '#### number', got 'twelve'"),
    ("arc_easy", {"answerKey": "E"}, "answerKey must be one of A, B, C, D"),
    ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}, "one for each of 2 answers"),
    ("winogrande", {"sentence": "no blank"}, r"sentence has no blank \(_\)"),
    ("winogrande", {"answer": ""}, "answer must be 1 or 2, got ''"),
    ("ag_news", {"label": "World"}, r"label must be one of 0 \(World\)"),
    ("masked_trec", {"label_coarse_original": "DESK"}, r"original must be one of 0 \(DESC\).*Did you mean DESC"),
    ("masked_mnli", {"label": -1}, r"label must be one of 0 \(entailment\)"),
    ("masked_sst5", {"text": ["x"]}, r"text must be text, got \['x'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BROKEN, ids=[f"{b[0]}-{next(iter(b[1]))}" for b in BROKEN])
def test_a_row_that_does_not_fit_is_named(name, change, message, tmp_path):
    content = [dict(rows(name)[i] | (change if i == 0 else {})) for i in range(len(rows(name)))]
    given = files_of(tmp_path, content, content)
    task = components("task")[name](num_train=1, num_dev=1, **given)
    numbered = task.rows(given["train"], "train")
    with pytest.raises(UserError, match=rf"train.jsonl: row 1.*{message}"):
        task.example(numbered[0][1], given["train"], numbered[0][0])


@pytest.mark.parametrize(("answer", "gold"), [(True, 0), ("False", 1), (1, 0), ("0", 1)])
def test_boolq_reads_truth_as_files_write_it(answer, gold):
    row = rows("boolq")[0] | {"answer": answer}
    assert components("task")["boolq"]().example(row, "f", 1).label == gold


def test_superglues_own_booleans_are_labels_where_the_labels_are_truths():
    row = rows("wic")[0] | {"label": True}
    assert components("task")["wic"]().example(row, "f", 1).label == 1
    with pytest.raises(UserError, match="got True"):
        components("task")["rte"]().example(rows("rte")[0] | {"label": True}, "f", 1)


# ----------------------------------------------------------------------------------------------------- from the command


ANSWERS = {
    "rte": ["Yes", "No"],
    "record": sorted({word for row in rows("record") for entity in row["entities"] for word in entity.split()}),
}
"""The words that tell a row's answers apart."""


@pytest.mark.parametrize("name", ANSWERS)
def test_a_task_trains_end_to_end_from_local_files(name, tmp_path):
    from tests.runs import model_folder
    from zoft.run.train import run

    model_folder(tmp_path / "model", ANSWERS[name], max_position_embeddings=512)
    given = [f"task.{split}={path}" for split, path in files(name, tmp_path).items()]
    words = [f"task={name}", "task.num_train=2", "task.num_dev=2", "budget.queries=4", f"output_dir={tmp_path / 'out'}"]
    objective = "objective=cross_entropy" if name == "record" else "objective=options"
    facts = run(compose([f"model.name={tmp_path / 'model'}", *words, *given, objective]))
    assert facts["num_queries"] == 4
    assert facts["num_eval_rows"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["task=squad", "objective=options"],
            "task=squad has answers that the model writes, and objective=options is computed from",
        ),
        (
            ["task=masked_trec", "objective=options"],
            "task=masked_trec has a word at a mask.*set objective=label_words or metric",
        ),
        (["task=rte", "task.prompt=head", "objective=options"], "classes for a head.*set objective=classes or metric"),
        (["task=sms_spam", "task.prompt=head", "objective=options"], "classes for a head"),
        (["task=squad", "objective=reward"], "needs objective.function"),
    ],
)
def test_an_objective_that_does_not_fit_is_refused_before_anything_is_read(arguments, message, tmp_path):
    from zoft.run.train import run

    with pytest.raises(UserError, match=message):
        run(compose([*arguments, f"output_dir={tmp_path / 'out'}"]))
    assert not (tmp_path / "out").exists()


def test_the_seed_of_the_held_out_rows_is_the_published_one():
    assert _masked.TEST_SEED == 42
