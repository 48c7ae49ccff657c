"""`zoft train` on every form of rows: what is reported, and the sentence where objective, task and model do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.runs import WORDS, model_folder, tiny_tokenizer
from tests.task_rows import files
from zoft.config import compose
from zoft.errors import UserError
from zoft.run.build import arguments_of, load, make_trainer
from zoft.run.train import run
from zoft.weights.tensors import Weights

SUM = [{"prompt": f"call you {WORDS[k % 8]}", "reward": 3 + k % 2} for k in range(12)]
PAIRS = [{"prompt": "is it", "chosen": f" yes {WORDS[k]}", "rejected": " no"} for k in range(12)]
TEXTS = [{"prompt": f"is it {WORDS[k]}", "completion": " yes"} for k in range(12)]


def masked_tokenizer() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<mask>", "<unk>", "terrible", "great", "It", "was", ".", "film", "a"]
    tokenizer = Tokenizer(kinds.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model, a masked one, and the files of the user's own tasks."""
    root = tmp_path_factory.mktemp("forms")
    model_folder(root / "causal", max_position_embeddings=512)
    models.tiny_roberta_mlm(max_position_embeddings=130).save_pretrained(root / "masked")
    masked_tokenizer().save_pretrained(root / "masked")
    models.tiny_bert_classifier().save_pretrained(root / "classifier")
    tiny_tokenizer().save_pretrained(root / "classifier")
    for name, rows in (("rated", SUM), ("pairs", PAIRS), ("texts", TEXTS)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def words(folder: Path, task: str, model: str = "causal") -> list[str]:
    """The arguments of a run of two steps."""
    small = [
        "method=null",
        "budget.queries=4",
        "trainer.eval_steps=2",
        "trainer.per_device_train_batch_size=2",
        "task.num_dev=2",
    ]
    if (folder / f"{task}.jsonl").exists():
        custom_words = ["task=custom", f"task.train={folder / f'{task}.jsonl'}", "task.num_test=2", "task.num_train=4"]
        return [f"model.name={folder / model}", *custom_words, *small]
    (folder / task).mkdir(exist_ok=True)
    given = [f"task.{split}={path}" for split, path in files(task, folder / task).items()]
    small[-1:] = ["task.num_dev=1", "task.num_train=1"] if task.startswith("masked") else ["task.num_dev=2"]
    return [f"model.name={folder / model}", f"task={task}", "task.num_train=2", *given, *small]


WHOLE = ("objective=reward", "objective=preference")
REWARD = ["objective=reward", "objective.function=zoft.lm.rewards:countdown"]
SAMPLED = ["objective.temperature=1", "objective.max_new_tokens=2"]
SETTINGS = ["objective.settings={metric: {metric: exact_match, max_new_tokens: 2}}"]
RUNS = [
    ("squad", "causal", ["objective=cross_entropy", "task.max_new_tokens=3", "peft=lora"], "f1"),
    ("squad", "causal", ["objective=metric", "task.max_new_tokens=2", "trainable=last_blocks"], "f1"),
    ("masked_sst2", "masked", ["objective=label_words", "peft=lora"], "accuracy"),
    ("sst2", "causal", ["objective=classes", "task.prompt=head"], "accuracy"),
    ("pairs", "causal", ["objective=preference", "trainable=last_blocks"], "accuracy"),
    ("rated", "causal", [*REWARD, *SAMPLED], "reward"),
    ("texts", "causal", ["objective=expression", "objective.formula=metric", *SETTINGS], "exact_match"),
]


@pytest.mark.parametrize(("task", "model", "more", "metric"), RUNS, ids=[f"{r[0]}-{r[2][0]}-{r[3]}" for r in RUNS])
def test_every_form_trains(folder: Path, tmp_path: Path, task: str, model: str, more: list[str], metric: str):
    cfg = compose([*words(folder, task, model), *more, f"output_dir={tmp_path / 'out'}"])
    if more[0] in WHOLE:
        facts = run(cfg)
        assert (facts["metric"], facts["num_queries"]) == (metric, 4)
        assert (tmp_path / "out" / "curve.png").is_file()
        return
    loaded, tokenizer, rows = load(cfg)  # without the report and its picture, which take most of a run's time
    trainer = make_trainer(cfg, arguments_of(cfg), loaded, tokenizer, rows)
    before = Weights(trainer.model).digest()
    trainer.train()
    assert trainer.progress.num_queries == 4
    assert f"test_{metric}" in trainer.predict(rows["test"], metric_key_prefix="test").metrics
    if not more[0].endswith(("metric", "expression")):  # of so few rows these may stay the same
        assert Weights(trainer.model).digest() != before


@pytest.mark.parametrize(
    ("task", "model", "more", "message"),
    [
        ("masked_sst2", "causal", ["objective=label_words"], "a masked task needs a masked language model and its tok"),
        ("squad", "masked", ["objective=cross_entropy"], "is a RobertaForMaskedLM, no causal language model"),
        (
            "sst2",
            "classifier",
            ["task.prompt=head", "objective=classes"],
            "has a head for 3 classes, and the task has 2",
        ),
        (
            "pairs",
            "causal",
            ["objective=options"],
            "task=custom has preference pairs, and objective=options.*set objective=preference",
        ),
        ("rated", "causal", ["objective=cross_entropy"], "has prompts with what a reward judges by.*objective=reward"),
        ("squad", "causal", ["objective=metric", "objective.max_new_tokens=60"], "raise task.max_new_tokens"),
        (
            "rated",
            "causal",
            [*REWARD, "task.max_length=64"],
            "leaves no room for a prompt in front of a text of 64 tok",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, task: str, model: str, more: list[str], message: str
):
    with pytest.raises(UserError, match=message):
        run(compose([*words(folder, task, model), *more, f"output_dir={tmp_path / 'out'}"]))
    assert not (tmp_path / "out").exists()
