"""Instruction data as its users mean it: Alpaca, Dolly, ShareGPT, OpenAI chats, UltraFeedback, HH; nothing dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import model_folder
from zoft.cli import main
from zoft.errors import UserError
from zoft.lm.data.examples import Chat, Completion, PreferencePair, Rated
from zoft.lm.tasks.custom import Custom

ASK, YO, NO = (
    {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yo"), ("assistant", "no"))
)
BRIEF = {"role": "system", "content": "be brief"}


def first(folder: Path, row: dict[str, Any], **fields: Any) -> Any:
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    return Custom(train=str(path), num_dev=2, num_test=2, num_train=4, **fields).load().train[0]


def alpaca(instruction: str, about: str = "") -> str:
    what = (
        "that describes a task, paired with an input that provides further context"
        if about
        else "that describes a task"
    )
    given = f"### Input:\n{about}\n\n" if about else ""
    head = f"Below is an instruction {what}. Write a response that appropriately completes the request.\n\n"
    return f"{head}### Instruction:\n{instruction}\n\n{given}### Response:\n"


BILL = "Name the department for this message."
COMPLETIONS = {
    "Alpaca": (
        {"instruction": BILL, "input": "I paid twice.", "output": "billing"},
        (alpaca(BILL, "I paid twice."), "billing"),
    ),
    "Alpaca without input": ({"instruction": BILL, "input": "", "output": "billing"}, (alpaca(BILL), "billing")),
    "Alpaca, input is null": ({"instruction": BILL, "input": None, "output": "billing"}, (alpaca(BILL), "billing")),
    "Alpaca, no input at all": ({"instruction": BILL, "output": "billing"}, (alpaca(BILL), "billing")),
    "Alpaca, with a system text": (
        {"system": "Be brief.", "instruction": BILL, "input": "", "output": "billing"},
        (f"Be brief.\n\n{alpaca(BILL)}", "billing"),
    ),
    "Dolly": (
        {"instruction": BILL, "context": "I paid twice.", "response": "billing", "category": "closed_qa"},
        (alpaca(BILL, "I paid twice."), "billing"),
    ),
    "question and answer": ({"question": "2 + 2?", "answer": "4"}, ("Question: 2 + 2?\nAnswer:", " 4")),
    "question about a context": (
        {"context": "A sum.", "question": "2 + 2?", "answer": "4", "id": "a b c"},
        ("A sum.\nQuestion: 2 + 2?\nAnswer:", " 4"),
    ),
    "OpenOrca": (
        {"id": "flan.1", "system_prompt": "Be brief.", "question": "2 + 2?", "response": "4"},
        ("Be brief.\n\nQuestion: 2 + 2?\nAnswer:", " 4"),
    ),
    "prompt and completion stand as they are": ({"prompt": "2 + 2 =", "completion": " 4"}, ("2 + 2 =", " 4")),
}


@pytest.mark.parametrize("name", COMPLETIONS)
@pytest.mark.parametrize("format", ["auto", "completion"])
def test_fault_7_completions(tmp_path, caplog, name, format):
    row, wanted = COMPLETIONS[name]
    example = first(tmp_path, row, format=format)
    assert isinstance(example, Completion)
    assert (example.prompt, example.completion) == wanted
    assert "NOT READ" not in caplog.text
    assert "nothing stands between" not in caplog.text


CHATS = {
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}],
        "system": "be brief",
    },
    "ShareGPT, its system message among the turns": {
        "conversations": [
            {"from": who, "value": text} for who, text in (("system", "be brief"), ("human", "hi"), ("gpt", "yo"))
        ]
    },
    "OpenAI": {"messages": [BRIEF, ASK, YO]},
    "OpenAI, in parts": {
        "messages": [
            {"role": "developer", "content": "be brief"},
            ASK | {"content": [{"type": "text", "text": "hi"}]},
            YO,
        ]
    },
    "UltraChat": {"prompt": "hi", "prompt_id": "0a 1b 2c", "messages": [BRIEF, ASK, YO], "category": "Chat"},
}


@pytest.mark.parametrize("name", CHATS)
def test_fault_7_chats(tmp_path, caplog, name):
    example = first(tmp_path, CHATS[name])
    assert isinstance(example, Chat)
    assert list(example.messages) == [BRIEF, ASK, YO]
    assert "NOT READ" not in caplog.text


def test_fault_7_two_system_messages_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"own.jsonl:1: the row's system message 'be long' is not the chat's own"):
        first(tmp_path, {"messages": [BRIEF, ASK, YO], "system": "be long"})
    assert list(first(tmp_path, {"messages": [BRIEF, ASK, YO], "system": "be brief"}).messages) == [BRIEF, ASK, YO]
    assert list(first(tmp_path, {"messages": [ASK, YO], "system": ""}).messages) == [ASK, YO]


PAIRS: dict[str, tuple[dict[str, Any], Any]] = {
    "UltraFeedback": (
        {
            "prompt": "hi",
            "prompt_id": "0a 1b 2c",
            "chosen": [ASK, YO],
            "rejected": [ASK, NO],
            "messages": [ASK, YO],
            "score_chosen": 8.5,
            "score_rejected": 7.0,
        },
        ([ASK, YO], [ASK, NO]),
    ),
    "UltraFeedback, with a system message": (
        {"system": "be brief", "prompt": "hi", "chosen": [ASK, YO], "rejected": [ASK, NO]},
        ([BRIEF, ASK, YO], [BRIEF, ASK, NO]),
    ),
    "HH": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant: Gladly.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant: Go away.",
        },
        (("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant:", " Gladly."), (None, " Go away.")),
    ),
    "HH, parted early": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Go\n\nHuman: A",
        },
        (("\n\nHuman: Hi\n\nAssistant:", " Hello\n\nHuman: A"), (None, " Go\n\nHuman: A")),
    ),
    "full HH": (
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Hello", "chosen": " Hello", "rejected": " Go"},
        (("\n\nHuman: Hi\n\nAssistant:", " Hello"), (None, " Go")),
    ),
    "Orca pairs": (
        {"system": "Be brief.", "question": "2 + 2?", "chosen": "4", "rejected": "5"},
        (("Be brief.\n\nQuestion: 2 + 2?\nAnswer:", " 4"), (None, " 5")),
    ),
    "Argilla": (
        {"instruction": BILL, "chosen_response": "billing", "rejected_response": "sales", "chosen_model": "m"},
        ((alpaca(BILL), "billing"), (None, "sales")),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_fault_7_preferences(tmp_path, caplog, name):
    row, (better, worse) = PAIRS[name]
    example = first(tmp_path, row)
    assert isinstance(example, PreferencePair)
    if isinstance(example.chosen, Chat):
        assert isinstance(example.rejected, Chat)
        assert (list(example.chosen.messages), list(example.rejected.messages)) == (better, worse)
    else:
        assert isinstance(example.rejected, Completion)
        assert (example.chosen.prompt, example.chosen.completion) == better
        assert (example.rejected.prompt, example.rejected.completion) == (better[0], worse[1])
    assert "NOT READ" not in caplog.text


@pytest.mark.parametrize(
    ("row", "reward"),
    [({"prompt": "Make 24"}, None), ({"question": "Make 24"}, None), ({"prompt": "Make 24", "reward": 24}, 24)],
)
def test_fault_14_a_reward_needs_no_column_of_its_own(tmp_path, row, reward):
    for format in ("auto", "reward"):
        example = first(tmp_path, row, format=format)
        assert isinstance(example, Rated)
        assert example.reward == reward
    judged = first(tmp_path, {"prompt": "Make 24", "answer": "8 * 3"}, format="reward")
    assert (judged.prompt, judged.reward) == ("Make 24", "8 * 3")


UNREAD = [
    ({"prompt": "Say ", "completion": "hi", "context": "It is late at night."}, "context"),
    ({"prompt": "Say ", "completion": "hi", "input": "x"}, "input"),
    ({"instruction": "Say", "output": "hi", "history": [["a", "b"]]}, "history"),
    ({"messages": [ASK, YO], "tools": [{"name": "search", "description": "looks a word up"}]}, "tools"),
    ({"question": "q?", "choices": ["x", "y"], "answer": 1, "passage": "Once upon a time"}, "passage"),
    ({"prompt": "Say ", "chosen": "hi", "rejected": "ho", "remark": "the first one is kinder"}, "remark"),
    ({"prompt": "Say ", "completion": "hi", "notes": "\u4e00" * 30}, "notes"),
]


@pytest.mark.parametrize(("row", "name"), UNREAD, ids=[name for _, name in UNREAD])
def test_fault_7_content_that_is_not_read_is_noted_aloud(tmp_path, caplog, row, name):
    first(tmp_path, row)
    assert f"NOT READ: the column '{name}', which looks like content (" in caplog.text
    assert caplog.text.count("NOT READ") == 1


def test_fault_7_content_that_a_later_row_brings(tmp_path, caplog):
    rows = [{"prompt": f"Say {i} ", "completion": "hi"} for i in range(8)]
    rows[5]["background"] = "It is late at night."
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Custom(train=str(path), num_dev=2, num_test=2, num_train=4).load()
    assert "NOT READ: the column 'background'" in caplog.text
    assert "own.jsonl:6" in caplog.text


def test_fault_7_ids_sources_and_what_is_read_anyway_are_no_content(tmp_path, caplog):
    row = {
        "prompt": "Say it to me ",
        "completion": "hi",
        "id": "a b c d",
        "category": "small talk in the evening",
        "score": 3,
    }
    first(tmp_path, row | {"text": "Say it to me hi", "url": "a b c"}, format="completion")
    assert "NOT READ" not in caplog.text


def test_fault_7_an_answer_that_is_glued_on_is_noted(tmp_path, caplog):
    first(tmp_path, {"prompt": BILL, "completion": "billing"})
    assert "nothing stands between prompt and completion: the model reads 'nt for this message.billing'" in caplog.text
    caplog.clear()
    for row in ({"prompt": f"{BILL}\n", "completion": "billing"}, {"prompt": BILL, "completion": " billing"}):
        first(tmp_path, row)
    assert "nothing stands" not in caplog.text


@pytest.mark.parametrize("verb", ["train", "data show"])
def test_fault_7_train_and_data_show_both_say_it(tmp_path, capsys, verb):
    rows = [{"instruction": f"free {i}", "output": "yes", "history": ["win a prize now"]} for i in range(16)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"model.name={model_folder(tmp_path / 'model')}", "task=custom", f"task.train={tmp_path / 'own.jsonl'}"]
    words += ["config=quickstart", "objective=cross_entropy", "task.num_train=8", "task.num_dev=4", "task.num_test=4"]
    words += ["method=mezo", "estimator=central", "budget.queries=8", "trainer.per_device_train_batch_size=2"]
    assert main([*verb.split(), *words, f"output_dir={tmp_path / 'out'}"]) == 0
    out, err = capsys.readouterr()
    assert "NOT READ: the column 'history'" in (err if verb == "train" else out)
