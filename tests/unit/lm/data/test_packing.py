"""Options packed behind one context: the same scores as from separate rows, or separate rows."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.contract.discovered import bind, example, with_fields
from tests.models import CAUSAL, DECODERS, PAD, tiny_bloom, tiny_gemma, tiny_gemma2, tiny_llama, tiny_opt
from tests.unit.lm.objectives.test_objectives import LONG, UNEQUAL, naive_scores, row
from zoft.lm.data import packing as data
from zoft.lm.data.packing import pack
from zoft.lm.data.tokens import OptionCollator
from zoft.lm.logits import packing
from zoft.lm.objectives.cross_entropy import CrossEntropy
from zoft.lm.objectives.options import Options, option_log_probs

COLLATE = OptionCollator(PAD)
SEPARATE = OptionCollator(PAD, one_row_per_option=True)
OTHER = [row(13, [2, 4, 2], 1, 18), row(8, [3, 2, 3], 0, 19), row(11, [4, 2], 1, 20)]
PACKABLE = {family: make for family, make in DECODERS.items() if family != "bloom"}


@pytest.fixture
def log_lines(caplog):
    caplog.set_level(logging.INFO, logger="zoft")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("zoft")]


# ------------------------------------------------------------------------------------------------------ rows to tensors


def seen_from(packed, row_: int, column: int) -> list[tuple[int, int]]:
    """(token, position) of everything that the place attends to."""
    ids, mask = packed["input_ids"], packed["attention_mask"]
    if "segments" in packed:
        allowed = packing.tree_mask(packed["segments"], torch.float32)[row_, 0, column] == 0
    else:
        allowed = mask[row_].bool().clone()
        allowed[ids.shape[1] + column + 1 :] = False
    return list(zip(ids[row_, allowed].tolist(), packed["position_ids"][row_, allowed].tolist(), strict=True))


STARTS_ALIKE = {"sequences": [[9, 8, 7, 4, 5], [9, 8, 7, 4, 6], [9, 8, 7, 4, 6, 5]], "lengths": [2, 2, 3], "label": 0}
PREFIX_OF_ANOTHER = {"sequences": [[9, 8, 7, 4], [9, 8, 7, 4, 6]], "lengths": [1, 2], "label": 0}
MERGED = {"sequences": [[9, 8, 7, 4, 5], [9, 8, 3, 4, 6]], "lengths": [2, 2], "label": 0}
TWICE = {"sequences": [[9, 8, 7, 4, 5], [9, 8, 7, 4, 5]], "lengths": [2, 2], "label": 0}


@pytest.mark.parametrize(
    "rows",
    [LONG, OTHER, UNEQUAL, [STARTS_ALIKE, *LONG], [PREFIX_OF_ANOTHER, *LONG], [MERGED, *LONG], [TWICE, *LONG]],
    ids=["long", "other", "unequal", "starts alike", "prefix of another", "merged", "twice"],
)
def test_every_option_token_is_predicted_from_its_own_sequence_and_nothing_else(rows, monkeypatch):
    monkeypatch.setattr(data, "WORTH", 10.0)
    packed = pack(rows, PAD)
    places = iter(zip(packed["row"].tolist(), packed["column"].tolist(), strict=True))
    for index, example_ in enumerate(rows):
        for sequence, length in zip(example_["sequences"], example_["lengths"], strict=True):
            for token in range(len(sequence) - length, len(sequence)):
                row_, column = next(places)
                assert row_ == index
                assert seen_from(packed, row_, column) == list(zip(sequence[:token], range(token), strict=True))
    assert next(places, None) is None
    assert packed["input_ids"].shape[0] == len(rows)


def test_what_options_share_is_there_once():
    packed = pack([STARTS_ALIKE], PAD)
    assert packed["input_ids"].tolist() == [[9, 8, 7, 4, 6]]  # [9, 8, 7, 4] serves the first two
    assert "segments" not in packed  # one branch only: an ordinary row


def test_single_tokens_need_no_branches():
    rows = [
        {"sequences": [[5, 6, 7, 10], [5, 6, 7, 11]], "lengths": [1, 1], "label": 1},
        {"sequences": [[4, 2], [4, 3], [4, 9]], "lengths": [1, 1, 1], "label": 2},
    ]
    packed = pack(rows, PAD)
    assert {name: tensor.tolist() for name, tensor in packed.items()} == {
        "input_ids": [[5, 6, 7], [PAD, PAD, 4]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "position_ids": [[0, 1, 2], [0, 0, 0]],
        "row": [0, 0, 1, 1, 1],
        "column": [-1, -1, -1, -1, -1],
    }


def test_rows_are_packed_where_that_saves(monkeypatch):
    assert pack([row(2, [9, 9], 0, 1)], PAD) is None  # 18 of 22 cells
    assert pack([row(9, [3, 3], 0, 1)], PAD) is not None  # 13 of 24
    assert "packed" in COLLATE(LONG)
    assert "packed" not in SEPARATE(LONG)
    assert "packed" not in COLLATE([row(6, [1, 1], 0, 1)])  # one row a prompt already
    monkeypatch.setattr(data, "MAX_MASK", 13 * 13 - 1)
    assert pack([row(9, [3, 3], 0, 1)], PAD) is None


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKABLE)
def test_scores_equal_those_of_separate_rows(family, attn, log_lines, monkeypatch):
    if family == "gemma2" and attn == "sdpa":
        pytest.skip("it has none")
    model = DECODERS[family](attn=attn)
    with torch.no_grad():
        Options().predict(model, COLLATE(LONG))  # compared with separate rows, and found equal
        packed, separate = COLLATE(OTHER), SEPARATE(OTHER)
        assert "segments" in packed["packed"]
        wanted = torch.cat([tokens for example_ in naive_scores(model, OTHER) for tokens in example_])
        torch.testing.assert_close(option_log_probs(model, packed), wanted, rtol=2e-6, atol=1e-6)
        for objective in (Options(), CrossEntropy()):
            for result, plain in zip(objective.predict(model, packed), objective.predict(model, separate), strict=True):
                torch.testing.assert_close(result, plain, rtol=2e-6, atol=1e-6)
        rows = []
        model.register_forward_pre_hook(lambda _m, _a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
        Options().loss(model, packed)
    assert rows == [len(OTHER)]
    assert log_lines() == []


@pytest.mark.parametrize("family", PACKABLE)
def test_without_the_blocks_in_the_mask_it_would_differ_and_be_refused(family, log_lines, monkeypatch):
    model = DECODERS[family]()
    monkeypatch.setattr(packing, "tree_mask", lambda s, dtype: causal(s.clamp_max(0), dtype))
    causal = real_mask
    with torch.no_grad():
        for _ in range(2):
            scores = option_log_probs(model, COLLATE(LONG))
            torch.testing.assert_close(scores, option_log_probs(model, SEPARATE(LONG)), rtol=1e-5, atol=1e-6)
    (line,) = log_lines()
    assert line.startswith(
        f"{type(model).__name__}: the options of an example are not packed behind one context: their"
    )


real_mask = packing.tree_mask


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_without_the_positions_it_would_differ_and_be_refused(family, log_lines):
    model = CAUSAL[family]()
    batch = COLLATE(LONG)
    batch["packed"]["position_ids"] = (batch["packed"]["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        scores = option_log_probs(model, batch)
        torch.testing.assert_close(scores, option_log_probs(model, SEPARATE(LONG)), rtol=1e-5, atol=1e-6)
    assert len(log_lines()) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_packed_too(dtype, log_lines):
    model = tiny_llama().to(dtype)
    with torch.no_grad():
        Options().predict(model, COLLATE(LONG))
        packed, plain = (option_log_probs(model, collate(OTHER)) for collate in (COLLATE, SEPARATE))
    torch.testing.assert_close(packed, plain, rtol=3e-2, atol=3e-2)
    assert log_lines() == []


def test_through_an_adapter(log_lines):
    from zoft.lm.models.peft.lora import Lora

    model = Lora().wrap(tiny_llama(), 0).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        Options().predict(model, COLLATE(LONG))
        packed, plain = (option_log_probs(model, collate(OTHER)) for collate in (COLLATE, SEPARATE))
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-6)
    assert log_lines() == []


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_model_without_positions_is_named_once(log_lines):
    model = tiny_bloom()
    with torch.no_grad():
        for rows in (LONG, OTHER):
            packed, plain = (option_log_probs(model, collate(rows)) for collate in (COLLATE, SEPARATE))
            torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-6)
    assert log_lines() == [
        "BloomForCausalLM: the options of an example are not packed behind one context: its forward takes no "
        "position_ids"
    ]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_refused_or_right(kind):
    from zoft.component import create

    model = create("peft", kind, kind).wrap(tiny_llama(), 0).eval()
    with torch.no_grad():
        for rows in (LONG, OTHER):
            packed, plain = (option_log_probs(model, collate(rows)) for collate in (COLLATE, SEPARATE))
            torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("make", "fields"), [(tiny_gemma2, {"sliding_window": 16}), (tiny_opt, {})])
def test_longer_than_a_window_or_the_positions_goes_separately(make, fields, log_lines):
    """The window counts cells of the row: an option's own tokens are further from it than they would be alone."""
    model = make(**fields)
    limit = 16 if fields else 64
    rows = [row(limit - 6, [4, 4, 4], 0, 3)] * 2
    batch = COLLATE(rows)
    assert batch["packed"]["input_ids"].shape[1] > limit
    assert not packing.serves(model, batch["packed"])
    with torch.no_grad():
        packed, plain = (option_log_probs(model, collate(rows)) for collate in (COLLATE, SEPARATE))
    assert torch.equal(packed, plain)
    assert log_lines() == []
    assert packing.serves(model, COLLATE([row(9, [3, 3], 0, 1)])["packed"])


def test_rows_twice_as_long_are_compared_again(log_lines):
    """A window that no field of the config tells of shows in long rows only."""
    model = tiny_gemma()
    short, long = [row(9, [3, 3], 0, 1)], [row(20, [3, 3], 0, 2)]
    with torch.no_grad():
        option_log_probs(model, COLLATE(short))
        layer = model.model.layers[1].self_attn

        def narrow(_module, args, kwargs):
            mask = kwargs["attention_mask"]
            if mask is not None and mask.shape[-1] > 16:
                far = torch.ones(mask.shape[-2:], dtype=torch.bool).tril(-8)
                off = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
                kwargs["attention_mask"] = mask.masked_fill(far, off)
            return args, kwargs

        layer.register_forward_pre_hook(narrow, with_kwargs=True)
        for rows in (long, short):
            packed, plain = (option_log_probs(model, collate(rows * 2)) for collate in (COLLATE, SEPARATE))
            torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-6)
    assert len(log_lines()) == 1
    assert "their scores would be off by" in log_lines()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fault_4_scores_that_depend_a_little_on_the_row_are_refused(dtype, log_lines):
    """So little that 16 bits do not tell it from rounding: a mean over the row, mixed into a layer's output."""
    model = tiny_llama().to(dtype)

    def mixes(_module, _args, output):
        return output + 1e-1 * output.mean(1, keepdim=True)

    model.model.layers[1].mlp.register_forward_hook(mixes)
    with torch.no_grad():
        for rows in (LONG, OTHER):
            packed, plain = (option_log_probs(model, collate(rows)) for collate in (COLLATE, SEPARATE))
            assert torch.equal(packed, plain)
    (line,) = log_lines()
    assert "their scores would be off by" in line


# ------------------------------------------------------------------------------------------------------------- engines


def perturbed_losses(model, session, points, batch, objective) -> torch.Tensor:
    """The same losses with the weights written out, from separate rows."""
    clean = {name: p.data.clone() for name, p in session.weights.tensors.items()}
    losses = []
    for point in points:
        for name, tensor in session.weights.tensors.items():
            if point.direction is not None:
                tensor.data = clean[name] + point.scale * session.coordinates.z(point.direction, name)
        with torch.no_grad():
            losses.append(float(objective.loss(model, batch)))
        for name, tensor in session.weights.tensors.items():
            tensor.data = clean[name]
    return torch.tensor(losses)


@pytest.mark.parametrize("objective", [Options(), CrossEntropy()], ids=["options", "cross_entropy"])
@pytest.mark.parametrize("rows", [LONG, [row(6, [1, 1], 0, 1), row(9, [1, 1], 1, 2)]], ids=["long", "single"])
@pytest.mark.parametrize(
    ("engine", "family"),
    [
        *(("layerwise", family) for family in DECODERS),
        ("in_place", "opt"),
        ("side_path", "opt"),
        ("side_path", "gemma2"),
    ],
)
def test_under_an_engine_the_losses_are_those_of_perturbed_weights(engine, family, rows, objective, log_lines):
    model = DECODERS[family]()
    estimator = with_fields(example("estimator", "central"), num_directions=2, eps=1e-2)
    chosen = example("engine", engine)
    session = bind(chosen, estimator, model, lambda batch: objective.loss(model, batch), "gaussian")
    if hasattr(session, "swapper"):
        session.swapper.piece_bytes = 512  # so small that the head is a large matrix
    points = estimator.points(estimator.directions(3, 1))
    first = session.losses(COLLATE(rows), points)
    assert torch.equal(session.losses(COLLATE(rows), points), first)
    wanted = perturbed_losses(model, session, points, SEPARATE(rows), objective)
    torch.testing.assert_close(first, wanted, rtol=1e-6, atol=0)
    assert not [line for line in log_lines() if "outside" in line]
    assert not [name for module in model.modules() for name in vars(module) if name == "forward"]


def test_exact_derivatives_go_through_the_packed_rows():
    model = tiny_llama()
    estimator = example("estimator", "forward_gradient")
    session = bind(example("engine", "auto"), estimator, model, lambda batch: Options().loss(model, batch), "gaussian")
    points = estimator.points(estimator.directions(3, 1))
    losses = [session.losses(collate(LONG), points) for collate in (COLLATE, COLLATE, SEPARATE)]
    for packed in losses[:2]:
        torch.testing.assert_close(packed, losses[2], rtol=1e-4, atol=1e-5)
