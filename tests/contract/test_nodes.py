"""Node directions: the gradient of outputs is autograd's, what is applied is what was measured, whatever the layer."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests import models
from tests.node_reader import ModelReader
from zoft.errors import UserError
from zoft.estimators.nodes import Nodes as Estimator
from zoft.noise.direction import Direction
from zoft.optimizers._factors import Factors
from zoft.optimizers.whiten import Whiten
from zoft.step.estimate import StepEstimate
from zoft.step.method import Method
from zoft.step.nodes import NodeQueries
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer
from zoft.subspaces.nodes import Nodes as Subspace
from zoft.weights.tensors import Weights

FAMILIES = ["tiny_llama", "tiny_qwen", "tiny_opt", "tiny_gpt2", "tiny_gemma", "tiny_bert_classifier"]


def only(model, *words):
    """The model, of which tensors with one of these words in their names are trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in words))
    return model


def lora(model, targets=("q_proj", "v_proj"), **more):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=list(targets), **more))
    for name, parameter in peft_model.named_parameters():  # B starts at zero, and A would have no gradient
        if "lora_" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return peft_model


def queries(model, feedback="hidden", gather=None, rank=0, **fields):
    method = Method(Subspace(**fields), Estimator(), Method.of().weighting, Whiten())
    space = method.bind(Weights(model))
    session = method_engine(method, space, model)
    return NodeQueries(session, ModelReader(model, feedback), gather, rank)


def method_engine(method, space, model):
    from zoft.engines.auto import Auto

    engine = Auto().choose(method.estimator, space, model)
    return engine.bind(model, space, lambda batch: model(**batch).loss)


def gradients(model, batch):
    """Autograd's, by name."""
    model.zero_grad()
    model(**batch).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


EXACT = Estimator(feedback="exact")


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_node_gradients_at_all_positions_are_the_gradient_of_the_weights(family):
    model = getattr(models, family)()
    batch = models.batch_for(model, rows=3, length=7)
    ask = queries(model, "loss", positions="all", layers="linear" if "bert" not in family else "mlp")
    estimate = ask(batch, Direction(0, 0), EXACT)
    wanted = gradients(model, batch)
    assert len(estimate.factors) >= 6
    if "bert" in family:  # its classifier reads the first position alone, and all others by attention
        assert set(estimate.factors) >= {"bert.pooler.dense.weight", "classifier.weight"}
        torch.testing.assert_close(estimate.factors["classifier.weight"].dense(), wanted["classifier.weight"])
        return
    assert estimate.loss == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)
    for name, one in estimate.factors.items():
        torch.testing.assert_close(one.dense(), wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_normalisations_are_nodes_too():
    for family in ("tiny_llama", "tiny_opt", "tiny_gemma"):
        model = only(getattr(models, family)(), "norm")
        batch = models.batch_for(model, rows=3, length=7)
        estimate = queries(model, "loss", positions="all")(batch, Direction(0, 0), EXACT)
        wanted = gradients(model, batch)
        assert set(estimate.factors) == set(wanted)
        for name, one in estimate.factors.items():
            torch.testing.assert_close(one.dense(), wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_lora_gets_its_gradients_by_the_chain_rule():
    model = lora(models.tiny_llama())
    batch = models.batch_for(model, rows=3, length=7)
    ask = queries(model, "loss", positions="all")
    assert all(".lora_B." in key for key in ask.session.coordinates.perturbed())
    estimate, wanted = ask(batch, Direction(0, 0), EXACT), gradients(model, batch)
    assert set(estimate.factors) == set(wanted)
    for name, one in estimate.factors.items():
        torch.testing.assert_close(one.dense(), wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_layer_that_runs_twice_has_the_sum_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.shared(torch.tanh(self.shared(x)))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(5, 1, 4)
    ask = queries(model, layers="linear")
    order = torch.arange(5)

    class Reader:
        def parts(self, batch):
            return [batch]

        def places(self, part):
            from zoft.step.positions import at_loss

            return at_loss(order, torch.full_like(order, -1), torch.full_like(order, -1))

        def read(self, part):
            from zoft.lm.objectives._readout import of_losses

            return of_losses(model(part).square().sum((1, 2)), order)

    ask.reader = Reader()
    estimate = ask(x, Direction(0, 0), EXACT)
    loss = model(x).square().sum((1, 2)).mean()
    (wanted,) = torch.autograd.grad(loss, model.shared.weight)
    torch.testing.assert_close(estimate.factors["shared.weight"].dense(), wanted)


@pytest.mark.parametrize(("counted", "low", "high"), [(1, 0.85, 1.15), (6, 0.3, 0.8)])
def test_raw_losses_of_a_low_block_are_those_of_a_positions_own_term(counted, low, high):
    """All of e where a row has one term; what reaches the losses of later tokens is left out (docs/nodes.md)."""
    model = only(models.tiny_llama(), "layers.0.mlp")
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)
    batch = models.batch_for(model, rows=3, length=7)
    batch["labels"][:, :-counted] = -100
    ask = queries(model, "loss", positions="all", directions="iid", probed="layers")
    exact = ask(batch, Direction(0, 0), EXACT)
    many = Estimator(feedback="loss", every=1, first=1, num_directions=256, eps=1e-3)
    draws = [ask(batch, Direction(0, step), many) for step in range(1, 9)]
    for name in ("gate_proj", "up_proj"):
        e = exact.factors[f"model.layers.0.mlp.{name}.weight"].e
        estimate = torch.stack([each.factors[f"model.layers.0.mlp.{name}.weight"].e for each in draws]).mean(0)
        assert low < float((estimate * e).sum() / e.square().sum()) < high, name


@pytest.mark.parametrize("directions", ["orthogonal", "iid"])
@pytest.mark.parametrize("positions", ["loss", "all"])
def test_raw_losses_give_an_unbiased_estimate(directions, positions):
    model = only(models.tiny_llama(), "layers.2.mlp")
    batch = models.batch_for(model, rows=3, length=7)
    ask = queries(model, "loss", positions=positions, directions=directions)
    exact = ask(batch, Direction(0, 0), EXACT)
    many = Estimator(feedback="loss", every=1, first=1, num_directions=64, eps=1e-2)
    draws = [ask(batch, Direction(0, step), many) for step in range(1, 6)]
    for name, one in exact.factors.items():
        estimates = torch.stack([each.factors[name].e for each in draws])
        along = (estimates * one.e).sum((1, 2)) / one.e.square().sum()
        # Own loss of each token, 64 probes and 5 draws: the share of the gradient is 1 within four standard errors.
        assert abs(float(along.mean()) - 1) < 4 * float(along.std() / 5**0.5) + 0.02, name
        off = estimates.mean(0) - one.e
        noise = (estimates.std(0) / 5**0.5).square().sum().sqrt()
        assert float(off.norm()) < 2.5 * float(noise) + 0.05 * float(one.e.norm()), name


def test_the_response_of_the_last_residual_is_the_identity_and_its_gradient_exact():
    """down_proj of the last block adds to the last hidden state: R = I, and e = dL/dh."""
    model = only(models.tiny_llama(), "layers.2.mlp.down_proj")
    batch = models.batch_for(model, rows=4, length=9)
    ask = queries(model, "hidden")
    exact = queries(model, "loss")(batch, Direction(0, 0), EXACT)
    estimate = ask(batch, Direction(0, 0), Estimator(first=64, eps=1e-2))
    space = ask.session.coordinates
    response, counts = space.response["model.layers.2.mlp"], space.tables["counts"]
    torch.testing.assert_close(response[0] / counts[0], torch.eye(16), rtol=0, atol=0.15)
    (key,) = space.nodes
    e, wanted = estimate.factors[key].e, exact.factors[key].e
    assert float(nn.functional.cosine_similarity(e.flatten(), wanted.flatten(), dim=0)) > 0.98


def test_the_response_of_scores_comes_near_the_gradient():
    model = models.tiny_bert_classifier()
    batch = models.batch_for(model, rows=12, length=7)
    exact = queries(model, "loss")(batch, Direction(0, 0), EXACT)
    estimate = queries(model, "scores")(batch, Direction(0, 0), Estimator(first=64, eps=1e-2))
    for name in ("bert.pooler.dense.weight", "classifier.weight"):
        cosine = nn.functional.cosine_similarity(
            estimate.factors[name].e.flatten(), exact.factors[name].e.flatten(), dim=0
        )
        assert float(cosine) > 0.8, name
    assert estimate.num_queries == 65


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2", "tiny_opt"])
def test_what_is_applied_is_what_was_measured(family):
    """Outputs moved by dW x at every position are those of the weights W + dW: the same loss."""
    model = getattr(models, family)()
    batch = models.batch_for(model, rows=3, length=7)
    ask = queries(model, "loss", positions="all")
    space, at = ask.session.coordinates, None
    from zoft.step.positions import expand

    at = expand(ask.reader.places(batch), space)
    key, node = list(space.nodes.items())[-1]
    with torch.no_grad(), ask.session.seeing({key: node}, at.rows, at.columns, len(at.starts)) as seen:
        before = ask.reader.read(batch).losses.mean()
    torch.manual_seed(0)
    x, delta = seen[key], 0.1 * torch.randn(node.size, seen[key].shape[1])
    with (
        torch.no_grad(),
        ask.session.moved({key: node}, at.rows, at.columns, len(at.starts), lambda _key, _size: x @ delta.T),
    ):
        moved = ask.reader.read(batch).losses.mean()
    weight = space.weights.tensors[node.name]
    weight.data += delta.T if node.kind == "conv1d" else delta
    with torch.no_grad():
        applied = ask.reader.read(batch).losses.mean()
    torch.testing.assert_close(moved, applied, rtol=1e-5, atol=1e-6)
    assert abs(float(moved - before)) > 1e-4


def test_only_the_named_positions_are_moved():
    model = only(models.tiny_llama(), "layers.2.mlp.down_proj")
    batch = models.batch_for(model, rows=2, length=7)
    ask = queries(model)
    node = ask.session.coordinates.nodes
    rows, column = torch.tensor([0, 1]), torch.tensor([-1, -3])
    plain = model(**batch).logits
    with torch.no_grad(), ask.session.moved(node, rows, column, 2, lambda _k, size: torch.ones(2, size)):
        moved = model(**batch).logits
    changed = (plain - moved).abs().amax(-1) > 1e-4
    assert changed.nonzero().tolist() == [[0, 6], [1, 4]]
    assert torch.equal(model(**batch).logits, plain), "nothing stays behind"


@pytest.mark.parametrize("feedback", ["hidden", "loss"])
def test_micro_batches_and_processes_are_one_batch(feedback):
    """The same directions, the same estimate, however the rows are cut."""
    model = models.tiny_llama()
    batch = models.batch_for(model, rows=6, length=7)
    cut = [{name: value[:2] for name, value in batch.items()}, {name: value[2:] for name, value in batch.items()}]
    estimator = Estimator(feedback="loss", every=1, first=3) if feedback == "loss" else Estimator(first=3)
    whole = queries(model, feedback)(batch, Direction(0, 0), estimator)
    parts = queries(model, feedback)(cut, Direction(0, 0), estimator)
    same(whole, parts)
    same(whole, together(model, feedback, cut, estimator)[0])


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mixtral"])
@pytest.mark.parametrize(
    ("feedback", "estimator"),
    [
        ("loss", EXACT), ("hidden", Estimator(response="identity")), ("hidden", Estimator(first=3)),
        ("loss", Estimator(feedback="loss", every=1, first=3)),
    ],
)  # fmt: skip
def test_rows_whose_labels_do_not_count_change_nothing(family, feedback, estimator):
    """In a micro-batch of their own, and where a process has nothing but those."""
    model = only(getattr(models, family)(), "mlp")
    model.config.output_router_logits = False
    batch = models.batch_for(model, rows=4, length=7)
    without = batch | {"labels": torch.full_like(batch["labels"], -100)}
    alone = queries(model, feedback)
    wanted = alone(batch, Direction(0, 0), estimator)
    for cut in ([without, batch], [batch, without]):
        same(wanted, queries(model, feedback)(cut, Direction(0, 0), estimator))
        same(wanted, together(model, feedback, cut, estimator)[0])


def same(one, other):
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert one.num_queries == other.num_queries
    assert one.factors.keys() == other.factors.keys()
    for name, factor in one.factors.items():
        torch.testing.assert_close(factor.dense(), other.factors[name].dense(), rtol=1e-3, atol=1e-6)


def together(model, feedback, cut, estimator):
    """Two processes, as two threads that meet where they gather."""
    import threading

    barrier, board, results = threading.Barrier(2, timeout=60), [None, None], [None, None]

    def process(rank):
        def gather(part):
            barrier.wait()
            board[rank] = part
            barrier.wait()
            return list(board)

        replica = copy.deepcopy(model)
        results[rank] = queries(replica, feedback, gather, rank)(cut[rank], Direction(0, 0), estimator)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, factor in results[0].factors.items():
        assert torch.equal(factor.dense(), results[1].factors[name].dense()), "the processes would part"
    return results


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, 20])  # outputs, of 12 inputs
@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("batches", [1, 4])
def test_the_whitened_step_is_the_momentum_times_the_inverse_second_moment(rows, batches, size):
    torch.manual_seed(0)
    rule = Whiten(window=3, beta=0.9, decay=0.8, ridge=0.2, cooling=2.0, trust=1e9)
    state, seen = {"w": {}}, []
    for _ in range(batches):
        seen.append(Factors(torch.randn(rows, size), torch.randn(rows, 12)))
        factors = rule.steps({"w": seen[-1]}, state, 1.0, 1.0)["w"]
    # the steps of all layers are held at once: no more rows than the matrix has
    in_window = min(batches, 3) * rows
    assert len(factors.x) == len(factors.e) == (in_window if in_window <= 12 else min(size, 12))
    window = seen[-3:][::-1]
    weights = torch.tensor([0.8**age for age in range(len(window))])
    weights = weights / weights.sum()
    second = sum(w * one.x.T @ one.x / rows for w, one in zip(weights, window, strict=True))
    momentum = sum(0.1 * 0.9**age * one.dense() for age, one in enumerate(window))
    ridge = 0.2 * second.diagonal().mean()
    wanted = momentum @ torch.linalg.inv(second + ridge * torch.eye(12)) / (1 + (batches - 1) / 2) ** 0.5
    torch.testing.assert_close(factors.dense(), wanted, rtol=1e-3, atol=1e-5)


def test_steps_stay_as_long_as_they_are_without_cooling():
    torch.manual_seed(0)
    warm, cool, rate = {"w": {}}, {"w": {}}, []
    for _ in range(3):
        one = {"w": Factors(torch.randn(5, 6), torch.randn(5, 12))}
        steps = [Whiten(cooling=c, trust=1e9).steps(one, s, 1.0, 1.0)["w"].dense() for c, s in ((0, warm), (4, cool))]
        rate.append(float(steps[1].norm() / steps[0].norm()))
    assert rate == pytest.approx([1, 0.8**0.5, (2 / 3) ** 0.5], rel=1e-5)


def test_a_loss_of_zero_or_less_bounds_nothing():
    torch.manual_seed(0)
    one = {"w": Factors(torch.randn(5, 6), torch.randn(5, 12))}
    free, below = (Whiten(trust=t).steps(one, {"w": {}}, loss, 1.0)["w"] for t, loss in ((1e9, 1.0), (0.1, -0.5)))
    assert torch.equal(free.dense(), below.dense())


def test_a_step_promises_no_more_than_the_trust_allows():
    torch.manual_seed(0)
    one = {
        "a": Factors(torch.randn(5, 6), torch.randn(5, 12)),
        "b": Factors(torch.randn(5, 3), torch.randn(5, 3), "vector"),
    }
    free = Whiten(trust=1e9).steps(one, {"a": {}, "b": {}}, 0.5, 2.0)
    bound = Whiten(trust=0.1).steps(one, {"a": {}, "b": {}}, 0.5, 2.0)
    promised = sum(2.0 * float((bound[n].dense() * one[n].dense()).sum()) for n in one)
    assert promised == pytest.approx(0.1 * 0.5, rel=1e-4)
    for name in one:
        ratio = bound[name].dense() / free[name].dense()
        torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio.flatten()[0])), rtol=1e-4, atol=0)


def test_the_bound_cools_as_steps_do():
    """Where it binds in every step, steps would else be as long at the end as at the beginning."""
    torch.manual_seed(0)
    one, state, promised = {"w": Factors(torch.randn(5, 6), torch.randn(5, 12))}, {"w": {}}, []
    for _ in range(3):
        step = Whiten(trust=1e-6, cooling=4).steps(one, state, 0.5, 2.0)["w"]
        promised.append(2.0 * step.inner(one["w"]))
    assert promised == pytest.approx([0.5e-6, 0.5e-6 * 0.8**0.5, 0.5e-6 * (2 / 3) ** 0.5], rel=1e-3)


def test_a_batch_that_promises_nothing_lets_no_long_step_through():
    """Its gradient is at right angles to the momentum, or 0: what is kept of a step's length at most doubles."""
    torch.manual_seed(0)
    rule, state, free = Whiten(trust=1e-3, cooling=0), {"w": {}}, {"w": {}}
    steep = {"w": Factors(torch.randn(5, 6), torch.randn(5, 12))}
    flat = {"w": Factors(torch.zeros(5, 6), torch.randn(5, 12))}
    shares = []
    for one in (steep, flat, flat, flat):
        step = rule.steps(one, state, 1.0, 1.0)["w"].dense()
        wanted = Whiten(trust=1e9, cooling=0).steps(one, free, 1.0, 1.0)["w"].dense()
        shares.append(float(step.norm() / wanted.norm()))
        torch.testing.assert_close(step, shares[-1] * wanted, rtol=1e-3, atol=1e-9)
    assert shares[0] < 0.1
    assert shares == pytest.approx([min(1, shares[0] * 2**n) for n in range(4)], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["whiten", "sgd", "momentum", "adam", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_optimizer_of_gradients_takes_it_downhill(optimizer, dtype):
    rates = {"whiten": 1.0, "sgd": 0.3, "momentum": 1.0, "adam": 3e-3, "muon": 3e-2}
    torch.manual_seed(0)
    model = models.tiny_llama().to(dtype)
    batch = models.batch_for(model, rows=6, length=7)
    method = Method.of(Subspace(), Estimator(first=16), "mean", optimizer)
    session = method_engine(method, method.bind(Weights(model)), model)
    groups = [{"params": list(session.weights.tensors.values()), "weight_decay": 0.0}]
    zo_optimizer = ZOOptimizer(groups, method.optimizer, session, rates[optimizer])
    ask = StepQueries(method, zo_optimizer, nodes=NodeQueries(session, ModelReader(model)))
    losses = []
    for step in range(8):
        estimate = ask.estimate(batch, method.estimator.directions(0, step))
        assert estimate.num_queries == method.queries_at(step) == (17 if step == 0 else 1)
        losses.append(estimate.loss)
        zo_optimizer.progress.steps += 1
        zo_optimizer.apply(estimate)
    assert losses[-1] < losses[0] - 0.02, losses
    names = session.coordinates.names
    untouched = models.tiny_llama().to(dtype).state_dict()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, untouched[n])}
    assert moved == set(names), "the nodes' tensors move and no other"


def test_weights_that_have_become_no_numbers_give_no_step_and_no_traceback():
    model = only(models.tiny_llama(), "layers.2.mlp.down_proj")
    batch, ask = models.batch_for(model, rows=4, length=9), queries(model, "hidden")
    assert ask(batch, Direction(0, 0), Estimator()).usable
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    assert not ask(batch, Direction(0, 1), Estimator()).usable


@pytest.mark.parametrize("rows", [2, 40])
def test_the_norm_of_an_estimate_is_that_of_its_matrices(rows):
    model = only(models.tiny_llama(), "layers.1.mlp", "layers.1.input_layernorm")
    ask = queries(model, "loss", positions="all")
    result = ask(models.batch_for(model, rows=rows, length=7), Direction(0, 0), EXACT)
    estimate = replace(StepEstimate.of([(Direction(0, 0), 1.0)]), factors=result.factors)
    assert StepEstimate.of([(Direction(0, 0), 1.0)]).norm is None
    wanted = torch.cat([one.dense().flatten() for one in result.factors.values()]).norm()
    assert estimate.norm == pytest.approx(float(wanted), rel=1e-5)
    assert estimate.scaled(0.5).norm == pytest.approx(float(wanted) / 2, rel=1e-5)


@pytest.mark.parametrize("every", [0, 1])
def test_a_probe_that_is_not_finite_is_forgotten_with_its_step(every, monkeypatch):
    """It would stay in the mean of all answers, and no later step of the run would move anything."""
    model = only(models.tiny_llama(), "layers.2.mlp")
    batch, estimator = models.batch_for(model, rows=3, length=7), Estimator(first=2, every=every)
    ask, probe = queries(model), NodeQueries._probe
    monkeypatch.setattr(NodeQueries, "_probe", lambda *args: probe(*args) * torch.inf)
    spoilt = ask(batch, Direction(0, 0), estimator)
    assert not spoilt.usable
    assert (ask.session.coordinates.response, ask.session.coordinates.tables) == ({}, {})
    monkeypatch.undo()
    later, fresh = ask(batch, Direction(0, 1), estimator), queries(model)(batch, Direction(0, 1), estimator)
    assert (later.usable, later.num_queries) == (True, 3)  # the response is learnt now, as in the first step
    for name, one in fresh.factors.items():
        assert torch.equal(one.dense(), later.factors[name].dense()), name


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "fields", "said"),
    [
        (lambda: only(models.tiny_llama(), "embed_tokens"), {}, "does not follow from a layer's inputs"),
        (lambda: only(models.tiny_llama(), "norm"), {"layers": "mlp"}, "use subspace.layers=auto"),
        (lambda: models.tiny_gpt_oss(), {}, "experts of this mixture"),
        (lambda: lora(models.tiny_llama(), use_dora=True), {}, "DoRA"),
        (lambda: virtual_tokens(), {}, "virtual tokens"),
        (lambda: adaption_prompts(), {}, "adaption_gate is none|adaption_prompt is none"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_sentence(model, fields, said):
    with pytest.raises(UserError, match=said):
        Subspace(**fields).bind(Weights(model()))


def adaption_prompts():
    from peft import AdaptionPromptConfig, get_peft_model

    fields = {"adapter_len": 2, "adapter_layers": 1, "task_type": "CAUSAL_LM"}
    return get_peft_model(models.tiny_llama(), AdaptionPromptConfig(**fields))


def test_a_normalisation_that_gives_more_than_one_tensor_is_refused():
    from transformers import IBertConfig, IBertForSequenceClassification

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = IBertForSequenceClassification(IBertConfig(vocab_size=models.VOCAB, **small)).eval()
    batch = {"input_ids": torch.full((3, 5), 7), "labels": torch.tensor([0, 1, 0])}
    with pytest.raises(UserError, match=r"LayerNorm.weight gives more: use subspace.layers=linear"):
        queries(model, "scores", layers="all")(batch, Direction(0, 0), Estimator(first=2))
    assert queries(model, "scores", layers="linear")(batch, Direction(0, 0), Estimator(first=2)).usable


def virtual_tokens():
    """A prefix behind two linear layers: they are given virtual tokens, none of a row's positions."""
    from peft import PrefixTuningConfig, get_peft_model

    fields = {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8, "task_type": "CAUSAL_LM"}
    return get_peft_model(models.tiny_llama(), PrefixTuningConfig(**fields))


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mixtral"])
@pytest.mark.parametrize("estimator", [EXACT, Estimator(feedback="loss", every=1)])
def test_an_adapter_that_is_no_layer_that_is_called_is_refused(family, estimator):
    """Of a parameter, whose sum with the weight is what the layer has: it would stand still without a word."""
    target = "mlp.experts.gate_up_proj" if family == "tiny_mixtral" else "self_attn.q_proj.weight"
    model = lora(getattr(models, family)(), (), target_parameters=[target])
    model.config.output_router_logits = False
    ask = queries(model, "loss")
    with pytest.raises(UserError, match=r"lora_A.default.weight is not called .*target_modules"):
        ask(models.batch_for(model, rows=2, length=5), Direction(0, 0), estimator)


def test_a_mixture_trains_its_attention_where_that_is_asked_for():
    model = only(models.tiny_mixtral(), "self_attn")
    batch = models.batch_for(model, rows=3, length=7)
    ask = queries(model, "hidden", layers="linear")
    names = {node.name for node in ask.session.coordinates.nodes.values()}
    assert names
    assert all("self_attn" in name for name in names)
    assert ask(batch, Direction(0, 0), Estimator()).usable
    model.config.output_router_logits = False
    ask = queries(model, "loss", layers="linear", positions="all")
    estimate, wanted = ask(batch, Direction(0, 0), EXACT), gradients(model, batch)
    for name, one in estimate.factors.items():
        torch.testing.assert_close(one.dense(), wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def seq2seq_batch(model):
    batch = models.batch_for(model, rows=3, length=9)
    batch["labels"] = batch["input_ids"][:, :5].clone()
    batch["labels"][0, 3:] = -100
    return batch


@pytest.mark.parametrize("layers", ["mlp", "linear"])
def test_the_decoder_of_an_encoder_decoder_has_exact_node_gradients(layers):
    model = models.tiny_t5()
    batch = seq2seq_batch(model)
    ask = queries(model, "loss", positions="all", layers=layers)
    batch["labels"][0, 3:] = batch["input_ids"][0, 3:5]  # with all labels, the positions are all of the decoder's
    estimate, wanted = ask(batch, Direction(0, 0), EXACT), gradients(model, batch)
    assert estimate.loss == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)
    assert len(estimate.factors) == {"mlp": 4, "linear": 12}[layers]
    for name, one in estimate.factors.items():
        assert "decoder." in name
        torch.testing.assert_close(one.dense(), wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_hidden_state_of_a_decoder_teaches_it():
    """wo of the last block adds to what the head is given, but for a norm: the estimate is near the exact one."""
    model = only(models.tiny_t5(), "decoder.block.1.layer.2")
    batch = seq2seq_batch(model)
    exact = queries(model, "loss")(batch, Direction(0, 0), EXACT)
    estimate = queries(model, "hidden")(batch, Direction(0, 0), Estimator(first=64, eps=1e-2))
    (name,) = [one for one in estimate.factors if ".wo." in one]
    cosine = nn.functional.cosine_similarity(estimate.factors[name].e.flatten(), exact.factors[name].e.flatten(), dim=0)
    assert float(cosine) > 0.8


def test_the_encoder_alone_is_refused_with_a_sentence():
    model = only(models.tiny_t5(), "encoder.block")
    with pytest.raises(UserError, match="nothing of that is trained"):
        queries(model)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (("nodes", "central", "mean", "sgd"), "use estimator=nodes"),
        (("full", "nodes", "mean", "whiten"), "use subspace=nodes"),
        (("nodes", "nodes", "sign", "whiten"), "use weighting=mean"),
        (("nodes", "nodes", "mean", "conservative"), "use optimizer=whiten"),
        (("full", "backprop", "mean", "whiten"), "estimator.feedback=exact"),
        (("full", "central", "mean", "whiten"), "optimizer=adam"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(parts, said):
    with pytest.raises(UserError, match=said):
        Method.of(*parts)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"feedback": "loss"}, "every=1"),
        ({"feedback": "words"}, "one of auto"),
        ({"first": 0}, "at least 1"),
        ({"eps": 0.0}, "> 0"),
        ({"every": -1}, "or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        Estimator(**fields)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective=expression", "objective.formula=options + 0.5*metric"], "which positions"),
        (["objective=cross_entropy", "estimator.feedback=scores"], "hidden, loss, or auto"),
        (["objective=options", "engine=layerwise"], "engine=auto"),
        (["objective=options", "trainer.max_grad_norm=1"], "max_grad_norm"),
        (["objective=options", "estimator.eps=-1"], "eps"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_anything_is_loaded(words, said):
    from zoft.config import compose

    with pytest.raises(UserError, match=said):
        compose(["method=zoft", "task=sst2", "model.name=none", *words])


# ---- probes behind a kept context ------------------------------------------------------------------------------------


def padded_batch(model, answer=1):
    """Left-padded rows, labelled at their last tokens only."""
    batch = models.batch_for(model, rows=4, length=12)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, :5] = 0
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][:, -answer:] = batch["input_ids"][:, -answer:]
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return batch


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen", "tiny_gpt2", "tiny_gemma2", "tiny_opt", "tiny_mixtral"])
@pytest.mark.parametrize(("words", "answer"), [("1.mlp|h.1.|1.fc|1.self_attn", 1), ("", 3)])
def test_a_probe_behind_a_kept_context_is_that_of_whole_rows(family, words, answer):
    model = getattr(models, family)()
    if words:
        only(model, *words.split("|"))
    batch = padded_batch(model, answer)
    estimator, estimates, lengths = Estimator(first=3), [], []
    entered = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for behind in (True, False):
        ask = queries(model, "hidden", layers="linear" if "mixtral" in family else "auto")
        if not behind:
            ask.reader.tail = lambda part, last: None
        lengths.clear()
        estimates.append(ask(batch, Direction(0, 0), estimator))
        assert ask._contexts().usable
        assert lengths[-3:] == [answer + 1 if behind else 12] * 3
    entered.remove()
    assert estimates[0].factors.keys() == estimates[1].factors.keys()
    for name, one in estimates[0].factors.items():
        torch.testing.assert_close(one.dense(), estimates[1].factors[name].dense(), rtol=1e-2, atol=1e-5, msg=name)
    assert estimates[0].num_queries == estimates[1].num_queries == 4


def test_a_context_that_does_not_serve_is_given_up_and_whole_rows_go_through():
    model = only(models.tiny_llama(), "2.mlp")
    batch, ask = padded_batch(model), queries(model)
    whole = ask(batch, Direction(0, 0), Estimator(first=2))
    ask = queries(model)
    contexts = ask._contexts()
    original = contexts.kept

    @contextmanager
    def wrongly(last):
        with original(last) as context:
            yield context
        context.hidden = context.hidden + 1

    contexts.kept = wrongly
    estimate = ask(batch, Direction(0, 0), Estimator(first=2))
    assert not contexts.usable
    for name, one in estimate.factors.items():
        torch.testing.assert_close(one.dense(), whole.factors[name].dense(), rtol=1e-2, atol=1e-5)
