"""Whether a trainer's node directions need probes: tried before the steps are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import models
from zoft import ZOConfig, ZOTrainer
from zoft.errors import NonFiniteLossError, UserError
from zoft.estimators.nodes import Nodes
from zoft.lm.data.tokens import OptionCollator
from zoft.lm.objectives.options import Options
from zoft.optimizers.sgd import SGD
from zoft.optimizers.whiten import Whiten
from zoft.step.nodes import NodeQueries
from zoft.subspaces.nodes import Nodes as Outputs
from zoft.trainer.stepping import _are_finite

BUDGET = 12


def trainer_of(tmp_path, model, estimator=None, train=("mlp",), rows=None, size=4, bf16=False, **more):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in train))
    batch = models.batch_for(model, rows=8, length=7)
    rows = rows or [{name: value[i] for name, value in batch.items()} for i in range(8)]
    args = ZOConfig(
        output_dir=str(tmp_path), budget_queries=BUDGET, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_strategy="no", per_device_train_batch_size=size, dataloader_pin_memory=False,
        bf16=bf16,
    )  # fmt: skip
    parts = {"subspace": "nodes", "estimator": estimator, "optimizer": "whiten"} | more
    return ZOTrainer(model, args, train_dataset=rows, **parts)


@pytest.mark.parametrize(
    "family", ["tiny_llama", "tiny_gpt2", "tiny_gemma", "tiny_gemma2", "tiny_olmo2", "tiny_cohere", "tiny_opt"]
)
def test_blocks_that_add_their_parts_need_no_probes(tmp_path, family):
    trainer = trainer_of(tmp_path, getattr(models, family)(), Nodes(), train=("mlp", "fc"))
    assert trainer.method.estimator.response == "identity"
    assert trainer.args.max_steps == BUDGET
    trainer.train()
    assert trainer.progress.num_queries == BUDGET
    assert not trainer.zo_optimizer.subspace.response


@pytest.mark.parametrize(
    "parts", [{"estimator": Nodes(feedback="exact")}, {"estimator": "backprop", "subspace": "full"}]
)
def test_a_step_without_directions_in_the_weights_that_makes_them_infinite_is_none(tmp_path, parts):
    trainer = trainer_of(tmp_path, models.tiny_llama().half(), optimizer=SGD(learning_rate=1e9), **parts)
    with pytest.raises(
        NonFiniteLossError, match=r"^step 0 has made weights infinite \(its losses were finite\): it was"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("estimator", "bound", "word"),
    [
        (
            Nodes(response="identity"),
            {"trust": 5.0},
            r"^optimizer\.trust=5\.0 does nothing: no step has probes: leave it out",
        ),
        (Nodes(feedback="exact"), {"trust": 5.0}, "or set optimizer.trust_exact"),
        (Nodes(response="learnt"), {"trust_exact": 1.0}, "trust_exact=1.0 does nothing: every step is from probes"),
        (Nodes(feedback="log_odds"), {"trust_exact": 1.0}, "or set optimizer.trust$"),
    ],
)
def test_a_bound_that_no_step_reads_is_refused(tmp_path, estimator, bound, word):
    with pytest.raises(UserError, match=word):
        trainer_of(tmp_path, models.tiny_llama(), estimator, optimizer=Whiten(**bound))


def test_a_bound_that_turns_out_to_be_read_by_no_step_is_said(tmp_path, caplog):
    """The trainer has chosen: a run that has it goes on."""
    assert trainer_of(tmp_path, models.tiny_llama(), Nodes(), optimizer=Whiten(trust=5.0)).method
    assert "optimizer.trust=5.0 does nothing: no step has probes" in caplog.text


@pytest.mark.parametrize(("every", "size", "told"), [(0, 1, 1), (1, 1, 0), (0, 6, 0)])
def test_answers_without_a_response_are_told_of_once(tmp_path, caplog, every, size, told):
    """One row a step: the first one's answer alone has been probed when others come, three of every six rows."""
    rows = [{"sequences": [[5, 6, 7], [5, 6, 8]], "lengths": [1, 1], "label": k % 2} for k in range(6)]
    more = {"objective": Options(), "data_collator": OptionCollator(0), "rows": rows, "size": size}
    trainer_of(tmp_path, models.tiny_llama(), Nodes(feedback="log_odds", every=every), **more).train()
    said = [record.getMessage() for record in caplog.records if "move nothing" in record.getMessage()]
    assert len(said) == told
    assert all(one.startswith("1 of 1 positions of a step move nothing, as no probe has seen their") for one in said)
    assert all("set estimator.every=1 or a larger trainer.per_device_train_batch_size" in one for one in said)


@pytest.mark.parametrize("family", ["tiny_granite", "tiny_bloom"])
def test_other_blocks_do(tmp_path, family):
    """Granite scales the part; Bloom's part is handed the residual stream beside its input."""
    model = getattr(models, family)()
    trainer = trainer_of(tmp_path, model, Nodes(), **({} if family == "tiny_granite" else {"train": ("fc", "dense")}))
    assert trainer.method.estimator.response == "learnt"
    trainer.train()
    assert trainer.zo_optimizer.subspace.response
    assert trainer.progress.num_queries == BUDGET


@pytest.mark.parametrize(
    ("estimator", "subspace"),
    [
        (Nodes(first=6), "nodes"),
        (Nodes(every=4), "nodes"),
        (Nodes(response="learnt"), "nodes"),
        (Nodes(), Outputs(positions="last", num_positions=2)),
        (Nodes(), Outputs(layers="linear")),
        (Nodes(), Outputs(probed="layers")),
        (Nodes(), Outputs(probed="shared")),
        (Nodes(), Outputs(directions="iid")),
    ],
)
def test_where_probes_are_asked_for_or_other_layers_move_they_are_made(tmp_path, estimator, subspace):
    train = ("mlp", "attn") if getattr(subspace, "layers", "") == "linear" else ("mlp",)
    trainer = trainer_of(tmp_path, models.tiny_llama(), estimator, subspace=subspace, train=train)
    assert trainer.method.estimator.response == "learnt"
    assert trainer.args.max_steps < BUDGET


@pytest.mark.parametrize("empty", [0, 4])
def test_another_loss_is_refused_at_the_first_rows_whose_labels_count(tmp_path, empty):
    class Halved(ZOTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) / 2

    batch = models.batch_for(models.tiny_llama(), rows=8, length=7)
    batch["labels"][:empty] = -100
    rows = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    args = trainer_of(tmp_path, models.tiny_llama(), Nodes()).args
    args = replace(args, max_steps=-1, train_sampling_strategy="sequential")
    parts = {"subspace": "nodes", "estimator": Nodes(response="learnt"), "optimizer": "whiten"}
    with pytest.raises(UserError, match="the trainer makes another loss of it"):
        Halved(models.tiny_llama(), args, train_dataset=rows, **parts).train()


@pytest.mark.parametrize("size", [1, 4])
def test_a_decoders_classifier_without_padding_takes_one_row(tmp_path, size):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=64, pad_token_id=None, **small))
    rows = [{"input_ids": torch.arange(3, 9), "labels": torch.tensor(k % 2)} for k in range(8)]
    trainer = trainer_of(tmp_path, model, Nodes(), rows=rows, size=size)
    if size > 1:
        with pytest.raises(UserError, match=r"takes one row at a time.*set model\.config\.pad_token_id"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.progress.num_queries == BUDGET
    assert model.config.pad_token_id is None


def test_first_rows_whose_labels_do_not_count_are_passed_over(tmp_path):
    batch = models.batch_for(models.tiny_llama(), rows=8, length=7)
    batch["labels"][:3] = -100
    rows = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    assert trainer_of(tmp_path, models.tiny_llama(), Nodes(), rows=rows).method.estimator.response == "identity"
    for row in rows:
        row["labels"][:] = -100
    assert trainer_of(tmp_path, models.tiny_llama(), Nodes(), rows=rows).method.estimator.response == "learnt"


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("estimator", [Nodes(), Nodes(feedback="exact")])
def test_autocast_is_served(tmp_path, family, estimator):
    """A part's layers are given 16 bits there, of float32 weights."""
    trainer_of(tmp_path, getattr(models, family)(), estimator, bf16=True).train()


@pytest.mark.parametrize("lost", [{0}, {0, 1}])
def test_probes_that_are_made_once_more_are_within_the_budget(tmp_path, caplog, monkeypatch, lost):
    """The run ends sooner, evaluated and saved as at its planned end; resumed, it is finished."""
    probe = NodeQueries._probe

    def spoilt(self, part, drawn, *args):
        return probe(self, part, drawn, *args) * (torch.inf if drawn.direction.step in lost else 1.0)

    monkeypatch.setattr(NodeQueries, "_probe", spoilt)
    trainer = trainer_of(tmp_path, models.tiny_llama(), Nodes(first=2))
    trainer.args.save_strategy = "steps"
    trainer.train()
    steps = BUDGET - 2 * (len(lost) + 1)
    assert (trainer.progress.num_queries, trainer.progress.steps, trainer.state.global_step) == (BUDGET, steps, steps)
    assert f"the budget ends {2 * len(lost)} steps before the plan" in caplog.text
    assert (tmp_path / f"checkpoint-{steps}").is_dir()
    again = trainer_of(tmp_path, models.tiny_llama(), Nodes(first=2))
    again.train(resume_from_checkpoint=True)
    assert (again.progress.num_queries, again.state.global_step) == (BUDGET, steps)
    for one, other in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("estimator", [Nodes(), Nodes(response="learnt"), Nodes(every=2, num_directions=2)])
def test_queries_of_a_search_for_the_rate_end_no_run_early(tmp_path, estimator):
    model = models.tiny_llama()
    trainer = trainer_of(tmp_path, model, estimator)
    args = replace(trainer.args, budget_queries=60, max_steps=-1, learning_rate="auto")
    searching = ZOTrainer(
        model, args, train_dataset=trainer.train_dataset, subspace="nodes", estimator=estimator, optimizer="whiten"
    )
    searching.train()
    assert searching.state.global_step == searching.args.max_steps
    assert 58 <= searching.progress.num_queries <= 60


def test_an_identity_that_does_not_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"response=identity: blocks do not add .*response=learnt"):
        trainer_of(tmp_path, models.tiny_granite(), Nodes(response="identity"))


def test_the_method_of_nobody_is_settled_too(tmp_path):
    """A trainer without parts takes node directions, and of those what the model allows."""
    trainer = trainer_of(tmp_path, models.tiny_llama(), subspace=None, optimizer=None)
    assert trainer.method.subspace.name() == "nodes"
    assert trainer.method.estimator.response == "identity"


@pytest.mark.parametrize(
    ("numbers", "finite"), [([3e38, 3e38], True), ([1.0, -1.0], True), ([1.0, torch.inf], False), ([torch.nan], False)]
)
def test_weights_are_finite_where_every_number_is(numbers, finite):
    """Also where their sum is not, and where others are."""
    assert _are_finite([torch.ones(3), torch.tensor(numbers)]) is finite
