"""Options and cross-entropy against naive versions over full logits, in both layouts."""

from __future__ import annotations

import pytest
import torch

from tests.models import CAUSAL, DECODERS, PAD, VOCAB, tiny_llama
from zoft.lm.data.tokens import OptionCollator
from zoft.lm.objectives.cross_entropy import CrossEntropy
from zoft.lm.objectives.options import Options, gold_of, group_sizes

COLLATE = OptionCollator(pad_token_id=PAD)
PER_OPTION = OptionCollator(pad_token_id=PAD, one_row_per_option=True, multiple_of=8)


def row(prompt: int, options: list[int], label: int, seed: int) -> dict:
    """A prompt of ``prompt`` random tokens and options of the given lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(4, VOCAB, (count,), generator=generator).tolist()

    head = draw(prompt)
    return {"sequences": [head + draw(n) for n in options], "lengths": options, "label": label}


SINGLE = [row(6, [1, 1], 0, 1), row(3, [1, 1], 1, 2), row(9, [1, 1], 1, 3)]
UNEQUAL = [row(6, [1, 3], 1, 4), row(3, [2, 1, 4], 2, 5), row(8, [2], 0, 6), row(5, [1, 1], 0, 7)]
LONG = [row(14, [2, 3, 2], 1, 8), row(9, [3, 2, 3], 0, 9), row(12, [1, 2], 1, 10)]  # packed behind one context

rows_of_each_kind = pytest.mark.parametrize("rows", [SINGLE, UNEQUAL, LONG], ids=["single", "unequal", "long"])


def naive_scores(model, rows) -> list[list[torch.Tensor]]:
    """Each option's token log-probabilities, one unpadded sequence at a time through the whole model."""
    scores = []
    for example in rows:
        scores.append([])
        for ids, length in zip(example["sequences"], example["lengths"], strict=True):
            log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
            steps = range(len(ids) - length, len(ids))
            scores[-1].append(torch.stack([log_probs[i - 1, ids[i]] for i in steps]).detach())
    return scores


@rows_of_each_kind
@pytest.mark.parametrize("family", DECODERS)
def test_options_equal_the_naive_version(family, rows):
    model = DECODERS[family]()
    means = [[s.mean() for s in example] for example in naive_scores(model, rows)]
    losses = [-torch.log_softmax(torch.stack(m), 0)[r["label"]] for m, r in zip(means, rows, strict=True)]
    for collate in (COLLATE, PER_OPTION):
        batch = collate(rows)
        with torch.no_grad():
            loss, scores, gold = Options().predict(model, batch)
            torch.testing.assert_close(Options().loss(model, batch), loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
        assert gold.tolist() == [r["label"] for r in rows]
        assert Options().num_terms(batch) == len(rows)
        assert scores.shape == (len(rows), max(len(r["lengths"]) for r in rows))
        for example, wanted in zip(scores, means, strict=True):
            torch.testing.assert_close(example[: len(wanted)], torch.stack(wanted), rtol=1e-5, atol=1e-5)
            assert bool((example[len(wanted) :] == -torch.inf).all())
        assert scores.argmax(1).tolist() == [int(torch.stack(m).argmax()) for m in means]


@rows_of_each_kind
@pytest.mark.parametrize("family", DECODERS)
def test_cross_entropy_equals_the_naive_version(family, rows):
    model = DECODERS[family]()
    gold = [example[r["label"]] for example, r in zip(naive_scores(model, rows), rows, strict=True)]
    for collate in (COLLATE, PER_OPTION):
        batch = collate(rows)
        with torch.no_grad():
            loss, scores, labels = CrossEntropy().predict(model, batch)
            torch.testing.assert_close(CrossEntropy().loss(model, batch), loss, rtol=1e-6, atol=0)
            assert torch.equal(scores, Options().predict(model, batch)[1])
        torch.testing.assert_close(
            loss, -torch.cat(gold).mean(), rtol=1e-5, atol=1e-6
        )  # over tokens: long ones weigh more
        assert labels.tolist() == [r["label"] for r in rows]
        assert CrossEntropy().num_terms(batch) == sum(map(len, gold))  # what the mean is over, for accumulation


def test_both_layouts_agree():
    model = tiny_llama()
    one, two = COLLATE(SINGLE), PER_OPTION(SINGLE)
    assert "option_tokens" in one
    assert "option_tokens" not in two
    assert "packed" not in two
    with torch.no_grad():
        for objective in (Options(), CrossEntropy()):
            torch.testing.assert_close(objective.loss(model, one), objective.loss(model, two), rtol=1e-5, atol=1e-6)


def test_the_loss_tells_the_label():
    model = tiny_llama()
    turned = [r | {"label": 1 - r["label"]} for r in SINGLE]
    with torch.no_grad():
        assert not torch.allclose(Options().loss(model, COLLATE(SINGLE)), Options().loss(model, COLLATE(turned)))


def test_group_sizes_and_gold():
    sizes = torch.tensor([2, 2, 3, 3, 3, 1])
    assert group_sizes(sizes) == [2, 3, 1]
    assert group_sizes(torch.tensor([2, 2, 2, 2])) == [2, 2]
    assert gold_of({"labels": torch.tensor([1, 1, 2, 2, 2, 0]), "num_options": sizes}).tolist() == [1, 2, 0]
    assert gold_of({"labels": torch.tensor([1, 0])}).tolist() == [1, 0]


@pytest.mark.parametrize("family", CAUSAL)
def test_the_head_sees_only_what_counts(family):
    model = CAUSAL[family]()
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _args, output: seen.append(output.shape[:2].numel()))
    per_option, single = PER_OPTION(UNEQUAL), COLLATE(SINGLE)
    with torch.no_grad():
        Options().loss(model, single)  # finds out about the head
        for objective, batch, wanted in (
            (Options(), single, len(SINGLE)),
            (CrossEntropy(), single, len(SINGLE)),
            (Options(), per_option, sum(sum(r["lengths"]) for r in UNEQUAL)),
            (CrossEntropy(), per_option, sum(r["lengths"][r["label"]] for r in UNEQUAL)),
        ):
            seen.clear()
            objective.loss(model, batch)
            assert seen == [wanted]


def test_a_loss_over_options_reads_their_rows_of_the_head_alone():
    model = tiny_llama()
    batch, head = COLLATE(SINGLE), model.get_output_embeddings()
    with torch.no_grad():
        loss, scores = Options().predict(model, batch)[:2]
        chosen = batch["option_tokens"].unique()
        others = [token for token in range(VOCAB) if token not in chosen]
        head.weight[others] = torch.nan
        torch.testing.assert_close(Options().loss(model, batch), loss, rtol=1e-6, atol=0)
        assert bool(Options().predict(model, batch)[1].isnan().all())  # scores are over the whole vocabulary
    assert bool((scores < 0).all())


def test_scores_mean_the_same_in_both_layouts():
    model = tiny_llama()
    with torch.no_grad():
        one, two = (Options().predict(model, collate(SINGLE))[1] for collate in (COLLATE, PER_OPTION))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_no_cache_is_built():
    model = tiny_llama()
    model.config.use_cache = True
    flags = []
    model.register_forward_pre_hook(lambda _m, _args, kwargs: flags.append(kwargs["use_cache"]), with_kwargs=True)
    for objective in (Options(), CrossEntropy()):
        for rows in (SINGLE, LONG):
            objective.predict(model, COLLATE(rows))
            objective.loss(model, COLLATE(rows))
    assert set(flags) == {False}


def test_losses_are_float32_scalars_in_low_precision_and_through_an_adapter():
    from zoft.lm.models.peft.lora import Lora

    for model in (tiny_llama().to(torch.bfloat16), Lora().wrap(tiny_llama(), 0)):
        with torch.no_grad():
            for collate in (COLLATE, PER_OPTION):
                loss = Options().loss(model, collate(SINGLE))
                assert (loss.dtype, loss.shape) == (torch.float32, ())
    wrapped = Lora().wrap(tiny_llama(), 0)
    with torch.no_grad():
        plain, adapted = (Options().loss(m, COLLATE(SINGLE)) for m in (tiny_llama(), wrapped))
    torch.testing.assert_close(plain, adapted)
