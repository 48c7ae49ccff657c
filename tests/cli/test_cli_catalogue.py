"""The catalogue on the command line: what is listed and shown of it, and what is said of parts that do not fit."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import pytest

from zoft.cli import main
from zoft.cli.completion import words
from zoft.component import GROUPS, components, describe
from zoft.config import compose
from zoft.config.catalog import choices
from zoft.config.loader import _note_once

PARTS = ("subspace", "estimator", "weighting", "optimizer", "engine")
ALL = [(group, name) for group in PARTS for name in components(group)]
METHODS = choices("method")
MANY = ["trainable=all", "optimizer=adam"]


def out(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def refusal(*arguments: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # a UserError, whose text the caller looks at
        compose(list(arguments))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("group", "name"), ALL)
def test_the_first_line_is_a_whole_sentence_without_markup(
    group: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = (components(group)[name].__doc__ or "").split("\n")[0]
    assert first.endswith("."), first
    assert "``" not in out(capsys, "ls", group)


@pytest.mark.parametrize(("group", "name"), ALL)
def test_show_has_every_setting_with_a_meaning_and_the_references(
    group: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = out(capsys, "show", f"{group}/{name}")
    cls = components(group)[name]
    assert all(meaning for *_, meaning in describe(cls))
    assert all(f"  {group}.{field.name}=" in shown for field in dataclasses.fields(cls))
    assert "References" in shown or group == "engine"


@pytest.mark.parametrize("plural", ["methods", "estimators", "subspaces", "optimizers", "weightings"])
def test_groups_are_listed_in_the_plural_too(plural: str, capsys: pytest.CaptureFixture[str]) -> None:
    listed = out(capsys, "ls", plural)
    assert all(re.search(rf"^  {name} ", listed, re.M) for name in choices(plural.removesuffix("s")))


@pytest.mark.parametrize("name", ["sign", "one_point", "adamw", "forward_gradient"])
def test_a_name_of_two_groups_is_asked_back(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", name]) == 2
    error = capsys.readouterr().err
    assert "several groups: zoft show " in error
    assert error.count(f"/{name}") == 2


def test_completion_knows_the_catalogue() -> None:
    assert words("zoft train weighting=k") == ["weighting=kalman"]
    assert words("zoft show weighting/l") == ["weighting/loss_std"]
    assert "subspace.power_iterations=" in words("zoft train subspace.p")
    assert "method=zo_muon" in words("zoft train method=zo_m")


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_composes_with_the_quickstart(method: str) -> None:
    cfg = compose(["config=quickstart", f"method={method}", "budget.queries=700"])
    assert cfg.method == method
    assert cfg.composition.queries_at(0) >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("subspace.law=cone", "got 'cone': a cone around the momentum is optimizer=cone"),
        ("subspace.law=orthogonal", "is estimator.across"),
        ("subspace.law=antithetic", "is estimator.across"),
        ("method=null subspace.law=cauchy", "must be one of gaussian, rademacher, sphere, got 'cauchy'"),
        ("estimator.across=orthogonal", "needs two directions or more"),
        ("estimator.across=antithetic estimator.num_directions=3", "must be even, got 3"),
        ("subspace=sparse subspace.choose=mask", "subspace.mask=None do not go together: give a file"),
        ("subspace=sparse subspace.mask=x", "subspace.mask=x do not go together: a file is read with choose=mask only"),
        ("subspace=sparse subspace.choose=mask subspace.mask=nowhere.safetensors", "there is no such file"),
        ("optimizer=hessian", "use estimator=three_point"),
        ("weighting=curvature", "use estimator=three_point"),
        ("weighting=loss_std estimator=one_sided", "raise estimator.num_directions"),
        ("weighting=foo", "there is no weighting called 'foo'"),
        ("weighting.foo=1", "weighting=mean has no 'foo'"),
        ("subspace.rank=4", "activation, cp, left, low_rank, outer and two_sided."),
        ("method=null optimizer.beta=0.5", "It belongs to optimizer=cone, momentum, muon and whiten."),
        ("estimator=backprop subspace=low_rank", "subspace=full"),
        ("estimator=backprop estimator.num_directions=4", "must be 1 (nothing is queried along directions), got 4"),
        ("estimator=backprop engine=forward_mode", "estimator=backprop needs a backward pass"),
        ("estimator=backprop trainer.max_grad_norm=1", "trainer.max_grad_norm is about projected gradients"),
        ("method=adamw trainer.guard=clip", "trainer.guard is about projected gradients"),
        ("method=zoft trainer.guard=rollback", "trainer.guard is about projected gradients"),
        (
            "method=zoft estimator.num_directions=8",
            "of probes after the first step: set estimator.every=1, or estimator.first instead",
        ),
        ("method=zoft estimator.feedback=exact estimator.eps=5", "feedback=exact makes no probes: leave out eps"),
        ("method=nodes estimator.feedback=exact", "feedback=exact makes no probes: leave out"),
        (
            "method=subzero_plus budget.queries=20",
            "makes 100 queries in the first one: set budget.queries to 100 or more",
        ),
        ("optimizer=lozo", "Did you mean method=lozo?"),
        ("method=one_sided", "Did you mean estimator=one_sided?"),
        ("estimator=sign", "Did you mean weighting=sign or optimizer=sign?"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_a_sentence(arguments: str, message: str) -> None:
    assert message in refusal(*arguments.split())


@pytest.mark.parametrize(
    ("arguments", "noted"),
    [
        ([*MANY], True),
        ([*MANY, "estimator.num_directions=9"], True),
        ([*MANY, "estimator.num_directions=10"], False),
        ([*MANY, "subspace=two_sided"], False),
        (["optimizer=adam"], True),  # trainable=auto without an adapter: all weights
        (["optimizer=adam", "peft=lora"], False),
        (["trainable=all", "optimizer=sgd"], False),
        (["trainable=all", "method=adamw"], False),
        (["trainable=all", "method=mezo_adam"], True),
        (["config=quickstart"], False),
    ],
)
def test_adam_on_few_directions_of_many_weights_is_noted_once(
    arguments: list[str], noted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _note_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="zoft.config"):
        for _ in range(2):
            compose(arguments)
    messages = [record.getMessage() for record in caplog.records if "measures their noise" in record.getMessage()]
    assert len(messages) == int(noted)


def test_muon_without_matrices_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    _note_once.cache_clear()
    compose(["config=quickstart", "method=zo_muon", "trainable=norms_and_biases"])
    assert any("optimizer=muon orthogonalises matrices" in record.getMessage() for record in caplog.records)


def test_notes_go_to_standard_error_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        _note_once.cache_clear()
        assert main(["train", "--cfg", *MANY]) == 0
        assert capsys.readouterr().err.count("zoft: note: optimizer=adam with num_directions=1") == 1
    assert not list(tmp_path.iterdir())


def test_groups_of_the_catalogue_are_groups() -> None:
    assert set(PARTS) <= GROUPS.keys()


@pytest.mark.parametrize("subspace", ["cp", "coordinate", "blocks", "low_rank", "left", "two_sided", "sparse"])
def test_step_seeds_are_refused_where_the_seed_chose_what_is_kept(subspace: str) -> None:
    import torch

    from zoft import ZOTrainer
    from zoft.errors import UserError

    with pytest.raises(UserError, match=f"direction_seeds.*subspace={subspace} keeps"):
        ZOTrainer(model=torch.nn.Linear(2, 2), subspace=subspace, direction_seeds=[1, 2])


def test_a_sweep_names_the_cell_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["method=mezo,fzoo", "estimator.num_directions=1", f"output_dir={tmp_path / 'runs'}"]
    assert main(["train", "-m", "config=smoke", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("zoft: error: weighting=loss_std divides by the spread")
    assert error.endswith("(in the cell method=fzoo)\n")
    assert not list(tmp_path.iterdir())
