"""MeZO, number for number: zoft against a plain re-implementation on this machine, and against the recorded run.

The weights of the recorded run are equal to the bit. Its losses were computed by another processor's matrix kernels,
which may differ in the last bits; how far they may is decided by the re-implementation below, which shares nothing with
zoft: where it equals the recording exactly, zoft has to as well.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from zoft import ZOConfig, ZOTrainer
from zoft.estimators.central import Central
from zoft.lm.data.tokens import OptionCollator, encode
from zoft.lm.tasks.sst2 import SST2

HERE = Path(__file__).parents[1] / "assets" / "mezo_trajectory"
EPS, LR = 1e-3, 1e-4


@cache
def recorded() -> dict[str, Any]:
    return json.loads((HERE / "sst2_full" / "trajectory.json").read_text())


@cache
def batches() -> list[dict[str, torch.Tensor]]:
    rows = json.loads((HERE / "sst2_full" / "batches.json").read_text())
    return [{key: torch.tensor(value["data"]) for key, value in row.items()} for row in rows]


def micro_opt() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32, attn_implementation="eager").eval()


# ------------------------------------------------------------------------------------- MeZO's step, written out plainly


def plain_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean log-probability of each row's last ``option_len`` tokens; cross-entropy over each example's rows."""
    ids = batch["input_ids"]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].contiguous()
    labels = ids[:, 1:].clone()
    labels[labels == 1] = -100  # MeZO: padding, which is token 1, is ignored
    for row, length in enumerate(batch["option_len"].tolist()):
        labels[row, :-length] = -100
    inside = labels != -100
    log_probs = torch.log_softmax(logits, dim=-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    scores = (log_probs * inside).sum(-1) / inside.sum(-1)
    pieces, gold, row = [], [], 0
    while row < len(ids):
        size = int(batch["num_options"][row])
        pieces.append(scores[row : row + size])
        gold.append(int(batch["labels"][row]))
        row += size
    return torch.nn.functional.cross_entropy(torch.stack(pieces), torch.tensor(gold))


def with_mask(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch if "attention_mask" in batch else batch | {"attention_mask": (batch["input_ids"] != 1).long()}


@cache
def plain_run() -> tuple[list[tuple[float, float, float]], dict[str, torch.Tensor]]:
    """Twenty steps of Algorithm 1: (l1, l2, g) of each, and the final weights."""
    model = micro_opt()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def perturb(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for _, p in named:
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
            p.data = p.data + scale * z * EPS

    steps = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        for step, batch in zip(recorded()["steps"], batches(), strict=True):
            batch = with_mask(batch)
            perturb(step["seed"], 1)
            plus = plain_loss(model, batch)
            perturb(step["seed"], -2)
            minus = plain_loss(model, batch)
            perturb(step["seed"], 1)
            grad = ((plus - minus) / (2 * EPS)).item()
            torch.manual_seed(step["seed"])
            for _, p in named:
                z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
                p.data = p.data - LR * (grad * z)
            steps.append((float(plus), float(minus), grad))
    return steps, {name: p.data.clone() for name, p in named}


# ----------------------------------------------------------------------------------------------------------- zoft's run


def trainer_on(tmp_path: Path, model: Any, rows: list[Any], **arguments: Any) -> ZOTrainer:
    return ZOTrainer(
        model=model,
        args=ZOConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=20,
            learning_rate=LR,
            lr_scheduler_type="constant",
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[with_mask(batch) for batch in rows],
        data_collator=lambda rows: rows[0],
        estimator=Central(eps=EPS, noise="torch_sequential"),
        objective="options",
        direction_seeds=[step["seed"] for step in recorded()["steps"]],
        **arguments,
    )


@pytest.fixture(scope="module")
def zoft_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[tuple[float, float, float]], dict[str, torch.Tensor]]:
    from transformers import TrainerCallback

    model = micro_opt()
    trainer = trainer_on(tmp_path_factory.mktemp("mezo"), model, batches())
    steps = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.append((*trainer.last_step.losses.tolist(), *trainer.last_step.projected_grads.tolist()))

    trainer.add_callback(Watch())
    trainer.train()
    return steps, {name: p.data.clone() for name, p in model.named_parameters()}


def test_the_recording_is_the_one_the_figures_are_about():
    meta, steps = recorded()["meta"], recorded()["steps"]
    assert (len(steps), len(batches())) == (20, 20)
    assert meta["param_order"] == [name for name, _ in micro_opt().named_parameters()]
    assert all(step["lr"] == LR for step in steps)
    assert meta["argv"][meta["argv"].index("--zo_eps") + 1] == "0.001"


def test_losses_gradients_and_weights_equal_the_plain_run_exactly(zoft_run):
    steps, weights = zoft_run
    plain_steps, plain_weights = plain_run()
    assert len(steps) == 20
    for number, (ours, plain) in enumerate(zip(steps, plain_steps, strict=True)):
        assert ours == plain, f"step {number}"
    assert list(weights) == list(plain_weights)
    for name, tensor in plain_weights.items():
        assert torch.equal(weights[name], tensor), name


def test_with_the_recorded_gradients_the_final_weights_are_the_recorded_ones_to_the_bit(tmp_path, monkeypatch):
    model = micro_opt()
    start = {name: p.data.clone() for name, p in model.named_parameters()}
    trainer = trainer_on(tmp_path, model, batches())
    grads = iter(step["g"] for step in recorded()["steps"])
    given = lambda *_: torch.tensor([next(grads)], dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(trainer.method.weighting, "coefficients", given)
    trainer.train()
    final = load_file(HERE / "sst2_full" / "final.safetensors")
    assert set(final) == set(start)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, final[name]), name
        assert not torch.equal(start[name], final[name]), f"{name} did not move: this would pass without training"


def test_the_trajectory_is_the_recorded_one(zoft_run):
    steps, weights = zoft_run
    for number, (ours, plain, step) in enumerate(zip(steps, plain_run()[0], recorded()["steps"], strict=True)):
        wanted = (step["l1"], step["l2"], step["g"])
        for key, value, here, reference, near in zip(
            ("l1", "l2", "g"), ours, plain, wanted, (3e-7, 3e-7, 3e-4), strict=True
        ):
            if here == reference:
                assert value == reference, f"step {number}, {key}: exact on this processor"
            assert value == pytest.approx(reference, abs=near, rel=0), f"step {number}, {key}"
    final = load_file(HERE / "sst2_full" / "final.safetensors")
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, final[name], rtol=0, atol=1e-6)


def test_the_recorded_rows_come_out_of_the_task_the_tokenizer_and_the_collator(tmp_path):
    """Reachable by a user: local files -> task sst2 -> encode -> OptionCollator gives the tensors MeZO trained on."""
    from zoft.lm.models.load import load_tokenizer

    rows = json.loads((HERE / "rows.json").read_text())["sst2"]
    for split in ("train", "validation"):
        lines = [json.dumps(row) for row in rows[split]]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    splits = SST2(num_train=64, num_dev=16, num_test=32, data_seed=0, **files).load()
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (64, 16, 32)
    encoded = encode(splits.train, load_tokenizer(str(HERE / "model"), as_mezo=True), 500)
    collate = OptionCollator(pad_token_id=1, one_row_per_option=True, multiple_of=8)

    def rows_of(batch: dict[str, torch.Tensor]) -> list[tuple]:
        keys = ("input_ids", "option_len", "num_options", "labels")
        assert batch["input_ids"].shape[1] % 8 == 0
        return [
            (tuple(i for i in ids.tolist() if i != 1), *map(int, rest))
            for ids, *rest in zip(*(batch[key] for key in keys), strict=True)
        ]

    all_rows = {row for example in encoded for row in rows_of(collate([example]))}
    used = {row for batch in batches() for row in rows_of(batch)}
    assert all_rows == used
    by_ids = {tuple(sequence): example for example in encoded for sequence in example["sequences"]}
    for batch in batches():  # and whole batches, padding included
        first_rows = [by_ids[row[0]] for row in rows_of(batch)[::2]]
        ours = collate(first_rows)
        for key, tensor in batch.items():
            assert torch.equal(ours[key], tensor), key


# ------------------------------------------------------------------------------------ fault 12: from the command line


@pytest.fixture(scope="module")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_command_line(tmp_path_factory.mktemp("cli"))


def by_command_line(folder: Path, *more: str, learning_rate: float = LR) -> Path:
    """The recorded run by `zoft train`, stopped half-way and gone on with."""
    from zoft.config import compose
    from zoft.run.train import run

    rows = json.loads((HERE / "rows.json").read_text())["sst2"]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[split]))
    words = [
        f"model.name={HERE / 'model'}", "model.attn_implementation=eager", "task=sst2", "method=mezo", "protocol=mezo",
        f"task.train={folder / 'train.jsonl'}", f"task.validation={folder / 'validation.jsonl'}", "seed=42",
        "task.num_train=64", "task.num_dev=16", "task.num_test=32", f"optimizer.learning_rate={learning_rate}",
        "objective=options", "trainer.per_device_train_batch_size=8", "trainer.lr_scheduler_type=constant",
        "trainer.logging_steps=1", f"output_dir={folder / 'run'}", *more,
    ]  # fmt: skip
    for queries in (20, 40):
        run(compose([*words, f"budget.queries={queries}"]))
    return folder / "run"


def test_fault_12_the_recorded_run_is_repeated_from_the_command_line(command_line: Path):
    lines = [json.loads(line) for line in (command_line / "metrics.jsonl").read_text().splitlines()]
    grads = [line["projected_grad"] for line in lines if "projected_grad" in line]
    assert len(grads) == 20
    for number, (grad, step) in enumerate(zip(grads, recorded()["steps"], strict=True)):
        assert grad == pytest.approx(abs(step["g"]), abs=1e-3), f"step {number}"
    final, saved = (
        load_file(HERE / "sst2_full" / "final.safetensors"),
        load_file(command_line / "model" / "model.safetensors"),
    )
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, final[name], rtol=0, atol=1e-6)


def test_fault_12_seeds_and_rows_are_the_recorded_ones():
    from zoft.trainer.mezo import MezoRowOrder, step_seeds

    assert step_seeds(42, 20) == [step["seed"] for step in recorded()["steps"]]
    order = MezoRowOrder(64, 42)
    first = list(order)
    order.set_epoch(1)
    assert sorted(order) == sorted(first) == list(range(64))
    assert list(order) != first


def test_fault_12_llamas_last_norm_decays_as_in_mezo(tmp_path: Path):
    from tests.models import tiny_llama

    rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 2
    decayed = {}
    for mezo in (True, False):
        config = ZOConfig(output_dir=str(tmp_path), weight_decay=0.1, report_to=[])
        trainer = ZOTrainer(tiny_llama(), config, train_dataset=rows, mezo_protocol=mezo)
        decayed[mezo] = set(trainer.get_decay_parameter_names(trainer.model))
    assert decayed[True] - decayed[False] == {"model.norm.weight"}
    assert not any("layernorm" in name for name in decayed[True])


@pytest.mark.parametrize("length", [40, 60])
def test_fault_12_a_long_prompt_is_cut_with_its_answer(length: int):
    from tests.runs import tiny_tokenizer
    from zoft.lm.data.examples import Example
    from zoft.lm.data.generated import encode_generated

    text = " ".join(["win free prize claim lunch home meet later"] * 12)
    example = Example(text, (" it is spam",), 0, answers=("it is spam",), max_new_tokens=8)
    ours, mezos = (
        encode_generated([example], tiny_tokenizer(), length, 8, as_mezo=as_mezo)[0] for as_mezo in (False, True)
    )
    assert len(ours["prompt_ids"]) - len(mezos["prompt_ids"]) == mezos["lengths"][0] == 3
    assert mezos["prompt_ids"] == mezos["sequences"][0][:-3]


@pytest.mark.parametrize(("words", "said"), [(["method=fzoo"], "protocol=mezo is MeZO's own step")])
def test_fault_12_what_is_not_mezos_is_refused(words: list[str], said: str):
    from zoft.config import compose
    from zoft.errors import UserError

    with pytest.raises(UserError, match=said):
        compose(["config=smoke", "protocol=mezo", *words])


@pytest.mark.parametrize("protocol", ["default", "mezo"])
def test_fault_12_the_f1_of_no_answer(protocol: str):
    """By the objective and by an evaluation alike; a word in common is no half of "there is none"."""
    from tests.runs import tiny_tokenizer
    from zoft.lm import formats
    from zoft.lm.objectives._written import scores_of
    from zoft.lm.objectives.metric import Metric
    from zoft.lm.tasks.drop import DROP

    task = DROP(protocol=protocol)
    collate = formats.collator_for("generate", [], tiny_tokenizer(), task, Metric())
    batch = {"answering": collate.answering, "answers": [["no answer"]] * 2 + [["CANNOTANSWER", "x"], ["no", "a"]]}
    scores = scores_of(["no idea", "No answer.", "x", "no"], batch)[:, 0].tolist()
    assert scores == ([0.0, 1.0, 0.0, 1.0] if protocol == "mezo" else [0.5, 1.0, 1.0, 1.0])


# ------------------------------------------------------------------------------------------- fault 12: prefix tuning


def prefixed_opt(length: int, seed: int) -> tuple[Any, list[tuple[str, torch.nn.Parameter]]]:
    """MeZO's prefix, plainly: each attention puts its own keys and values in front of those of the text.

    The text's positions are those of a model without a prefix.
    """
    from transformers.models.opt.modeling_opt import eager_attention_forward

    model = micro_opt()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    named = []
    for number, layer in enumerate(model.model.decoder.layers):
        both = [cache.layers[number].keys, cache.layers[number].values]
        pair = [torch.nn.Parameter(one[0].transpose(0, 1).reshape(length, -1).clone()) for one in both]
        layer.self_attn.prefix = pair
        named += [(f"{number}.keys", pair[0]), (f"{number}.values", pair[1])]

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **given: Any) -> Any:
        rows, heads = key.shape[:2]
        before = [one.view(length, heads, -1).transpose(0, 1).expand(rows, -1, -1, -1) for one in module.prefix]
        key, value = (torch.cat((first, rest), dim=2) for first, rest in zip(before, (key, value), strict=True))
        open_to_all = torch.zeros(*attention_mask.shape[:-1], length)
        mask = torch.cat((open_to_all, attention_mask), dim=-1)
        return eager_attention_forward(module, query, key, value, mask, **given)

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("mezo_prefix_of_a_test", attend)
    AttentionMaskInterface.register("mezo_prefix_of_a_test", eager_mask)
    model.config._attn_implementation = "mezo_prefix_of_a_test"
    return model, named


def test_fault_12_a_prefix_is_mezos_under_its_protocol(command_line_of_a_prefix: Path):
    """Losses and the trained prefix of `protocol=mezo peft=prefix`, against the plain one, to the bit."""
    eps, lr = 1e-1, 1e-2
    model, named = prefixed_opt(5, 42)
    begun = [parameter.data.clone() for _, parameter in named]
    losses = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for step, batch in zip(recorded()["steps"], batches(), strict=True):
            batch = with_mask(batch)
            pair = []
            for scale in (1, -2, 1):
                torch.manual_seed(step["seed"])
                for _, p in named:
                    p.data += scale * torch.normal(mean=0, std=1, size=p.data.size()) * eps
                if len(pair) < 2:
                    pair.append(plain_loss(model, batch))
            grad = ((pair[0] - pair[1]) / (2 * eps)).item()
            torch.manual_seed(step["seed"])
            for _, p in named:
                p.data -= lr * (grad * torch.normal(mean=0, std=1, size=p.data.size()))
            losses.append(abs(grad))
    lines = [json.loads(line) for line in (command_line_of_a_prefix / "metrics.jsonl").read_text().splitlines()]
    grads = [line["projected_grad"] for line in lines if "projected_grad" in line]
    assert grads == losses
    prefix = load_file(command_line_of_a_prefix / "model" / "adapter_model.safetensors")["prompt_embeddings"]
    wanted = torch.stack([parameter.data for _, parameter in named], dim=1).flatten(1)  # [P, 2 L W]
    assert torch.equal(prefix, wanted)
    assert not torch.allclose(torch.stack(begun, dim=1).flatten(1), wanted, atol=1e-3)


@pytest.fixture(scope="module")
def command_line_of_a_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_command_line(tmp_path_factory.mktemp("prefix"), "peft=prefix", "estimator.eps=1e-1", learning_rate=1e-2)
