"""Two sources of one setting: a model's and its tokenizer's special tokens, sizes, padding and classes are one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.runs import WORDS, data_file, tiny_tokenizer
from zoft.cli import main
from zoft.config import compose
from zoft.errors import UserError
from zoft.evaluation.evaluate import Request, evaluate
from zoft.lm.models.agreement import require_rows_fit
from zoft.lm.models.load import load_model_as, load_tokenizer
from zoft.run.train import run


def folder(place: Path, *, classifier: bool = True, tokenizer: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A tiny model and tokenizer that need not go together."""
    if classifier:
        import transformers

        base = models.tiny_llama(**fields)
        config = transformers.LlamaConfig(**base.config.to_dict() | {"num_labels": 2} | fields)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.LlamaForSequenceClassification(config).eval()
        with torch.no_grad():  # decisions that depend on which token is read
            model.score.weight.mul_(50)
        model.save_pretrained(place)
    else:
        models.tiny_llama(**fields).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    if tokenizer:
        edit(place / "tokenizer_config.json", **tokenizer)
    return place


def loaded(kind: str, place: str, **more: Any) -> Any:
    return load_model_as(kind, place, tokenizer=load_tokenizer(place), **more)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def head(model: Path, data: Path, *more: str) -> list[str]:
    words = ["config=quickstart", f"model.name={model}", "task=custom", f"task.train={data}", "task.prompt=head"]
    words += ["task.num_train=24", "task.num_dev=8", "task.num_test=16", "objective=classes", "method=mezo"]
    return [*words, "estimator=central", "estimator.num_directions=1", *more]


@pytest.mark.parametrize("pad", [0, 2, None])
def test_fault_1_a_classifier_decides_the_same_at_every_batch_size(tmp_path, pad):
    model, data = folder(tmp_path / "model", pad_token_id=pad), data_file(tmp_path / "data.jsonl")
    results = []
    for size in (1, 3, 16):
        cfg = compose(head(model, data, f"trainer.per_device_eval_batch_size={size}"))
        facts = evaluate(cfg, Request(output_dir=str(tmp_path / f"eval{size}")))
        lines = (tmp_path / f"eval{size}" / "predictions.jsonl").read_text().splitlines()
        results.append((facts["accuracy"], [json.loads(line)["chosen"] for line in lines]))
    assert results[0] == results[1] == results[2]
    assert len(set(results[0][1])) == 2  # a classifier that says the same of every row would prove nothing


@pytest.mark.parametrize("pad", [0, 2, None])
def test_fault_1_a_step_of_nothing_changes_no_metric(tmp_path, pad):
    model, data = folder(tmp_path / "model", pad_token_id=pad), data_file(tmp_path / "data.jsonl")
    more = ["optimizer.learning_rate=1e-30", "budget.queries=4", "trainer.per_device_train_batch_size=4"]
    facts = run(compose(head(model, data, *more, f"output_dir={tmp_path / 'run'}")))
    assert facts["zero_shot"] == facts["final"]
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["pad_token_id"] == tiny_tokenizer().pad_token_id


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_fault_1_every_special_token_is_the_tokenizers(tmp_path, kind):
    place = folder(tmp_path, classifier=kind == "classifier", pad_token_id=9, bos_token_id=8, eos_token_id=7)
    if kind == "causal":
        (tmp_path / "generation_config.json").write_text(
            '{"pad_token_id": 9, "bos_token_id": 8, "eos_token_id": [7, 6]}'
        )
    model: Any = loaded(kind, str(place))
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (1, 0, 2)
    if kind == "causal":
        assert model.generation_config.pad_token_id == 1
        assert set(model.generation_config.eos_token_id) == {2, 7, 6}  # a turn's end of the model's own stays one


def test_fault_1_a_text_ends_where_either_of_them_says(tmp_path):
    from zoft.lm.models.generate import Answering, write

    place = folder(tmp_path, classifier=False)
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(3, 64))}))
    model, tokenizer = loaded("causal", str(place)), load_tokenizer(str(place))
    assert [len(text) for text in write(model, [[4, 5]], Answering(tokenizer, 8)).texts] == [0]


def test_fault_1_the_trainer_aligns_before_its_first_evaluation(tmp_path):
    import transformers

    from zoft import ZOConfig, ZOTrainer
    from zoft.lm.data.masked import RightPaddedCollator

    place = folder(tmp_path / "model", pad_token_id=0)
    model = transformers.LlamaForSequenceClassification.from_pretrained(place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    rows = [{"input_ids": [4 + k % 7] * (1 + k % 5), "label": k % 2} for k in range(12)]
    args = ZOConfig(output_dir=str(tmp_path / "out"), max_steps=1, learning_rate=1e-30, report_to=[])
    args.per_device_eval_batch_size = 12
    trainer = ZOTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=RightPaddedCollator(1),
        processing_class=tokenizer,
        objective="classes",
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == before


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_fault_1_a_padding_token_that_the_embeddings_lack_is_a_sentence(tmp_path, capsys, kind):
    size = len(WORDS) + 4
    place, data = (
        folder(tmp_path / "model", classifier=kind == "classifier", vocab_size=size),
        data_file(tmp_path / "d.jsonl"),
    )
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(place)
    words = (
        head(place, data)
        if kind == "classifier"
        else [
            *head(place, data)[:4],
            *head(place, data)[5:8],
            "task.template='{text} is it spam'",
            "task.words={ham: 'no', spam: 'yes'}",
        ]
    )
    for verb in ("train", "eval"):
        assert main([verb, *words, f"output_dir={tmp_path / 'out'}"]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"its tokenizer pads with '[PAD]' (token {size}), and the model has embeddings for {size} tokens" in said
    assert not (tmp_path / "out").exists()


def test_fault_1_rows_with_tokens_that_the_embeddings_lack(tmp_path):
    size = len(WORDS)  # the last four words are not known
    place, data = folder(tmp_path / "model", vocab_size=size), data_file(tmp_path / "data.jsonl")
    with data.open("a") as file:
        file.write('{"text": "call you", "label": "ham"}\n' * 40)
    with pytest.raises(
        UserError, match=r"the rows hold 'you' \(token 18\), and the model has embeddings for 15 tokens"
    ):
        run(compose(head(place, data, f"output_dir={tmp_path / 'run'}")))
    with pytest.raises(UserError, match=r"the rows hold 'you' \(token 18\)"):
        evaluate(compose(head(place, data)), Request(output_dir=str(tmp_path / "eval")))


def test_fault_1_rows_of_every_form_are_looked_at():
    model, tokenizer = models.tiny_llama(), tiny_tokenizer()
    for row in (
        {"input_ids": [99]},
        {"sequences": [[1], [99]], "input_ids": [1]},
        {"prompt_ids": [99]},
        {"input_ids": [1], "word_ids": [4, 99]},
        {"chosen": {"input_ids": [1]}, "rejected": {"input_ids": [99]}},
    ):
        with pytest.raises(UserError, match="token 99"):
            require_rows_fit(model, [row], tokenizer, "m")
    require_rows_fit(model, [{"input_ids": [63] * 1000}], tokenizer, "m")  # rotary positions have no last one


@pytest.mark.parametrize(("make", "room"), [("opt", 64), ("gpt2", 64), ("bert", 64), ("roberta", 64)])
def test_fault_1_rows_longer_than_the_positions_are_a_sentence(make, room):
    model = models.EVERY[make]()
    require_rows_fit(model, [{"input_ids": [5] * room}], tiny_tokenizer(), "m")
    with torch.no_grad():
        ids = torch.full((1, room), 5)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(UserError, match=rf"has positions for {room} tokens, and the longest row has {room + 1}"):
        require_rows_fit(model, [{"input_ids": [5] * (room + 1)}], tiny_tokenizer(), "m")


def test_fault_1_positions_counted_from_another_padding_token_are_refused(tmp_path):
    models.tiny_roberta_mlm(pad_token_id=5).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"counts positions from its padding token, 5 by config.json, and its tokenizer"
    ):
        loaded("masked", str(tmp_path))
    models.tiny_roberta_mlm().save_pretrained(tmp_path)
    loaded("masked", str(tmp_path))


def test_fault_1_a_tokenizer_that_cannot_pad_is_a_sentence(tmp_path):
    place = folder(tmp_path, classifier=False)
    edit(place / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(UserError, match="neither a padding token nor one that ends a text"):
        load_tokenizer(str(place))


# -------------------------------------------------------------------------------------------------------------- classes


def test_fault_1_two_numbers_of_classes_in_one_config(tmp_path):
    place = folder(tmp_path, id2label={0: "ham", 1: "spam"}, label2id={"ham": 0, "spam": 1})
    edit(place / "config.json", num_labels=3)
    with pytest.raises(UserError, match=r"config.json says num_labels=3 and names 2 classes"):
        loaded("classifier", str(place), num_labels=2)


def test_fault_1_classes_in_another_order_are_refused(tmp_path, caplog):
    place, data = (
        folder(tmp_path / "model", id2label={0: "Spam", 1: "ham"}, label2id={"Spam": 0, "ham": 1}),
        data_file(tmp_path / "data.jsonl"),
    )
    with pytest.raises(
        UserError, match=r"has the classes 0=Spam, 1=ham, and the task has 0=ham, 1=spam: give the task's"
    ):
        evaluate(compose(head(place, data)), Request(output_dir=str(tmp_path / "eval")))
    cfg = compose(head(place, data, "task.words={spam: yes, ham: no}"))
    assert evaluate(cfg, Request(output_dir=str(tmp_path / "eval")))["num_rows"] == 16
    assert "calls its classes" not in caplog.text
    loaded("classifier", str(place), labels=("good", "bad"))
    assert "calls its classes 0=Spam, 1=ham; to the task they are 0=good, 1=bad" in caplog.text


def test_fault_1_a_fresh_head_carries_the_names_of_its_classes(tmp_path):
    place, data = folder(tmp_path / "model", classifier=False), data_file(tmp_path / "data.jsonl")
    more = ["budget.queries=2", "trainer.per_device_train_batch_size=4"]
    run(compose(head(place, data, *more, f"output_dir={tmp_path / 'run'}")))
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "ham", "1": "spam"}
    with pytest.raises(UserError, match="give the task's words in the model's order"):
        loaded("classifier", str(tmp_path / "run" / "model"), labels=("spam", "ham"))


def test_fault_1_two_chat_templates_are_noted(tmp_path, caplog):
    place = folder(tmp_path, classifier=False)
    (place / "chat_template.jinja").write_text("{{ messages[0].content }}")
    edit(place / "tokenizer_config.json", chat_template="{{ messages[-1].content }}")
    load_tokenizer(str(place))
    assert (
        "chat_template.jinja is the chat template that is read; tokenizer_config.json beside it has another"
        in caplog.text
    )


# ------------------------------------------------------------------------------------------------------------- adapters


def test_fault_13_an_adapter_knows_where_its_model_lies(tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tmp_path)
    folder(Path("tiny"), classifier=False)
    data_file(Path("data.jsonl"))
    words = [
        "config=quickstart",
        "model.name=tiny",
        "task=custom",
        f"task.train={tmp_path / 'data.jsonl'}",
        "peft=lora",
    ]
    words += ["task.num_train=24", "task.num_dev=8", "task.num_test=16", "budget.queries=10", "method=mezo"]
    words += [
        "estimator=central",
        "task.template='{text} is it spam'",
        "task.words={ham: 'no', spam: 'yes'}",
        f"output_dir={tmp_path / 'run'}",
    ]
    run(compose([*words, "trainer.per_device_train_batch_size=4", "trainable=adapter"]))
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "tiny")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert main(["eval", f"run={tmp_path / 'run'}"]) == 0
