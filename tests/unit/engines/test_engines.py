"""What is particular to each engine; what all of them promise is in tests/contract/test_queries.py."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from tests.models import batch_for, tiny_llama, tiny_opt
from zoft.engines.auto import Auto
from zoft.engines.base import Session
from zoft.engines.forward_mode import ForwardMode
from zoft.engines.in_place import InPlace, _CopySession, _SubtractSession
from zoft.engines.layerwise import Layerwise
from zoft.engines.side_path import SidePath
from zoft.errors import OutOfMemoryError, UserError
from zoft.estimators import Point
from zoft.estimators.central import Central
from zoft.estimators.forward_gradient import ForwardGradient
from zoft.estimators.one_sided import OneSided
from zoft.noise.direction import Direction
from zoft.subspaces import base
from zoft.subspaces.full import Full
from zoft.subspaces.low_rank import LowRank
from zoft.weights.tensors import Weights, perturbed

D = Direction(1, 0, 0)
POINTS = [Point(D, 1e-2), Point(D, -1e-2), Point()]


def bind(engine, model, objective=None, noise="counter") -> Session:
    weights = Weights(model)
    return engine.bind(model, Full().bind(weights, noise), objective or (lambda batch: model(**batch).loss))


def test_auto_chooses_by_what_the_estimator_needs():
    def chosen(estimator, *, subspace=None, trained=None):
        model = tiny_opt()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained is None or trained in name)
        return type(Auto().choose(estimator, (subspace or Full()).bind(Weights(model), estimator.noise), model))

    assert chosen(Central()) is chosen(OneSided()) is Layerwise
    assert chosen(Central(noise="torch_sequential")) is InPlace
    assert chosen(ForwardGradient()) is chosen(ForwardGradient(noise="torch_sequential")) is ForwardMode
    assert chosen(ForwardGradient(num_directions=3), subspace=LowRank()) is ForwardMode
    assert chosen(Central(), subspace=LowRank()) is SidePath
    assert chosen(Central(), trained="layer_norm") is SidePath


@pytest.mark.parametrize("engine", [InPlace(), Layerwise(), SidePath()], ids=lambda e: e.name())
def test_derivatives_are_refused_with_the_mend(engine):
    model = tiny_llama()
    with pytest.raises(UserError, match=f"engine={engine.name()} evaluates losses.*engine=forward_mode"):
        bind(engine, model).losses(batch_for(model), [Point(D, derivative=True)])


# ------------------------------------------------------------------------------------------------------------ in_place


def test_in_place_way_back():
    def chosen(restore, dtype, noise):
        return type(bind(InPlace(restore), nn.Linear(2, 2).to(dtype), noise=noise))

    assert chosen("auto", torch.float32, "counter") is _CopySession
    assert chosen("auto", torch.float32, "torch_sequential") is _SubtractSession
    assert chosen("auto", torch.bfloat16, "torch_sequential") is _CopySession
    assert chosen("copy", torch.float32, "torch_sequential") is _CopySession
    assert chosen("subtract", torch.float32, "counter") is _SubtractSession
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(UserError, match=r"restore=subtract does not bring \w+16 weights back.*engine=layerwise"):
            chosen("subtract", dtype, "counter")
    with pytest.raises(UserError, match=r"in_place.restore must be one of auto, copy, subtract, got 'hope'"):
        InPlace("hope")


@pytest.mark.parametrize("raises", [False, True])
def test_subtract_comes_back_within_float32_and_visits_the_same_points(raises):
    model = tiny_llama()
    batch = batch_for(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = Direction(1, 0, 1)
    points = [*POINTS, Point(other, 1e-2), Point(D, 1e-2)]
    wanted = bind(InPlace("copy"), model).losses(batch, points)
    torch.testing.assert_close(bind(InPlace("subtract"), model).losses(batch, points), wanted, rtol=1e-6, atol=0)
    if raises:
        calls = iter([torch.zeros(()), torch.zeros(())])
        with pytest.raises(StopIteration):
            bind(InPlace("subtract"), model, lambda batch: next(calls)).losses(batch, points)
    for name, parameter in model.named_parameters():
        assert float((parameter.data - before[name]).abs().max()) < 1e-6, name


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", ["draw", "add_", "piece"])
@pytest.mark.parametrize("k", [0, 1, 3, 6, 7, 12, 20, 27, 34])
def test_subtract_interrupted_while_it_moves_comes_back(monkeypatch, k, where, after):
    """Whatever was moved when the signal came is moved back, and nothing else."""
    monkeypatch.setattr(base, "_CHUNK", 5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))  # 5 pieces are trained
    model.requires_grad_(False)
    model[0].requires_grad_(True), model[1].bias.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    session = bind(InPlace("subtract"), model, lambda batch: model(batch).sum())
    owner = session if where == "piece" else session.coordinates
    real, calls = getattr(owner, where), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == k + 1 and not after:
            raise KeyboardInterrupt
        result = real(*args)
        if len(calls) == k + 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, where, interrupted)
    points = [Point(D, 0.5), Point(D, -0.5), Point(Direction(1, 0, 1), 0.5), Point()]
    pieces = sum(len(list(session.coordinates.spans(n, 0, t.numel()))) for n, t in session.weights.tensors.items())
    moves = 4 if where == "piece" else 5  # to the first, across, back and to the third in one walk, back
    if k < moves * pieces:
        with pytest.raises(KeyboardInterrupt):
            session.losses(torch.ones(1, 3), points)
    else:
        session.losses(torch.ones(1, 3), points)
    for name, parameter in model.named_parameters():
        assert float((parameter.data - before[name]).abs().max()) < 1e-6, name
    monkeypatch.undo()
    torch.testing.assert_close(
        session.losses(torch.ones(1, 3), points),
        bind(InPlace("copy"), model, session.objective).losses(torch.ones(1, 3), points),
        rtol=1e-5,
        atol=1e-6,
    )


def test_copy_interrupted_while_it_saves_changes_nothing(monkeypatch):
    model = tiny_llama()
    session, digest = bind(InPlace("copy"), model), Weights(model).digest()
    real, calls = torch.Tensor.clone, []

    def interrupted(tensor):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.losses(batch_for(model), POINTS)
    monkeypatch.undo()
    assert Weights(model).digest() == digest


# ----------------------------------------------------------------------------------------------------------- layerwise


def test_layerwise_never_writes_the_weights_and_perturbs_one_module_at_a_time():
    model = tiny_llama()
    session = bind(Layerwise(), model)
    storages = {name: p.data_ptr() for name, p in model.named_parameters()}
    versions = {name: p._version for name, p in model.named_parameters()}
    most = 0

    def look(_module, _inputs, _output):
        nonlocal most
        most = max(most, len(session.swapper.state.clean))

    handles = [module.register_forward_hook(look) for module in model.modules()]
    session.losses(batch_for(model), POINTS)
    for handle in handles:
        handle.remove()
    assert most == 1  # every module of a Llama that holds weights is a leaf with one tensor
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storages
    assert {name: p._version for name, p in model.named_parameters()} == versions


class ReadsBesideForward(nn.Module):
    """Uses a layer's weight without calling the layer, as torch's own multi-head attention does."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.used, self.read = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.tanh(self.used(x)), self.read.weight, self.read.bias) * self.scale


def test_a_tensor_read_without_its_modules_forward_is_perturbed_all_the_same(caplog):
    model, x = ReadsBesideForward(), torch.ones(2, 4)
    session = bind(Layerwise(), model, lambda batch: model(batch).square().mean())
    clean = {name: p.detach().clone() for name, p in model.named_parameters()}
    with caplog.at_level(logging.WARNING):
        losses = session.losses(x, POINTS)
        again = session.losses(x, POINTS)
    assert [record.message.count("read.weight, read.bias") for record in caplog.records] == [1]  # said once
    assert torch.equal(losses, again)
    assert all(torch.equal(p.data, clean[name]) for name, p in model.named_parameters())
    for point, loss in zip(POINTS, losses, strict=True):
        for name, parameter in model.named_parameters():
            z = session.coordinates.z(D, name)
            parameter.data = perturbed(clean[name], z, point.scale) if point.direction else clean[name]
        torch.testing.assert_close(loss, model(x).square().mean().detach(), rtol=1e-6, atol=0)


def wanted_losses(session, objective, points=POINTS) -> torch.Tensor:
    """The losses with every tensor perturbed by hand for the whole forward."""
    clean = {name: p.data for name, p in session.weights.tensors.items()}
    losses = []
    for point in points:
        for name, tensor in session.weights.tensors.items():
            if point.direction:
                tensor.data = perturbed(clean[name], session.coordinates.z(point.direction, name), point.scale)
        with torch.no_grad():
            losses.append(objective().detach())
        for name, tensor in session.weights.tensors.items():
            tensor.data = clean[name]
    return torch.stack(losses)


class ReadTwice(nn.Module):
    """A layer's weight is used by the layer's own forward and also read beside it, in one of many ways."""

    def __init__(self, way) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.e, self.body, self.way = nn.Embedding(5, 5), nn.Linear(5, 5), way
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.way(torch.tanh(self.body(self.e(x))), self.e.weight)


WAYS = {
    "linear": nn.functional.linear,
    "keyword": lambda h, w: nn.functional.linear(input=h, weight=w),
    "matmul": lambda h, w: h @ w,
    "t": lambda h, w: torch.mm(h, w.t()),
    "T": lambda h, w: h @ w.T,
    "data": lambda h, w: h @ w.data,
    "row": lambda h, w: h * w[1],
    "sequence": lambda h, w: torch.cat([h, w]),
    "einsum": lambda h, w: torch.einsum("ij,kj->ik", h, w),
    "attention": lambda h, w: nn.functional.scaled_dot_product_attention(h[None], w[None], w[None]),
    "gathered": lambda h, w: nn.functional.embedding(torch.arange(3), w) * h,
    "number": lambda h, w: h * float(w[0, 0]) + w.tolist()[1][1],
    "sum": lambda h, w: h * w.norm(),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_read_both_by_its_module_and_beside_it_is_perturbed_for_both(way, caplog):
    model, x = ReadTwice(WAYS[way]), torch.arange(3)
    session = bind(Layerwise(), model, lambda batch: model(batch).square().mean())
    digest = Weights(model).digest()
    with caplog.at_level(logging.WARNING):
        losses = session.losses(x, POINTS)
        again = session.losses(x, POINTS)
    assert torch.equal(losses, wanted_losses(session, lambda: model(x).square().mean()))
    assert torch.equal(losses, again)
    assert Weights(model).digest() == digest
    assert [record.message.count("(e.weight)") for record in caplog.records] == [1]
    assert session.survey.whole_forward == ["e.weight"]


@pytest.mark.parametrize(
    "engine", [Layerwise(), Layerwise(piece_mb=1), SidePath()], ids=["layerwise", "pieces", "side"]
)
@pytest.mark.parametrize("way", WAYS)
def test_fault_22_a_read_that_only_a_later_batch_causes(way, engine, caplog):
    """The branch is taken from the third batch on: its losses are right at once, and it is said."""
    taken = [False]
    model = ReadTwice(lambda h, w: WAYS[way](h, w) if taken[0] else h)
    session = bind(engine, model, lambda batch: model(batch).square().mean())
    digest, x = Weights(model).digest(), torch.arange(3)
    for taken[0] in (False, False, True, True, False):
        with caplog.at_level(logging.WARNING):
            losses = session.losses(x, POINTS)
        torch.testing.assert_close(losses, wanted_losses(session, lambda: model(x).square().mean()), rtol=1e-6, atol=0)
        assert Weights(model).digest() == digest
        assert [r.message.count("(e.weight)") for r in caplog.records] == [1] * (session.survey.whole_forward != [])
        assert type(model.e.weight) is nn.Parameter
    assert session.survey.whole_forward == ["e.weight"]


@pytest.mark.parametrize("side_by_side", [False, True])
def test_fault_22_what_a_module_reads_of_its_own_is_not_looked_at(side_by_side, monkeypatch):
    """Watching costs a call for each function that gets a tensor, so a module's own tensors are not watched in it."""
    if side_by_side:
        monkeypatch.setattr(base, "_KEEP_MODELS", 0)
    model = tiny_llama()
    session, batch, looked = bind(Layerwise(), model), batch_for(model), []
    session.losses(batch, POINTS)
    monkeypatch.setattr("zoft.engines._survey.asks_no_values", lambda func, result: looked.append(func) or True)
    session.losses(batch, POINTS)
    assert not [func for func in looked if func.__name__ != "__get__"]


@pytest.mark.parametrize("way", ["linear", "data", "number"])
def test_fault_22_a_later_read_is_found_where_forwards_run_side_by_side(way, monkeypatch):
    monkeypatch.setattr(base, "_KEEP_MODELS", 0)
    taken = [False]
    model, x = ReadTwice(lambda h, w: WAYS[way](h, w) if taken[0] else h), torch.arange(3)
    session = bind(Layerwise(), model, lambda batch: model(batch).square().mean())
    for taken[0] in (False, True, True):
        losses = session.losses(x, POINTS)
        torch.testing.assert_close(losses, wanted_losses(session, lambda: model(x).square().mean()), rtol=1e-6, atol=0)
        assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}
    assert session.survey.whole_forward == ["e.weight"]


def test_fault_22_a_module_that_a_later_batch_passes_by():
    """Its weight is used without it: a mixture's expert that is called by hand, for one."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x)
            return self.b(h) if x.sum() > 0 else nn.functional.linear(h, self.b.weight, self.b.bias)

    model = Model()
    session = bind(Layerwise(), model, lambda batch: model(batch).square().mean())
    for x in (torch.ones(2, 4), -torch.ones(2, 4)):
        losses = session.losses(x, POINTS)
        assert torch.equal(losses, wanted_losses(session, lambda x=x: model(x).square().mean()))
    assert set(session.survey.whole_forward) == {"b.weight", "b.bias"}


def test_shapes_and_dtypes_read_beside_the_forward_are_no_reads(caplog):
    def look(h, w):
        assert w.dim() == len(w.shape) == w.ndim
        assert w.size(0) == w.numel() // len(w) == w.stride(0)
        return h.to(w.device, w.dtype) * int(w.requires_grad and w.is_floating_point() and w.is_contiguous())

    model, calls = ReadTwice(look), []
    session = bind(Layerwise(), model, lambda batch: calls.append(1) or model(batch).square().mean())
    session.losses(torch.arange(3), POINTS)
    assert not caplog.records
    assert session.survey.whole_forward == []
    assert len(calls) == len(POINTS)


def test_tensors_read_before_their_module_is_entered():
    """torch's older weight norm computes the weight in a forward pre-hook, from tensors of the same module."""
    with pytest.warns(FutureWarning):
        model = nn.utils.weight_norm(nn.Linear(4, 4))
    x = torch.ones(2, 4)
    session = bind(Layerwise(), model, lambda batch: model(batch).square().mean())
    losses = session.losses(x, POINTS)
    assert torch.equal(losses, wanted_losses(session, lambda: model(x).square().mean()))


@pytest.mark.parametrize("training", [True, False])
def test_attention_of_torch_itself(training):
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    session = bind(Layerwise(), model, lambda batch: model(batch).square().sum())
    losses = session.losses(x, POINTS)
    torch.testing.assert_close(losses, wanted_losses(session, lambda: model(x).square().sum()), rtol=1e-6, atol=0)
    assert torch.equal(losses, session.losses(x, POINTS))


def test_a_compiled_model_gives_the_same_losses_and_its_reads_are_found(caplog):
    class Deep(ReadTwice):
        def __init__(self) -> None:
            super().__init__(nn.functional.linear)
            self.body = nn.Sequential(*(nn.Linear(5, 5) for _ in range(12)))

    model, x = Deep(), torch.arange(3)
    compiled = torch.compile(model, backend="eager")
    session = bind(Layerwise(), model, lambda batch: compiled(batch).square().mean())
    wanted = wanted_losses(session, lambda: model(x).square().mean())
    with caplog.at_level(logging.WARNING):
        assert torch.equal(session.losses(x, POINTS), wanted)
        assert torch.equal(session.losses(x, POINTS), wanted)
    assert session.survey.whole_forward == ["e.weight"]
    assert not [record for record in caplog.records if "recompile_limit" in record.getMessage()]


def test_deberta_reads_its_embeddings_again_in_its_head():
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = DebertaV2ForMaskedLM(DebertaV2Config(vocab_size=50, legacy=False, **sizes)).eval()
    ids = torch.arange(8).view(1, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    session = bind(Layerwise(), model)
    losses = session.losses(batch, POINTS)
    torch.testing.assert_close(losses, wanted_losses(session, lambda: model(**batch).loss), rtol=1e-6, atol=0)
    assert any("word_embeddings" in name for name in session.survey.whole_forward)


def test_a_forward_cut_short_inside_the_objective_leaves_nothing_perturbed():
    """The frozen prefix does this: it stops a forward halfway and goes on."""
    model = tiny_llama()
    batch = batch_for(model)
    inner = model.model.layers[1].mlp.up_proj

    def objective(inputs):
        def stop(*_):
            raise InterruptedError

        handle = inner.register_forward_pre_hook(stop)
        with pytest.raises(InterruptedError):
            model(**inputs)
        handle.remove()
        assert not session.swapper.state.clean
        return model(**inputs).loss

    session = bind(Layerwise(), model, objective)
    losses = session.losses(batch, POINTS)
    assert torch.equal(losses, bind(Layerwise(), model).losses(batch, POINTS))


def test_every_query_is_counted_once_after_the_first_look():
    model, calls = tiny_llama(), []
    session = bind(Layerwise(), model, lambda batch: calls.append(1) or model(**batch).loss)
    session.losses(batch_for(model), POINTS)
    assert len(calls) == len(POINTS)


def test_a_tied_tensor_inside_two_forwards_at_once():
    class Inner(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return x @ self.weight

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3) * 0.5)
            self.inner = Inner(self.weight)

        def forward(self, x):
            return self.inner(x) @ self.weight  # still inside its own forward after the inner one has ended

    model, x = Outer(), torch.ones(1, 3)
    session = bind(Layerwise(), model, lambda batch: model(batch).sum())
    loss = session.losses(x, [Point(D, 0.1)])
    moved = perturbed(torch.eye(3) * 0.5, session.coordinates.z(D, "weight"), 0.1)
    torch.testing.assert_close(loss[0], (x @ moved @ moved).sum(), rtol=1e-6, atol=0)
    assert torch.equal(model.weight.data, torch.eye(3) * 0.5)


# -------------------------------------------------------------------------------------------------------- forward_mode


def test_forward_mode_refuses_differences():
    model = tiny_llama()
    with pytest.raises(UserError, match="engine=forward_mode computes exact derivatives"):
        bind(ForwardMode(), model).losses(batch_for(model), POINTS)


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_derivatives_equal_those_of_backpropagation(make):
    model = make()
    batch = batch_for(model)
    session = bind(ForwardMode(), model)
    points = ForwardGradient(num_directions=2).points([D, Direction(1, 0, 1)])
    losses = session.losses(batch, points)
    loss = model(**batch).loss
    grads = dict(
        zip(session.weights.tensors, torch.autograd.grad(loss, list(session.weights.tensors.values())), strict=True)
    )
    slopes = [sum(float((grads[n] * session.coordinates.z(p.direction, n)).sum()) for n in grads) for p in points[1:]]
    torch.testing.assert_close(losses, torch.tensor([float(loss.detach()), *slopes]), rtol=1e-4, atol=1e-5)


def test_an_objective_without_a_derivative_says_so():
    model = tiny_llama()
    session = bind(ForwardMode(), model, lambda batch: model(**batch).logits.argmax(-1).float().mean())
    with pytest.raises(UserError, match=r"no derivative along the trainable weights.*estimator=central"):
        session.losses(batch_for(model), [Point(), Point(D, derivative=True)])
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_the_clean_loss_alone_needs_no_derivative():
    model = tiny_llama()
    batch = batch_for(model)
    assert bind(ForwardMode(), model).losses(batch, [Point()]).tolist() == [float(model(**batch).loss.detach())]


# --------------------------------------------------------------------------------------------------------------- apply


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_step_is_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 16, bias=False)
    layer.weight.data = torch.randn(16, 16, generator=generator, dtype=torch.float64).to(dtype)
    before, step = layer.weight.data.clone(), 1e-2 * torch.randn(40, generator=generator)
    wide = torch.promote_types(dtype, torch.float32)
    wanted = (before.view(-1)[3:43].to(wide) - step.to(wide)).to(dtype)
    bind(Layerwise(), layer).apply_("weight", 3, 43, step.clone())
    assert torch.equal(layer.weight.data.view(-1)[3:43], wanted)
    assert torch.equal(layer.weight.data.view(-1)[:3], before.view(-1)[:3])
    assert torch.equal(layer.weight.data.view(-1)[43:], before.view(-1)[43:])


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("engine", "knob"),
    [
        (Layerwise(piece_mb=3), r"engine.piece_mb \(now 3\)"),
        (SidePath(tokens_in_flight=7), r"engine.tokens_in_flight \(now 7\)"),
        (InPlace("copy"), "engine=layerwise"),
        (InPlace("subtract"), "task.max_length"),
        (ForwardMode(), "estimator=central"),
    ],
    ids=lambda value: value.name() if isinstance(value, InPlace | Layerwise | SidePath | ForwardMode) else "",
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), MemoryError()]
)
def test_running_out_of_memory_names_what_to_lower_and_leaves_the_weights(engine, knob, error):
    model, calls = tiny_llama(), []
    derivative = isinstance(engine, ForwardMode)

    def objective(batch):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return model(**batch).loss

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    points = [Point(D, 0 if derivative else s * 1e-2, derivative) for s in (1, -1)]
    with pytest.raises(OutOfMemoryError, match=f"(?i)out of memory.*weights are what they were.*{knob}"):
        bind(engine, model, objective).losses(batch_for(model), points)
    for name, parameter in model.named_parameters():
        assert float((parameter.data - before[name]).abs().max()) < 1e-6, name


def test_other_errors_stay_what_they_are():
    model = tiny_llama()
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$") as caught:
        bind(Layerwise(), model, lambda _: (_ for _ in ()).throw(RuntimeError("shapes do not fit"))).losses({}, POINTS)
    assert not isinstance(caught.value, OutOfMemoryError)


def test_a_module_that_runs_twice_is_named_and_moves_once(caplog):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.again(self.again(self.first(x)))

    model, x = Twice(), torch.ones(1, 3)
    session = bind(Layerwise(), model, lambda batch: model(batch).sum())
    with caplog.at_level(logging.WARNING):
        losses = session.losses(x, POINTS)
    assert "1 modules run more than once in a forward (the one with again.weight)" in caplog.text
    torch.testing.assert_close(losses, bind(InPlace("copy"), model, session.objective).losses(x, POINTS))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("engine", [Layerwise(), SidePath(), InPlace("copy")], ids=lambda e: e.name())
def test_a_frozen_quantised_base_under_a_trained_adapter(engine):
    torch.manual_seed(0)
    base_layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).requires_grad_(False)
    quantised = torch.ao.quantization.quantize_dynamic(base_layers, {nn.Linear}, dtype=torch.qint8)

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.adapter = quantised, nn.Linear(8, 8)

        def forward(self, x):
            return self.base(x) + self.adapter(x)

    model, x = Adapted(), torch.randn(5, 8)
    session = bind(engine, model, lambda batch: model(batch).square().mean())
    losses = session.losses(x, POINTS)
    wanted = []
    for point in POINTS:
        moved = {
            name: p.data
            if point.direction is None
            else p.data + point.scale * session.coordinates.z(point.direction, name)
            for name, p in session.weights.tensors.items()
        }
        wanted.append((quantised(x) + x @ moved["adapter.weight"].T + moved["adapter.bias"]).square().mean())
    torch.testing.assert_close(losses, torch.stack(wanted), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------- what a review has found, mended


def test_scratch_of_modules_inside_modules_that_hold_weights_themselves():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inside = nn.Parameter(torch.randn(400, 64)), nn.Linear(8, 64)

        def forward(self, x):
            return self.inside(x) + self.table.mean(0)

    torch.manual_seed(0)
    model, x = nn.Sequential(Holds(), nn.Linear(64, 512)), torch.randn(3, 8)
    objective = lambda batch: model(batch).square().mean()  # noqa: E731
    session = bind(Layerwise(), model, objective)
    for _ in range(3):
        losses = session.losses(x, POINTS)
    torch.testing.assert_close(losses, bind(InPlace("copy"), model, objective).losses(x, POINTS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("engine", [Layerwise(), SidePath()], ids=lambda e: e.name())
def test_a_model_that_was_compiled_and_called_before_is_perturbed_all_the_same(engine):
    model = tiny_llama()
    batch = batch_for(model)
    compiled = torch.compile(model, backend="eager")
    wanted = bind(InPlace("copy"), compiled, lambda inputs: model(**inputs).loss).losses(batch, POINTS)
    with torch.no_grad():
        compiled(**batch)
    session = bind(engine, compiled, lambda inputs: compiled(**inputs).loss)
    for _ in range(3):
        torch.testing.assert_close(session.losses(batch, POINTS), wanted, rtol=1e-5, atol=0)
    torch._dynamo.reset()


def test_an_objective_that_draws_goes_one_point_after_the_other(monkeypatch, caplog):
    monkeypatch.setattr(base, "_KEEP_MODELS", 0)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(2, 4)

    def objective(batch):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            hidden = model[0](batch)
            return model[1](hidden + torch.randn(2, 4)).square().mean()

    session, before = bind(Layerwise(), model, objective), torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            losses = session.losses(x, POINTS)
    torch.testing.assert_close(losses, bind(InPlace("copy"), model, objective).losses(x, POINTS), rtol=1e-6, atol=0)
    assert "draws random numbers" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_module_makes_once_can_be_trained_through_later():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.table = nn.Linear(4, 4), None

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(4.0).cos()
            return self.layer(x) * self.table

    for engine in (Layerwise(), InPlace("copy"), SidePath()):
        model = Keeps()
        bind(engine, model, lambda batch, model=model: model(batch).sum()).losses(torch.ones(1, 4), POINTS)
        model(torch.ones(1, 4)).sum().backward()


def test_errors_about_memory_that_are_not_for_want_of_it_stay_what_they_are():
    model = tiny_llama()
    for text in ("CUDA error: an illegal memory access was encountered", "refers to a single memory location"):
        with pytest.raises(RuntimeError, match=text) as caught:
            bind(Layerwise(), model, lambda _, text=text: (_ for _ in ()).throw(RuntimeError(text))).losses({}, POINTS)
        assert not isinstance(caught.value, OutOfMemoryError)


def test_parameters_that_are_not_contiguous_are_made_so():
    layer = nn.Linear(3, 4)
    layer.weight.data = torch.randn(3, 4).T
    weights = Weights(layer)
    assert weights.tensors["weight"].is_contiguous()


def test_forwards_that_would_take_too_much_memory_side_by_side_go_apart_and_say_so(monkeypatch, caplog):
    monkeypatch.setattr(base, "_KEEP_MODELS", 0)
    model = tiny_llama()
    session, batch = bind(Layerwise(), model), batch_for(model)
    session.swapper.piece_bytes = 100
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            session.losses(batch, POINTS)
    assert caplog.text.count("points go one after the other") == 1
    assert [len(group) for group in session.groups(POINTS)] == [1, 1, 1]
    session.swapper.piece_bytes = 1 << 24
    session.losses(batch, POINTS)
    assert [len(group) for group in session.groups(POINTS)] == [2, 1]


def test_fault_22_a_compiled_model_is_looked_at_now_and_then(monkeypatch):
    monkeypatch.setattr("zoft.engines._survey._EVERY", 3)
    taken = [False]
    model, x = ReadTwice(lambda h, w: h @ w if taken[0] else h), torch.arange(3)
    model.body.compile(backend="eager")
    session = bind(Layerwise(), model, lambda batch: model(batch).square().mean())
    session.losses(x, POINTS)
    taken[0] = True
    for _ in range(3):
        losses = session.losses(x, POINTS)
    assert session.survey.whole_forward == ["e.weight"]
    torch.testing.assert_close(losses, wanted_losses(session, lambda: model(x).square().mean()), rtol=1e-6, atol=0)
