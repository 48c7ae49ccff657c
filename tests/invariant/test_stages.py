"""Processes that have some blocks of the model each take the steps of one process that has all: bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.bench_scale import idle_share
from tests.invariant.in_stages import CASES, STEPS
from tests.invariant.test_grids import Told, told_of
from zoft.config import compose
from zoft.errors import UserError

PIPELINE = {"parallel": "pipeline"}
SAME = ("digest", "losses", "slopes", "evaluated", "num_queries", "num_tokens", "steps", "trained")


def runs_of(cases: list[str], world: int) -> list[dict[str, Any]]:
    """One process, then several; a run that is cut short on one goes on on several, and the other way round."""
    begun = {"case": "tied", "stop": 3}
    return [
        {"world": 1, "cases": {case: {"case": case} for case in cases} | {"begun": {**begun, "folder": "up"}}},
        {
            "world": world,
            "cases": {f"{case} on {world}": {"case": case, **PIPELINE} for case in cases}
            | {
                "tied from one": {"case": "tied", "folder": "up", **PIPELINE},
                "begun here": {**begun, "folder": "down", **PIPELINE},
                "refused": "refusals",
            },
        },
        {"world": 1, "cases": {"tied from several": {"case": "tied", "folder": "down"}}},
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Told:
    runs = runs_of(["tied", "lora", "options"], 2)
    return told_of(tmp_path_factory.mktemp("two"), runs, "tests.invariant.in_stages")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return told_of(tmp_path_factory.mktemp("four"), runs_of(list(CASES), 4), "tests.invariant.in_stages")


def is_the_run_of_one(results: Told, case: str) -> None:
    """Every process says what one process says, and the model that the first one saves is that one's file."""
    alone, ranks = results[case.split()[0]][0], results[case]
    for rank in ranks:
        assert {name: rank[name] for name in SAME} == {name: alone[name] for name in SAME}
    assert ranks[0]["saved"] == alone["saved"] != []


@pytest.mark.parametrize("case", ["tied on 2", "lora on 2", "options on 2", "tied from one", "tied from several"])
def test_stages_are_the_run_of_one_bit_for_bit(case: str, two: Told):
    is_the_run_of_one(two, case)


def test_a_process_holds_and_trains_its_own_blocks_alone(two: Told):
    first, last = two["tied on 2"]
    for rank in (first, last):
        assert rank["held"] < 0.6 * rank["whole"]
        assert rank["trained_here"] < 0.6 * rank["trained"]
    both = set(first["names"]) & set(last["names"])
    assert both == {"model.embed_tokens.weight"}  # the head, too
    assert sum(rank["trained_here"] for rank in (first, last)) == first["trained"] + 64 * 16
    assert all(".2." not in name and ".3." not in name for name in first["names"])


def test_bytes_are_those_of_hidden_states_and_losses(two: Told):
    first, last = two["tied on 2"]
    # 2 points x 2 micro-batches of [2, 9, 16] float32; a loss a point, whether to ask again, the rows' checksum
    assert first["bytes_sent"] == [4 * 2 * 9 * 16 * 4 + 8 * (2 + 2)] * STEPS
    assert last["bytes_sent"] == [8 * (2 + 2)] * STEPS


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("nodes", "estimator=nodes asks for more than losses of the batch along directions of the step"),
        ("backward", "estimator=backprop asks for more than losses of the batch along directions of the step"),
        ("subspace", "only subspace=full is served, not subspace=two_sided"),
        ("sphere", "subspace.law=sphere scales directions over all tensors"),
        ("noise", "estimator.noise=torch_sequential draws one tensor behind the other"),
        ("weighting", "weighting=align compares directions over all tensors"),
        ("optimizer", "optimizer=cone shapes directions by the state of all tensors"),
        ("engine", "engine=in_place computes the whole model"),
        ("texts", "objective=reward calls the model more than once for a loss"),
        ("rate", "optimizer.learning_rate=auto is about a whole model of plain tensors"),
        ("narrow", "trainer.narrow_last_block is about a whole model of plain tensors"),
        ("compiled", "trainer.torch_compile is about a whole model of plain tensors"),
        ("grid", "trainer.parallel=pipeline has none: leave it out"),
        ("blocks", "LlamaForCausalLM has 1 for 2 processes: start 1 or fewer"),
        ("encoder", "T5ForConditionalGeneration has no single stack of them"),
        ("trained", "process 0 of 2 would hold nothing that is trained"),
        ("rows", "finds out by training rows what a stage needs: give some"),
        ("more", "hands on more than that: use trainer.parallel=directions"),
    ],
)
def test_what_no_stage_serves_is_refused_in_every_process(what: str, sentence: str, two: Told):
    for rank in two["refused"]:
        assert sentence in rank[what]
        assert rank[what].startswith("trainer.parallel")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["method=zoft"], "estimator=nodes"),
        (["method=mezo", "trainer.narrow_last_block=true"], r"trainer\.narrow_last_block is about a whole model"),
        (["method=mezo", "objective=metric"], "objective=metric calls the model more than once"),
    ],
)
def test_a_command_is_refused_before_anything_is_loaded(arguments: list[str], what: str):
    cfg = compose(["task=sst2", "model.name=x", "trainer.parallel=pipeline", *arguments])
    cfg.check_processes(1)
    with pytest.raises(UserError, match=what):
        cfg.check_processes(2)


def test_a_base_of_few_bits_is_refused_before_it_is_loaded():
    cfg = compose(["task=sst2", "model.name=x", "trainer.parallel=pipeline", "method=mezo"])
    cfg.model.quantization = "nf4"
    with pytest.raises(UserError, match=r"model\.quantization is about a whole model"):
        cfg.check_processes(2)


def test_the_bubble_of_even_stages_is_the_formula():
    for stages, forwards in ((2, 2), (4, 2), (4, 16)):
        even = [[1.0] * forwards] * stages
        assert idle_share(even) == pytest.approx((stages - 1) / (forwards + stages - 1))
    assert idle_share([[1.0, 1.0], [3.0, 3.0]]) == pytest.approx(1 - 8 / (2 * 7))


@pytest.mark.slow
@pytest.mark.parametrize("case", [*(f"{case} on 4" for case in CASES), "tied from one", "tied from several"])
def test_four_stages_are_the_run_of_one_bit_for_bit(case: str, four: Told):
    is_the_run_of_one(four, case)
