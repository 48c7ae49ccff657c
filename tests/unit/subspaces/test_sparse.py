"""Sparse directions: which elements move, how far, and that the mask stays what it is while a step is measured."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from zoft.engines.in_place import InPlace
from zoft.errors import UserError
from zoft.lm.models.load import load_model, load_tokenizer
from zoft.noise.direction import Direction
from zoft.noise.source import LAWS
from zoft.step.method import Method
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer
from zoft.subspaces import _masks, base
from zoft.subspaces._masks import Mask, smallest
from zoft.subspaces.full import Full
from zoft.subspaces.sparse import BoundSparse, Sparse
from zoft.weights.tensors import Weights


class Small(nn.Module):
    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        for name, shape in {"a": (31, 17), "b": (5, 3, 2), "norm": (9,)}.items():
            value = torch.randn(shape, generator=random).to(dtype)
            self.register_parameter(name, nn.Parameter(value))


def bound(model: nn.Module | None = None, **fields) -> BoundSparse:
    return Sparse(**fields).bind(Weights(model or Small()))


def moved(coordinates: BoundSparse, name: str, step: int = 0, seed: int = 0, probe: int = 0) -> torch.Tensor:
    return coordinates.z(Direction(seed, step, probe), name).view(-1) != 0


# --------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 1001])
@pytest.mark.parametrize("piece", [8, 1 << 20])
def test_a_packed_mask_gives_back_its_bits(size, piece, monkeypatch):
    monkeypatch.setattr(_masks, "_PIECE", piece)
    moves = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.3
    mask = Mask.of(moves)
    assert mask.bits.dtype == torch.uint8
    assert len(mask.bits) == -(-size // 8)
    assert mask.count == int(moves.sum())
    for start, stop in [(0, size), (size // 3, size), (size // 3, 2 * size // 3), (size, size)]:
        assert torch.equal(mask.piece(start, stop).bool(), moves[start:stop])
    if size:
        places = torch.randint(size, (4, 5), generator=torch.Generator().manual_seed(0))
        assert torch.equal(mask.at(places).bool(), moves[places])


@pytest.mark.parametrize("piece", [8, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_smallest_are_those_that_sorting_finds_with_their_ties(dtype, piece, monkeypatch):
    monkeypatch.setattr(_masks, "_PIECE", piece)
    weight = torch.randn(40, 13, generator=torch.Generator().manual_seed(3)).to(dtype)
    weight[3] = 0.0
    weight[4, :3] = -0.0
    weight[5, 0], weight[5, 1], weight[5, 2] = torch.inf, -torch.inf, torch.nan
    size = weight.abs().float().view(-1)
    for count in (1, 7, 16, 17, 104, 400, 517):
        threshold = size.nan_to_num(torch.inf).sort().values[count - 1]
        assert torch.equal(smallest(weight, count).piece(0, size.numel()).bool(), size <= threshold)


def test_the_smallest_weights_of_every_matrix_move_and_vectors_in_full():
    coordinates = bound(keep=0.2)
    for name, tensor in coordinates.weights.tensors.items():
        moves = moved(coordinates, name)
        if name == "norm":
            assert moves.all()
            continue
        assert int(moves.sum()) == round(0.2 * tensor.numel())
        size = tensor.data.abs().view(-1)
        assert float(size[moves].max()) < float(size[~moves].min())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("choose", ["magnitude", "random"])
def test_the_numbers_are_those_of_the_full_space_over_the_root_of_the_share(choose, law):
    model, direction = Small(), Direction(3, 4, 1)
    sparse, full = bound(model, choose=choose, law=law), Full(law).bind(Weights(model))
    for name, tensor in model.named_parameters():
        mask = sparse.z(direction, name) != 0
        share = float(mask.float().mean())
        assert sparse.gain(name) == pytest.approx(share**-0.5)
        torch.testing.assert_close(sparse.z(direction, name), full.z(direction, name) * mask * share**-0.5)
        assert sparse.shape(name) == tensor.shape


def test_the_length_is_that_of_the_full_space_whatever_the_share():
    for keep in (0.05, 0.5, 1.0):
        coordinates = bound(nn.Linear(300, 200, bias=False), keep=keep)
        z = coordinates.z(Direction(0, 0), "weight")
        assert float(z.square().mean()) == pytest.approx(1, abs=0.06)
        assert coordinates.dimension(Direction(0, 0)) == round(keep * 60_000)


def test_the_papers_step_is_this_one_at_a_smaller_radius_and_rate():
    """Without 1 / sqrt(s): eps sqrt(s) here is the paper's eps, and lr s the paper's learning rate."""
    model, eps, lr = nn.Linear(40, 30, bias=False), 1e-2, 1e-3
    coordinates = bound(model, keep=0.25)
    z = coordinates.z(Direction(0, 0), "weight")
    share, papers = 0.25, z * 0.25**0.5
    torch.testing.assert_close(eps * share**0.5 * z, eps * papers)
    slope = float((papers * model.weight.data).sum())  # of |theta|^2 / 2
    torch.testing.assert_close(lr * share * float((z * model.weight.data).sum()) * z, lr * slope * papers)


# ------------------------------------------------------------------------------------------------------ when it changes


def test_the_mask_is_made_of_clean_weights_when_an_interval_begins_and_stays_through_it():
    model = Small()
    coordinates = bound(model, interval=3)
    coordinates.begin(Direction(0, 0))
    first = moved(coordinates, "a")
    model.a.data.neg_().add_(3.0)
    for step in (0, 1, 2):
        coordinates.begin(Direction(0, step))
        assert torch.equal(moved(coordinates, "a", step), first)
        assert torch.equal(moved(coordinates, "a", step, probe=1), first)
    coordinates.begin(Direction(0, 3))
    assert torch.equal(moved(coordinates, "a", 3), moved(bound(model), "a"))
    assert not torch.equal(moved(coordinates, "a", 3), first)


def test_perturbing_the_weights_in_place_does_not_change_the_mask():
    model = Small()
    coordinates, direction = bound(model), Direction(0, 0)
    coordinates.keeps = False
    coordinates.begin(direction)
    z, clean = coordinates.z(direction, "a").clone(), model.a.data.clone()
    coordinates.add_(model.a.data.view(-1), direction, "a", 0, 100.0)
    assert torch.equal(coordinates.z(direction, "a"), z)
    coordinates.add_(model.a.data.view(-1), direction, "a", 0, -100.0)
    torch.testing.assert_close(model.a.data, clean, rtol=1e-4, atol=1e-4)
    still = coordinates.z(direction, "a") == 0
    assert torch.equal(model.a.data[still], clean[still])


def test_before_any_step_it_is_made_of_the_weights_as_they_are():
    model = Small()
    coordinates = bound(model)
    first = moved(coordinates, "a")
    model.a.data.neg_().add_(3.0)
    assert torch.equal(moved(coordinates, "a", step=7), first)


def test_a_random_mask_is_drawn_anew_for_every_interval_seed_and_tensor():
    model = nn.ModuleDict({n: nn.Linear(100, 100, bias=False) for n in "ab"})
    coordinates = bound(model, choose="random", interval=2, keep=0.3)
    first = moved(coordinates, "a.weight")
    assert 0.27 < float(first.float().mean()) < 0.33
    assert torch.equal(moved(coordinates, "a.weight", 1), first)
    assert torch.equal(moved(coordinates, "a.weight", 1, probe=3), first)
    for other in (
        moved(coordinates, "a.weight", 2),
        moved(coordinates, "b.weight"),
        moved(coordinates, "a.weight", seed=1),
    ):
        both = float((first & other).float().mean())
        assert 0.07 < both < 0.11  # independent: 0.3 * 0.3
    assert torch.equal(moved(coordinates, "a.weight"), first)
    assert not coordinates.state_dict()


def test_a_random_share_of_one_moves_everything_and_a_tiny_one_hardly_anything():
    assert moved(bound(choose="random", keep=1.0), "a").all()
    nothing = bound(choose="random", keep=1e-9)
    assert not nothing.moves(Direction(0, 0), "a")
    assert not nothing.z(Direction(0, 0), "a").any()
    assert nothing.gain("a") == 1.0
    assert nothing.moves(Direction(0, 0), "norm")
    assert nothing.dimension(Direction(0, 0)) == 9


def test_saved_masks_come_back_between_refreshes():
    model = Small()
    one = bound(model, interval=4)
    one.begin(Direction(0, 4))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    wanted = moved(one, "a", 5)
    model.a.data.neg_().add_(3.0)
    two = bound(model, interval=4)
    two.load_state_dict(torch.load(file, weights_only=True))
    two.begin(Direction(0, 5))
    assert torch.equal(moved(two, "a", 5), wanted)
    two.begin(Direction(0, 8))
    assert not torch.equal(moved(two, "a", 8), wanted)
    two.load_state_dict({})  # a checkpoint without masks: they are made anew
    assert two._masks


def test_a_state_saved_before_the_first_step_is_loaded_too():
    two = bound()
    two.load_state_dict(bound().state_dict())
    two.begin(Direction(0, 0))
    assert int(moved(two, "a").sum()) == round(0.2 * 31 * 17)


def test_steps_across_masks_are_not_summed():
    coordinates = bound(interval=2)
    terms = [(Direction(0, 1), 1.0), (Direction(0, 2), 1.0)]
    with pytest.raises(UserError, match=r"shares its mask between the directions.*use subspace=full"):
        coordinates.combination("a", 0, 9, terms)
    coordinates.combination("a", 0, 9, [(Direction(0, 2), 1.0), (Direction(5, 3), 1.0)])  # seeds do not matter to it
    with pytest.raises(UserError, match="shares its mask"):
        bound(choose="random").combination("a", 0, 9, [(Direction(0, 2), 1.0), (Direction(5, 2), 1.0)])


def test_lifting_keeps_what_stands_still_where_it_is():
    """An optimizer's state may be dense, after several masks: what it makes of it is masked."""
    coordinates, direction = bound(), Direction(0, 0)
    ones = torch.ones(31 * 17)
    lifted = coordinates.lift(direction, "a", ones, 0, 0, 31 * 17)
    mask = moved(coordinates, "a")
    torch.testing.assert_close(lifted, mask * coordinates.gain("a"))
    assert coordinates.same_basis("norm", direction, Direction(0, 999))
    assert coordinates.same_basis("a", direction, Direction(0, 49))
    assert not coordinates.same_basis("a", direction, Direction(0, 50))


def test_orthogonal_directions_are_so_over_what_moves(monkeypatch):
    monkeypatch.setattr(base, "_CHUNK", 64)
    coordinates = bound()
    coordinates.arrange("orthogonal", 4)
    directions = [Direction(0, 0, probe) for probe in range(4)]
    stretch = {"a": coordinates.gain("a"), "b": coordinates.gain("b"), "norm": 1.0}
    z = torch.stack(
        [
            torch.cat([coordinates.draw(d, n, 0, t.numel()) for n, t in coordinates.weights.tensors.items()])
            for d in directions
        ]
    ).double()
    wanted = coordinates.dimension(directions[0]) * torch.eye(4).double()
    torch.testing.assert_close(z @ z.T, wanted, rtol=1e-5, atol=1e-3)
    assert all(value >= 1 for value in stretch.values())


# ---------------------------------------------------------------------------------------------------------------- files


def saved(tmp_path, **masks) -> str:
    path = tmp_path / "mask.safetensors"
    save_file(masks, path)
    return str(path)


def test_a_supplied_mask_says_what_moves_and_what_it_leaves_out_stands_still(tmp_path):
    a = torch.zeros(31, 17, dtype=torch.bool)
    a[2, 3] = a[30, 16] = True
    path = saved(tmp_path, a=a, norm=torch.tensor([1, 8]))
    coordinates, direction = bound(choose="mask", mask=path), Direction(0, 0)
    assert torch.equal(moved(coordinates, "a"), a.view(-1))
    assert moved(coordinates, "norm").nonzero().view(-1).tolist() == [1, 8]
    assert [n for n in coordinates.weights.tensors if coordinates.moves(direction, n)] == ["a", "norm"]
    assert [n for n in coordinates.weights.tensors if coordinates.ever_moves(n)] == ["a", "norm"]
    assert not coordinates.z(direction, "b").any()
    assert coordinates.dimension(direction) == 4
    share = 4 / (31 * 17 + 9)  # one for all: their steps relative to each other are those of the full space
    assert coordinates.gain("a") == coordinates.gain("norm") == pytest.approx(share**-0.5)
    out = torch.empty(30)
    coordinates.perturb(direction, "b", 0, [1.0], [out])
    assert torch.equal(out, coordinates.weights.tensors["b"].data.view(-1))
    rows = bound(
        nn.ModuleDict({"x": nn.Linear(4, 2)}), choose="mask", mask=saved(tmp_path, **{"x.bias": torch.tensor([0])})
    )
    assert torch.equal(
        rows.perturbed_rows(direction, "x.weight", torch.tensor([1]), 9.0), rows.weights.tensors["x.weight"].data[[1]]
    )
    assert not coordinates.state_dict()


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ({"c": torch.ones(3, dtype=torch.bool)}, r"a mask for c, which is not trained.*Known: a, b, norm"),
        ({"a": torch.ones(17, 31, dtype=torch.bool)}, r"mask of a must be .*shape \[31, 17\].*got bool of shape \[17"),
        ({"a": torch.ones(31, 17)}, r"mask of a must be bool or uint8.*got float32"),
        ({"a": torch.tensor([527])}, r"an index for a is outside of its 527 elements"),
        ({"a": torch.tensor([-1])}, r"an index for a is outside"),
        ({"a": torch.zeros(31, 17, dtype=torch.uint8)}, r"lets no weight move"),
        ({}, r"lets no weight move"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_with_a_sentence(masks, says, tmp_path):
    with pytest.raises(UserError, match=says):
        bound(choose="mask", mask=saved(tmp_path, **masks))


def test_a_file_that_is_none_is_refused_before_anything_is_loaded(tmp_path):
    sparse = Sparse(choose="mask", mask=str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match=r"mask=.*none.safetensors: there is no such file.*score_weights"):
        Method.of(subspace=sparse)
    (tmp_path / "none.safetensors").write_text("nonsense")
    with pytest.raises(UserError, match=r"is no .safetensors file that can be read"):
        sparse.bind(Weights(Small()))


def test_settings_that_do_not_go_together_are_refused():
    for fields in ({"choose": "mask"}, {"mask": "x"}, {"choose": "random", "mask": "x"}):
        with pytest.raises(UserError, match=r"sparse.choose=\w+ and sparse.mask=\w+ do not go together"):
            Sparse(**fields)
    with pytest.raises(UserError, match=r"sparse.choose must be one of magnitude, random, gradient, mask, got 'large'"):
        Sparse(choose="large")
    for keep in (0.0, 1.1, -0.1):
        with pytest.raises(UserError, match=r"sparse.keep must be above 0 and at most 1"):
            Sparse(keep=keep)
    with pytest.raises(UserError, match=r"noise=torch_sequential.*subspace=sparse needs estimator.noise=counter"):
        Sparse().bind(Weights(Small()), "torch_sequential")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_have_the_same_directions(dtype):
    model = Small(dtype)
    ours, wide = bound(model, choose="random"), bound(Small(), choose="random")
    for name in ("a", "b", "norm"):
        assert torch.equal(ours.z(Direction(0, 0), name), wide.z(Direction(0, 0), name))


# -------------------------------------------------------------------------------------------------------------- scores

MODEL = Path(__file__).parents[2] / "assets" / "mezo_trajectory" / "model"


def score_weights():
    spec = importlib.util.spec_from_file_location(
        "score_weights", Path(__file__).parents[3] / "scripts" / "score_weights.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scored_weights_are_those_of_the_largest_squared_gradients(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    texts = ["a fine film", "it was long", "and so on and on"]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out, scripted = tmp_path / "deep" / "mask.safetensors", score_weights()
    arguments = ["--model", str(MODEL), "--rows", str(rows), "--keep", "0.01", "--batch-size", "2", "--out", str(out)]
    scripted.main(arguments)
    model = load_model(str(MODEL))
    coordinates = bound(model, choose="mask", mask=str(out))
    count = round(0.01 * coordinates.weights.num_elements)
    assert coordinates.dimension(Direction(0, 0)) == count
    assert f"{count} weights of" in capsys.readouterr().out

    tokenizer, squares = load_tokenizer(str(MODEL)), torch.zeros(coordinates.weights.num_elements)
    for batch in scripted.batches_of(texts, tokenizer, 2, 512, "cpu"):
        model.zero_grad()
        model(**batch).loss.backward()
        squares += torch.cat([p.grad.view(-1) for p in coordinates.weights.tensors.values()]).square()
    mask = torch.cat([coordinates.z(Direction(0, 0), n).view(-1) != 0 for n in coordinates.weights.tensors])
    assert float(squares[mask].min()) >= float(squares[~mask].max())


def test_what_cannot_be_scored_is_said(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": ""}) + "\n")
    same = ["--model", str(MODEL), "--out", str(tmp_path / "mask.safetensors")]
    for more, says in (
        (["--rows", str(tmp_path / "none.jsonl")], "there is no data file"),
        (["--rows", str(rows), "--keep", "2"], "--keep must be above 0"),
        (["--rows", str(rows), "--batches", "0"], "must be at least 1"),
        (["--rows", str(rows), "--column", "words"], "has no 'words'"),
        (["--rows", str(rows)], "no text has two tokens or more"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{says}"):
            score_weights().main([*same, *more])
    assert not (tmp_path / "mask.safetensors").exists()


# ---------------------------------------------------------------------------------------------------- by gradients


def test_by_gradient_the_largest_squares_of_all_tensors_move_from_one_backward_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    x, keep = torch.randn(3, 6), 0.1
    method = Method.of(Sparse(choose="gradient", keep=keep), "central", "mean", "sgd")
    session = InPlace().bind(model, method.bind(Weights(model)), lambda batch: model(batch).square().mean())
    zo_optimizer = ZOOptimizer([{"params": list(model.parameters())}], method.optimizer, session, 1e-2)
    grads = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    largest = torch.cat([g.flatten() for g in grads]).square().topk(round(keep * session.weights.num_elements))[0][-1]
    assert [method.queries_at(step) for step in (0, 1)] == [5, 2]
    asked = StepQueries(method, zo_optimizer).estimate(x, method.estimator.directions(0, 0))
    assert asked.num_queries == 5
    coordinates = session.coordinates
    for (name, tensor), gradient in zip(session.weights.tensors.items(), grads, strict=True):
        z = coordinates.z(Direction(0, 0), name) if coordinates.moves(Direction(0, 0), name) else torch.zeros(())
        assert torch.equal(z.expand(tensor.shape) != 0, gradient.square() >= largest), name
        assert tensor.grad is None
    zo_optimizer.apply(asked)
    asked = StepQueries(method, zo_optimizer).estimate(x, method.estimator.directions(0, 1))
    assert asked.num_queries == 2  # it has looked once for the run
    again = Sparse(choose="gradient", keep=keep).bind(Weights(model))
    again.load_state_dict(coordinates.state_dict())
    assert torch.equal(again.z(Direction(0, 3), "0.weight"), coordinates.z(Direction(0, 3), "0.weight"))
