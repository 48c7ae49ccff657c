"""Every preset, killed anywhere: the journal and a snapshot give back the run that was never interrupted."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch

from tests import models
from tests.few_bits import with_trained_scales
from zoft import ZOConfig, ZOTrainer
from zoft.config import compose
from zoft.config.catalog import preset_files
from zoft.estimators.nodes import Nodes
from zoft.journal.file import NAME, read
from zoft.lm.objectives.cross_entropy import CrossEntropy
from zoft.step.nodes import NodeQueries
from zoft.step.query import StepQueries
from zoft.weightings.per_prompt import PerPrompt

SMALL = {
    "subzero_plus": ["estimator.num_directions=3"],
    "aim_zo": [
        "estimator.num_directions=3",
        "subspace.rank=4",
        "subspace.basis_columns=8",
        "subspace.shared_columns=3",
    ],
    "es": ["estimator.num_directions=3"],
    "eggroll": ["estimator.num_directions=3"],
    "spsa_1_5": ["estimator.num_directions=3"],
    "deepzero": ["estimator.num_directions=4"],
    "lezo": ["subspace.block_size=1"],
    "addax": ["estimator.long_tokens=5"],
    "mezo_svrg": ["estimator.interval=3", "estimator.anchor_batches=2"],
}
MODELS = {"qzo": with_trained_scales}
"""What is trained by a method that is not about plain weights."""

STEPS = 8
TIMES = ("runtime", "per_second", "seconds")


class Killed(BaseException):
    """A process that is no more, as far as the trainer can tell."""


def rows():
    batch = models.batch_for(models.tiny_opt(), rows=12, length=9)
    return [{name: value[i] for name, value in batch.items()} for i in range(12)]


def lora():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(models.tiny_opt(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


@cache
def composed(method):
    return compose([f"method={method}", "budget.queries=20000", *SMALL.get(method, [])])


def trainer(folder, method, *, model=None, dtype=torch.float32, engine="auto", objective=None, **given):
    cfg = copy.deepcopy(composed(method))
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "per_device_train_batch_size": 3,
        "dataloader_pin_memory": False,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "journal_hash_steps": 2,
        "seed": 3,
    }
    if cfg.optimizer.learning_rate is not None:
        cfg.optimizer.learning_rate = None
    names = ("subspace", "estimator", "weighting", "optimizer")
    parts = {part: given.pop(part, None) or getattr(cfg, part) for part in names}
    data = rows()
    return ZOTrainer(
        (model or MODELS.get(method, models.tiny_opt))().to(dtype),
        ZOConfig(**settings | given),
        train_dataset=data,
        eval_dataset=data[:3],
        engine=engine,
        objective=objective,
        **parts,
    )


def killed_at(folder, method, step, **given):
    """Train until the queries of a step, then be gone in the middle of them."""
    one = trainer(folder, method, **given)

    def killing(compute):
        def counted(*args, **kwargs):
            if one.progress.steps == step and one.model.training is False and one.query_forward.is_querying:
                raise Killed
            return compute(*args, **kwargs)

        return counted

    one.compute_loss = killing(one.compute_loss)
    one.create_optimizer()
    if one.run_steps.queries.nodes is not None:  # reads the objective position by position
        one.run_steps.queries.nodes.reader.read = killing(one.run_steps.queries.nodes.reader.read)
    with pytest.raises(Killed):
        one.train()


def lines(one):
    """What was logged, without wall times."""
    entries = [{k: v for k, v in line.items() if not any(t in k for t in TIMES)} for line in one.state.log_history]
    return [{k: str(v) for k, v in line.items() if k != "total_flos"} for line in entries if "train_loss" not in line]


def same(whole, resumed):
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert lines(whole) == lines(resumed)
    a, b = read_of(whole), read_of(resumed)
    assert [r.coefficients for r in a.records] == [r.coefficients for r in b.records]
    assert a.digests == b.digests
    assert a.evaluations.keys() == b.evaluations.keys()
    assert len(a.digests) == STEPS // 2


def read_of(one):
    return read(Path(one.args.output_dir) / NAME)


@pytest.mark.parametrize("method", preset_files("method"))
def test_a_killed_run_ends_as_the_run_that_was_never_interrupted(method, tmp_path):
    whole = trainer(tmp_path / "whole", method)
    whole.train()
    resume_and_compare(whole, tmp_path / "killed", method, 5, save_strategy="steps", save_steps=3, save_total_limit=1)


CASES = {
    "no checkpoint": ("mezo", {}),
    "sixteen bits": ("mezo", {"dtype": torch.bfloat16, "save_strategy": "steps", "save_steps": 3}),
    "sums in coordinates": ("lozo_m", {"dtype": torch.float16}),
    "adapter": ("mezo_adam", {"model": lora, "save_strategy": "steps", "save_steps": 3}),
    "weights perturbed": ("n_spsa", {"engine": "in_place"}),
    "micro-batches": ("mezo", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "evaluated at the start": ("mezo", {"eval_on_start": True, "save_strategy": "steps", "save_steps": 3}),
    "clipped": ("mezo", {"max_grad_norm": 0.05, "guard": "clip", "guard_factor": 1.5, "guard_steps": 10}),
    "each example": ("es", {"weighting": PerPrompt(), "objective": CrossEntropy()}),
    "another schedule": ("zo_sgd_mmt", {"lr_scheduler_type": "cosine", "warmup_steps": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_the_weights_and_the_setting(case, tmp_path):
    method, given = CASES[case]
    whole = trainer(tmp_path / "whole", method, **given)
    whole.train()
    resume_and_compare(whole, tmp_path / "killed", method, 5, **given)


SKIPPED = {
    "losses": ("mezo", None, 2),
    "losses of a rule with moments": ("zo_adam", None, 2),
    "probes behind others": ("nodes", None, 2),
    "the only probes of the run": ("zoft", Nodes(response="learnt"), 0),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_a_run_in_which_a_step_was_not_finite_goes_on(case, tmp_path, monkeypatch):
    method, estimator, step = SKIPPED[case]
    asked, probe = StepQueries._asked, NodeQueries._probe

    def spoilt(self, *args):
        return asked(self, *args) * (torch.nan if self.optimizer.progress.steps == step else 1.0)

    def spoilt_probe(self, part, drawn, *args):
        return probe(self, part, drawn, *args) * (torch.inf if drawn.direction.step == step else 1.0)

    monkeypatch.setattr(StepQueries, "_asked", spoilt)
    monkeypatch.setattr(NodeQueries, "_probe", spoilt_probe)
    whole = trainer(tmp_path / "whole", method, estimator=estimator)
    whole.train()
    assert whole.progress.num_skipped == 1
    resume_and_compare(whole, tmp_path / "killed", method, 5, estimator=estimator)


def resume_and_compare(whole, folder, method, step, **given):
    killed_at(folder, method, step, **given)
    resumed = trainer(folder, method, **given)
    compute = resumed.compute_loss

    def counted(*args, **kwargs):
        assert (
            resumed.progress.steps >= step
            or resumed.method.estimator.backpropagates
            or isinstance(resumed.method.estimator, Nodes)
        ), "a forward pass in a replay"
        return compute(*args, **kwargs)

    resumed.compute_loss = counted
    resumed.train(resume_from_checkpoint=True)
    same(whole, resumed)
    assert resumed.progress.num_queries == whole.progress.num_queries
