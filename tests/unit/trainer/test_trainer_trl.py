"""The mixin on a Trainer that is not ours: TRL's SFTTrainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.runs import tiny_tokenizer
from zoft.weights.tensors import Weights

trl = pytest.importorskip("trl")


def sft(tmp_path: Path, cls: Any = None, **given: Any) -> Any:
    from datasets import Dataset

    from zoft.trainer.trainer import ZOMixin

    class ZOSFT(ZOMixin, trl.SFTTrainer):
        pass

    fields = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "max_length": 16,
    }
    args = trl.SFTConfig(**(fields | given.pop("fields", {})))
    texts = ["win a free prize", "meet you later home", "claim it is free", "lunch is later you call"] * 2
    data = Dataset.from_list([{"text": text} for text in texts])
    return (cls or ZOSFT)(
        model=given.pop("model", None) or models.tiny_llama(),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
        **given,
    )


@pytest.mark.parametrize("lora", [False, True])
def test_sft_with_forward_passes_only(lora: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", r=2) if lora else None
    trainer = sft(tmp_path, peft_config=config, estimator="one_sided")
    assert not trainer.args.gradient_checkpointing
    assert trainer.args.max_grad_norm == 0.0
    assert not getattr(trainer.model, "is_gradient_checkpointing", False)
    names = Weights(trainer.model).tensors
    assert all("lora" in name for name in names) == lora
    before = Weights(trainer.model).digest()
    trainer.train()
    assert Weights(trainer.model).digest() != before
    training = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["num_queries"] for line in training] == [2, 4, 6]
    for line in training:
        assert math.isfinite(line["loss"])
        assert {"projected_grad", "eps", "mean_token_accuracy", "entropy", "num_tokens"} <= set(line)
        assert not any(key.startswith("eval_") for key in line)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert "eval_mean_token_accuracy" in metrics


def test_the_clean_loss_is_sfts_own(tmp_path: Path):
    """Same first batch, same weights: the loss that SFTTrainer logs with backpropagation."""
    ours = sft(tmp_path, estimator="one_sided", fields={"max_steps": 1, "gradient_accumulation_steps": 2})
    ours.train()
    theirs = sft(tmp_path, trl.SFTTrainer, fields={"max_steps": 1, "gradient_accumulation_steps": 2, "data_seed": 42})
    theirs.train()
    losses = [next(line["loss"] for line in t.state.log_history if "loss" in line) for t in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_chosen_gradient_norm_is_kept(tmp_path: Path):
    assert sft(tmp_path, fields={"max_grad_norm": 0.5}).args.max_grad_norm == 0.5


# ---------------------------------------------------------------------------- fault 11: every trainer that TRL exports

PAIRS = [
    {"prompt": "is it spam", "chosen": " yes", "rejected": " no"},
    {"prompt": "win a prize", "chosen": " claim it", "rejected": " later you"},
]
ROWS = {
    "SFTTrainer": [{"text": "win a free prize"}, {"text": "meet you later home"}],
    "DPOTrainer": PAIRS,
    "KTOTrainer": [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in PAIRS
        for name in ("chosen", "rejected")
    ],
    "RewardTrainer": PAIRS,
}
WRITE_TEXTS = ("GRPOTrainer", "RLOOTrainer", "DistillationTrainer")


def classifier() -> Any:
    import transformers

    config = models.tiny_llama().config
    config.num_labels = 1
    return transformers.LlamaForSequenceClassification(config)


def make_trainer(name: str, folder: Path, how: str, *mixin: type, **given: Any) -> Any:
    import transformers
    from datasets import Dataset

    cls = type(f"ZO{name}", (*mixin, getattr(trl, name)), {})
    config = getattr(trl, name.replace("Trainer", "Config"))(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True, bf16=False, max_length=16, seed=7,
        data_seed=7,
    )  # fmt: skip
    model = classifier()
    if name != "RewardTrainer":  # TRL loads the reference model from where this one came from
        models.tiny_llama().save_pretrained(folder / "model")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    rows = Dataset.from_list(ROWS[name] * 4)
    if how == "name":
        return cls(model=model, args=config, train_dataset=rows, processing_class=tiny_tokenizer(), **given)
    first = (model, None, config) if name in ("DPOTrainer", "KTOTrainer") else (model, config)
    return cls(*first, None, rows, processing_class=tiny_tokenizer(), **given)


def test_fault_11_what_trl_exports_is_tested_or_refused():
    assert {name for name in dir(trl) if name.endswith("Trainer")} == {*ROWS, *WRITE_TEXTS}


@pytest.mark.parametrize("how", ["name", "place"])
@pytest.mark.parametrize("name", ROWS)
def test_fault_11_every_trainer_with_a_loss_of_its_own_is_trained(name: str, how: str, tmp_path: Path):
    from zoft.trainer.trainer import ZOMixin

    trainer = make_trainer(name, tmp_path, how, ZOMixin, estimator="one_sided")
    assert trainer.args.seed == 7
    assert trainer.args.max_steps == 3
    before = Weights(trainer.model).digest()
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 3
    assert all(math.isfinite(line["loss"]) and line["projected_grad"] for line in lines)
    assert Weights(trainer.model).digest() != before


@pytest.mark.parametrize("name", ["DPOTrainer", "KTOTrainer"])
def test_fault_11_the_first_loss_is_trls_own(name: str, tmp_path: Path):
    from zoft.trainer.trainer import ZOMixin

    losses = []
    for mixin, given in (((ZOMixin,), {"estimator": "one_sided"}), ((), {})):
        trainer = make_trainer(name, tmp_path / str(len(mixin)), "place", *mixin, **given)
        trainer.train()
        losses.append(next(line["loss"] for line in trainer.state.log_history if "loss" in line))
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


@pytest.mark.parametrize("name", WRITE_TEXTS)
def test_fault_11_those_that_write_their_texts_are_refused_by_name(name: str):
    from zoft.errors import UserError
    from zoft.trainer.trainer import ZOMixin

    with pytest.raises(UserError, match=f"{name} writes the texts"):
        type(f"ZO{name}", (ZOMixin, getattr(trl, name)), {})(model=models.tiny_llama())


def test_fault_11_an_argument_is_given_once(tmp_path: Path):
    from zoft import ZOConfig, ZOTrainer
    from zoft.errors import UserError

    with pytest.raises(UserError, match="given args twice"):
        ZOTrainer(models.tiny_llama(), ZOConfig(output_dir=str(tmp_path)), args=ZOConfig(output_dir=str(tmp_path)))


@pytest.mark.parametrize("name", [*ROWS, "Seq2SeqTrainer"])
@pytest.mark.parametrize("how", ["none", "zoft's"])
def test_fault_11_settings_of_another_class_are_a_sentence(name: str, how: str, tmp_path: Path):
    """They were an AttributeError or a TypeError inside of the Trainer."""
    import transformers

    from zoft import ZOConfig
    from zoft.errors import UserError
    from zoft.trainer.trainer import ZOMixin

    args = ZOConfig(output_dir=str(tmp_path), report_to=[]) if how == "zoft's" else None
    wanted = "Seq2SeqTrainingArguments" if name == "Seq2SeqTrainer" else name.replace("Trainer", "Config")
    cls = type(f"ZO{name}", (ZOMixin, getattr(trl, name, None) or getattr(transformers, name)), {})
    with pytest.raises(
        UserError, match=rf"{name} reads its settings from a {wanted}.* give args=zo_config\({wanted}\)\("
    ):
        cls(model=models.tiny_llama(), args=args)


def test_what_a_name_is_not_loaded_with_is_refused(tmp_path: Path):
    """TRL said that it would be ignored, and a model in float32 was trained."""
    from zoft.errors import UserError

    with pytest.raises(UserError, match=r"^model_init_kwargs would be ignored.* load it with from_pretrained"):
        sft(tmp_path, model="owner/name", fields={"model_init_kwargs": {"dtype": "bfloat16"}})


def test_kto_trains_with_the_order_that_its_config_asks_for(tmp_path: Path):
    from datasets import Dataset

    from zoft.trainer.config import zo_config
    from zoft.trainer.trainer import ZOMixin

    args = zo_config(trl.KTOConfig)(
        output_dir=str(tmp_path), budget_queries=4, use_cpu=True, report_to=[], max_length=16
    )
    trainer = type("ZOKTO", (ZOMixin, trl.KTOTrainer), {})(
        model=models.tiny_llama(), ref_model=models.tiny_llama(), args=args, processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list(ROWS["KTOTrainer"] * 4), estimator="central",
    )  # fmt: skip
    trainer.train()
    assert trainer.progress.num_queries == 4


def test_fault_11_a_subclass_with_arguments_of_its_own_takes_them_by_name(tmp_path: Path):
    """Its first argument was taken for the model."""
    import transformers

    from zoft import ZOConfig
    from zoft.errors import UserError
    from zoft.trainer.trainer import ZOMixin

    class Own(transformers.Trainer):
        def __init__(self, extra: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.extra = extra

    cls: Any = type("ZOOwn", (ZOMixin, Own), {})
    given = {"model": models.tiny_llama(), "args": ZOConfig(output_dir=str(tmp_path), report_to=[])}
    with pytest.raises(UserError, match="Own has arguments of its own before a Trainer's"):
        cls("more", *given.values())
    assert cls(extra="more", **given).extra == "more"
