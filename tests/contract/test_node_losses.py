"""Node directions by objective: rewards of texts and preferences, which tell losses alone, and options of one token."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import models
from tests.models import PAD, tiny_llama
from tests.runs import WORDS, tiny_tokenizer
from zoft import ZOConfig, ZOTrainer
from zoft.config import compose
from zoft.errors import UserError
from zoft.estimators.nodes import Nodes
from zoft.lm.data.completions import counted
from zoft.lm.data.encoding import PairCollator
from zoft.lm.data.examples import Rated
from zoft.lm.data.generated import GeneratedCollator, encode_generated
from zoft.lm.models.generate import Answering, write
from zoft.lm.objectives._own_readout import own_readout
from zoft.lm.objectives.options import Options
from zoft.lm.objectives.preference import Preference, keep_reference
from zoft.lm.objectives.reward import Reward
from zoft.noise.direction import Direction
from zoft.optimizers.whiten import Whiten
from zoft.trainer.batch import StepBatch

LIKED = WORDS[:6]
ANSWERING = Answering(tiny_tokenizer(), 3)
STEPS, PROBES = 12, 16


def liked(prompts, generations):
    """The share of three words that are liked."""
    return [sum(word in LIKED for word in text.split()) / 3 for text in generations]


def last_block():
    model = tiny_llama(vocab_size=4 + len(WORDS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2." in name)
    return model


def rewarded(folder, *, estimator=None, rate=1.0, **given):
    rows = encode_generated([Rated(f"call {word}", 0.0, str(k)) for k, word in enumerate(WORDS[:8])], *room())
    settings = {"save_strategy": "no", "max_steps": STEPS} | given
    return ZOTrainer(
        last_block(),
        ZOConfig(
            output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1000,
            per_device_train_batch_size=8, dataloader_pin_memory=False, learning_rate=rate, seed=1, **settings,
        ),
        train_dataset=rows,
        data_collator=GeneratedCollator(PAD, ANSWERING),
        subspace="nodes",
        estimator=estimator or Nodes(feedback="loss", every=1, first=PROBES, num_directions=PROBES, eps=0.5),
        optimizer=Whiten(),
        objective=Reward(function=liked, temperature=0.1),
    )  # fmt: skip


def room():
    return ANSWERING.tokenizer, 60, 3


def reward_of(trainer):
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        return -float(trainer.zo_objective.loss(trainer.model.eval(), batch))


def test_a_reward_rises_by_what_each_text_is_worth(tmp_path):
    trainer, rewards = rewarded(tmp_path), []
    trainer.create_optimizer()
    before, estimate = reward_of(trainer), trainer.run_steps.next

    def noted(*args):
        result = estimate(*args)
        rewards.append(-result.loss)
        return result

    trainer.run_steps.next = noted
    trainer.train()
    assert trainer.progress.num_queries == (1 + PROBES) * STEPS
    assert sum(rewards[-6:]) / 6 > before + 0.1  # single ones jump: eight texts, and words that change at once


def test_a_killed_run_of_rewards_ends_at_the_same_bits(tmp_path):
    whole = rewarded(tmp_path / "whole", max_steps=6)
    whole.train()
    first = rewarded(tmp_path / "killed", max_steps=6)
    first.create_optimizer()
    read = first.run_steps.queries.nodes.reader.read

    def killing(part):
        if first.progress.steps == 4:
            raise KeyboardInterrupt
        return read(part)

    first.run_steps.queries.nodes.reader.read = killing
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = rewarded(tmp_path / "killed", max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_text_has_a_direction_at_each_of_its_tokens_and_none_behind_them(tmp_path):
    """Rows whose text is complete take no part in the calls that others still need."""
    trainer = rewarded(tmp_path)
    trainer.create_optimizer()
    rows = trainer.data_collator(list(trainer.train_dataset))
    ends = ANSWERING.tokenizer.eos_token_id
    with torch.no_grad():
        trainer.model.lm_head.weight[ends] *= 6  # so that some texts end early
        lengths = write(trainer.model.eval(), rows["prompt_ids"], ANSWERING, temperature=0.1).lengths
    assert 1 in lengths or 2 in lengths
    with trainer.query_forward.querying():
        estimate = trainer.run_steps.queries.nodes(StepBatch([rows]), Direction(0, 0), trainer.method.estimator)
    assert {len(one.e) for one in estimate.factors.values()} == {sum(lengths)}


# ---- options of one token --------------------------------------------------------------------------------------------


def options(model, candidates=(5, 9, 12)):
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (4, 6), generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 2, 1, 0])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {**batch, "option_tokens": torch.tensor([list(candidates)] * 3 + [list(candidates[::-1])])}


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2", "tiny_gemma2", "tiny_cohere"])
def test_options_of_one_token_read_their_own_rows_of_the_head_alone(family, monkeypatch):
    """Gemma 2 caps its logits and Cohere scales them, which is done to the options' alone."""
    model = getattr(models, family)().eval()
    batch, objective = options(model), Options()
    objective.probe(model, batch)
    entered: list = []
    norm = model.transformer.ln_f if family == "tiny_gpt2" else model.model.norm
    handle = norm.register_forward_pre_hook(lambda _m, args: entered.append(args[0]))
    loss = objective.loss(model, batch)
    handle.remove()
    (wanted,) = torch.autograd.grad(loss * 4, entered)
    widths = []
    head = model.get_output_embeddings()
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: widths.append(len(w)) or linear(x, w, b))
    readout = objective.readout(model, batch, "hidden")
    monkeypatch.undo()
    torch.testing.assert_close(readout.losses.mean(), loss)
    torch.testing.assert_close(readout.slopes, wanted[:, -1], rtol=1e-4, atol=1e-7)
    assert 3 in widths
    assert len(head.weight) not in widths


def test_options_under_a_head_with_an_adapter_read_it_whole():
    """An adapter on the head is no plain matrix whose rows can be taken."""
    plain, adapted = tiny_llama(), tiny_llama()
    adapted = get_peft_model(adapted, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    batch, objective = options(plain), Options()
    readouts = []
    for model in (plain.eval(), adapted.eval()):
        objective.probe(model, batch)
        readouts.append(objective.readout(model, batch, "hidden"))
    torch.testing.assert_close(readouts[0].slopes, readouts[1].slopes, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(readouts[0].losses, readouts[1].losses)


# ---- preferences -----------------------------------------------------------------------------------------------------


def pairs():
    def row(prompt, better, worse):
        def answer(ids):
            return counted([*prompt, *ids], range(len(prompt), len(prompt) + len(ids)))

        return {"chosen": answer(better), "rejected": answer(worse), "input_ids": [*prompt, *better]}

    return [row([4 + k, 9], [12, 13], [14]) if k % 2 else row([4 + k], [12], [15, 16]) for k in range(8)]


@pytest.mark.parametrize(("feedback", "every", "share"), [("auto", 0, 0.75), ("loss", 1, 0.95)])
def test_preferences_are_learnt(feedback, every, share, tmp_path):
    model, rows, collate = last_block(), pairs(), PairCollator(PAD)
    list(keep_reference(model, rows, collate))
    objective = Preference(beta=0.3)
    trainer = ZOTrainer(
        model,
        ZOConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", max_steps=20,
            per_device_train_batch_size=8, dataloader_pin_memory=False, learning_rate=1.0, logging_steps=1000,
        ),
        train_dataset=rows, data_collator=collate, subspace="nodes", optimizer="whiten", objective=objective,
        estimator=Nodes(feedback=feedback, every=every),
    )  # fmt: skip
    trainer.train()
    with torch.no_grad():
        assert float(objective.loss(model.eval(), collate(rows))) < share * 0.693


def test_the_readout_of_pairs_is_the_loss_and_its_slope_autograds():
    model, rows, collate = last_block(), pairs(), PairCollator(PAD)
    list(keep_reference(tiny_llama(1, vocab_size=4 + len(WORDS)), rows, collate))
    batch, objective = collate(rows), Preference(beta=0.3)
    objective.probe(model, batch)
    places = objective.places(model, batch)
    readouts = {name: objective.readout(model, batch, name) for name in objective.feedbacks}
    for one in readouts.values():
        torch.testing.assert_close(one.losses.mean(), objective.loss(model, batch))
        assert one.unit.tolist() == (places.row // 2).tolist()
    below: list = []
    handle = model.model.norm.register_forward_pre_hook(lambda _m, args: below.append(args[0]))
    loss = objective.loss(model, batch)
    handle.remove()
    (wanted,) = torch.autograd.grad(loss * len(rows), below)
    torch.testing.assert_close(readouts["hidden"].slopes, places.of(wanted), rtol=1e-3, atol=1e-6)


# ---- what is refused -------------------------------------------------------------------------------------------------

JUDGED = ["objective=reward", "objective.function=zoft.lm.rewards:countdown"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=zoft", *JUDGED], "a probe in every step: use method=nodes"),
        (["method=nodes", *JUDGED, "subspace.positions=all"], "use positions=loss"),
        (["method=nodes", *JUDGED, "objective.temperature=1", "objective.num_samples=2"], "set it to 1"),
        (["method=nodes", *JUDGED, "estimator.feedback=hidden"], "choose one of loss, or auto"),
    ],
)
def test_a_run_of_losses_alone_that_cannot_work_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        compose(["task=sst2", "model.name=none", *words])


def test_a_trainer_says_what_a_reward_needs(tmp_path):
    with pytest.raises(UserError, match="every=1"):
        rewarded(tmp_path, estimator=Nodes()).train()


def test_losses_alone_are_composed_for_a_reward():
    cfg = compose(["task=sst2", "model.name=none", "method=nodes", *JUDGED])
    assert cfg.estimator.feedback == "loss"


def test_compiled_code_is_named_where_it_hides_what_is_read():
    with pytest.raises(UserError, match=r"leave trainer\.torch_compile out"):
        own_readout(torch.compile(tiny_llama(), backend="eager"), models.batch_for(tiny_llama()), "hidden")
