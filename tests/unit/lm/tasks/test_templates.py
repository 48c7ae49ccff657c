"""Templates, byte for byte: prefix and option of every task as the published protocol writes them, and their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.task_rows import files, rows
from zoft.component import components
from zoft.errors import UserError
from zoft.lm.data.examples import Example
from zoft.lm.data.tokens import OptionCollator, encode, encode_prompts
from zoft.lm.models.load import load_tokenizer

ASSETS = Path(__file__).parents[3] / "assets"
PARAGRAPH = "Nils planted six apple trees. Two of them died in the dry summer."
RACE = "Ada Lind won the race in Oslo.\n- Lind is the first winner from Malmo\n- The race was held in May"


def examples(name: str, folder: Path, **fields: Any) -> list[Example]:
    """The first four rows of a task's file, in the file's order."""
    task = components("task")[name](num_train=2, num_dev=2, **files(name, folder), **fields)
    splits = task.load()
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (2, 2, len(rows(name)) - 4)
    import numpy

    order = numpy.random.RandomState(0).permutation(4).tolist()
    return [(splits.train + splits.dev)[order.index(i)] for i in range(4)]


# (task, row, prefix, options, gold, prompt without the row): prefix | option of the protocol's table, untrimmed
WRITTEN = [
    ("sst2", 0, "a warm and funny film It was", [" terrible", " great"], 1, "It was"),
    ("sst2", 2, "the cast tries hard , the script does not It was", [" terrible", " great"], 0, "It was"),
    (
        "rte",
        0,
        'The "Blue Heron" sank near Aster Bay on Monday.\nDoes this mean that "A ship sank." is true? Yes or No?\n',
        ["Yes", "No"],
        0,
        "",
    ),
    (
        "cb",
        0,
        "Suppose A: I think we left early. B: Did you believe that the train had gone? Can we infer that "
        '"the train had gone"? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
        2,
        "",
    ),
    ("boolq", 0, "The otter is a mammal that lives near water. Is the otter a fish?\n", ["Yes", "No"], 1, ""),
    (
        "boolq",
        1,
        "Mars is bright enough to be seen by eye. Can you see Mars without a telescope?\n",
        ["Yes", "No"],
        0,
        "",
    ),
    (
        "wsc",
        0,
        "Mia thanked Jo because She had helped.\nIn the previous sentence, does the pronoun \"she\" refer to Mia? "
        "Yes or No?\n",
        ["No", "Yes"],
        0,
        "",
    ),
    (
        "wic",
        1,
        'Does the word "run" have the same meaning in these two sentences? Yes, No?\nHe went for a run.\n'
        "A run before breakfast is good.\n",
        ["No", "Yes"],
        1,
        "",
    ),
    (
        "multirc",
        1,
        PARAGRAPH + '\nQuestion: How many trees lived?\nI found this answer ""Six"". Is that correct? Yes or No?\n',
        ["No", "Yes"],
        0,
        "",
    ),
    ("copa", 0, "The lamp went out so ", ["I changed the bulb.", "the Cat slept on."], 0, "so"),
    ("copa", 1, "She was late because ", ["the bus had broken down. ", "she ate an apple."], 0, "because"),
    (
        "record",
        0,
        RACE + "\n-",
        [
            f" The mayor of {name} met Lind, who trains in {name}." for name in ("Ada Lind", "Oslo", "Lind", "Malmo")
        ],
        3,
        "-",
    ),
    (
        "squad",
        0,
        "Title: Heron_Lake\nContext: Heron Lake is 40 m deep and lies in Norland.\nQuestion: How deep is Heron Lake?\n"
        "Answer:",
        [" 40 m\n"],
        0,
        "",
    ),
    (
        "drop",
        1,
        "Passage: Ann has 2 sons, Per and Ivo.\nQuestion: Who are the sons?\nAnswer:",
        [" Per\n"],
        0,
        "",
    ),
    (
        "gsm8k",
        0,
        "Question: A box holds 400 pins. How many do 3 boxes hold?\nAnswer:",
        [" One box holds 400.\n3 * 400 = <<3*400=1200>>1,200\n#### 1,200\n\n"],
        0,
        "",
    ),
    (
        "arc_easy",
        1,
        "Question: What do plants take from the air?\nAnswer:",
        [" carbon dioxide", " sand", " oil"],
        0,
        "Answer:",
    ),
    (
        "arc_challenge",
        0,
        "Question: Which of these is a gas at room temperature?\nAnswer:",
        [" iron", " helium", " salt", " wood"],
        1,
        "Answer:",
    ),
    (
        "winogrande",
        0,
        "The rope was cut with the knife because the ",
        ["rope was sharp.", "knife was sharp."],
        1,
        "",
    ),
    ("winogrande", 2, "", [f"{name} paid Tim, who had mended the roof of Sam." for name in ("Sam", "Tim")], 0, ""),
    (
        "ag_news",
        1,
        "Article: Larks win the cup after extra time.\nTopic:",
        [" World", " Sports", " Business", " Technology"],
        1,
        "Topic:",
    ),
]  # fmt: skip
ids = [f"{name}-{row}" for name, row, *_ in WRITTEN]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(ASSETS / "mezo_trajectory" / "model"), as_mezo=True)


@pytest.mark.parametrize(("name", "row", "prefix", "options", "gold", "domain"), WRITTEN, ids=ids)
def test_prompt_options_and_tokens_are_the_published_ones(
    name, row, prefix, options, gold, domain, tmp_path, tokenizer
):
    example = examples(name, tmp_path)[row]
    assert example.prompt == prefix.strip(" ")
    whole = [(prefix + option).lstrip().strip(" ") for option in options]
    assert [example.prompt + option for option in example.options] == whole
    assert (example.label, example.domain) == (gold, domain)
    (encoded,) = encode([example], tokenizer, 2048)
    assert encoded["sequences"] == [tokenizer(text)["input_ids"] for text in whole]
    before = len(tokenizer(prefix.strip(" "))["input_ids"])
    assert encoded["lengths"] == [len(tokenizer(text.strip(" "))["input_ids"]) - before for text in whole]
    assert encoded["label"] == gold


def test_every_task_that_reads_rows_is_written_out_here_or_for_masked_models():
    named = {name for name, cls in components("task").items() if hasattr(cls, "protocol")}
    assert named == {name for name, *_ in WRITTEN} | {name for name in named if name.startswith("masked_")}


RAW = [
    ("sst2", 0, "a warm and funny film", (" terrible", " great")),
    ("rte", 1, "Mr. Okoro sold his bakery to a chain.\nMr. Okoro bought a chain.", (" Yes", " No")),
    ("wic", 0, "We sat on the bank of the river.\nThe bank lends money.\nbank", (" No", " Yes")),
    ("copa", 1, "She was late\ncause", (" The bus had broken down.", " She ate an apple.")),
    ("record", 2, "Ravi met Lu in Pune.\n@placeholder lies in India.", (" Ravi", " Lu", " Pune")),
    ("squad", 3, "Mara\nMara was born in 1802.\nWhen was Mara born?", (" 1802\n",)),
    ("drop", 0, "The Larks scored 3 goals in May and 5 in June.\nHow many goals in all?", (" 8\n",)),
    ("gsm8k", 1, "Ben had 9 eggs and ate 2. How many are left?", (" 9 - 2 = 7\n#### 7\n\n",)),
    ("arc_easy", 2, "What pulls things down?", (" gravity", " light", " sound", " heat")),
    ("winogrande", 1, "Ines asked Ada for help, for _ knew the way.", (" Ines", " Ada")),
    ("boolq", 1, "Mars is bright enough to be seen by eye.\ncan you see Mars without a telescope?", (" Yes", " No")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "prompt", "options"), RAW, ids=[raw[0] for raw in RAW])
def test_prompt_none_is_raw_text_and_answers_only(name, row, prompt, options, tmp_path):
    example = examples(name, tmp_path, prompt="none")[row]
    assert (example.prompt, example.options, example.domain) == (prompt, options, "")


def test_prompt_head_is_raw_text_with_the_label(tmp_path, tokenizer):
    example = examples("rte", tmp_path, prompt="head")[1]
    assert example == Example("Mr. Okoro sold his bakery to a chain.\nMr. Okoro bought a chain.", (), 1)
    assert encode_prompts([example], tokenizer, 100) == [
        {"input_ids": tokenizer(example.prompt)["input_ids"], "label": 1}
    ]


@pytest.mark.parametrize("name", ["copa", "record", "squad", "arc_easy", "winogrande"])
def test_prompt_head_is_refused_where_every_row_has_answers_of_its_own(name):
    with pytest.raises(UserError, match=rf"{name}.prompt must be one of aligned, none, got 'head'.*differ from row to"):
        components("task")[name](prompt="head")


# ------------------------------------------------------------------------------------------ several right; generated


def test_record_trains_on_its_first_answer_and_counts_any(tmp_path, tokenizer):
    example = examples("record", tmp_path)[1]
    assert (example.label, example.also_right) == (1, (0,))
    assert encode([example], tokenizer, 500)[0]["also_right"] == [0]


def test_a_metric_counts_any_of_several_right_options():
    import torch

    from zoft.lm.objectives.options import Options

    rows = [{"sequences": [[5, 6], [5, 7], [5, 8, 9]], "lengths": [1, 1, 2], "label": 1, "also_right": [2]}]
    rows += [{"sequences": [[5, 6], [5, 7]], "lengths": [1, 1], "label": 0}]
    batch = OptionCollator(pad_token_id=1)(rows)
    assert batch["also_right"].tolist() == [False, True, True, True, False]
    assert OptionCollator(pad_token_id=1)(rows[1:]).keys() == {"input_ids", "attention_mask", "option_tokens", "labels"}

    def loss_and_gold(*log_probs: float) -> tuple[float, list[int]]:
        loss, _, gold = Options().ranked(batch, torch.tensor(log_probs))
        return float(loss), gold.tolist()

    best = (-3.0, -2.0, -1.0, -1.0, -2.0, -1.0)  # of options 0, 1 and 2 (two tokens), then of 0 and 1
    assert loss_and_gold(*best)[1] == [2, 0], "the best option is right and counts"
    assert loss_and_gold(-0.5, *best[1:])[1] == [1, 0], "the best option is wrong: compared with the gold one"
    swapped = {key: value for key, value in batch.items() if key != "also_right"}
    assert loss_and_gold(*best)[0] == float(Options().ranked(swapped, torch.tensor(best))[0]), (
        "the loss goes for the gold one"
    )


def test_generated_answers_keep_room_in_training_and_in_prompts(tmp_path, tokenizer):
    example = examples("squad", tmp_path, max_new_tokens=10, max_length=30)[0]
    assert (example.answers, example.max_new_tokens) == (("40 m", "40 m deep"), 10)
    whole = tokenizer(example.prompt + " 40 m\n")["input_ids"]
    prompt = tokenizer(example.prompt)["input_ids"]
    assert len(prompt) > 20
    (trained,), (asked,) = encode([example], tokenizer, 30), encode_prompts([example], tokenizer, 30)
    assert trained["sequences"] == [[0, *whole[-19:]]]
    assert trained["lengths"] == [len(whole) - len(prompt)]
    assert asked == {"input_ids": [0, *prompt[-19:]], "label": 0, "answers": ["40 m", "40 m deep"]}


@pytest.mark.parametrize(
    ("written", "number"),
    [
        (" 3 * 4 = 12\n#### 12\n\nQ 7", "12"),
        ("so 1,200.50 of them", "1200.5"),
        ("#### $-3.0", "-3"),
        ("none", ""),
        ("#### 100", "100"),
    ],
)
def test_gsm8k_reads_the_number_behind_its_mark_or_the_last(written, number):
    assert components("task")["gsm8k"]().answer_in(written) == number
