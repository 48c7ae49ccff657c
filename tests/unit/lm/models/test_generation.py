"""What a model writes: the same in a batch and alone, greedy and sampled, and no global random state moves."""

from __future__ import annotations

import random

import numpy
import pytest
import torch

from tests.models import CAUSAL, tiny_llama
from tests.runs import WORDS, tiny_tokenizer
from zoft.lm.models.generate import Answering, _TokenChoices, write
from zoft.utils.random_state import prompt_generator

PROMPTS = [[0, 5, 6, 7], [0, 8], [0, 9, 10, 11, 12, 13]]
VOCABULARY = 4 + len(WORDS)


@pytest.fixture(scope="module")
def answering() -> Answering:
    return Answering(tiny_tokenizer(), max_new_tokens=6)


def naive(model, prompt: list[int], answering: Answering) -> list[int]:
    """The likeliest token after the other, each from a whole forward."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + answering.max_new_tokens and ids[-1] != answering.tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_writes_what_each_prompt_alone_does(family, answering):
    model = CAUSAL[family](vocab_size=VOCABULARY)
    before = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
    model.generation_config.repetition_penalty = 50.0  # a model's own settings choose nothing
    for temperature in (0.0, 0.7):
        together = write(model, PROMPTS, answering, temperature=temperature, seed=1)
        alone = [write(model, [one], answering, temperature=temperature, seed=1) for one in PROMPTS]
        assert together.texts == [one.texts[0] for one in alone]
        assert all(margin > 0 for margin in together.margins)
        if not temperature:
            wanted = [naive(model, prompt, answering) for prompt in PROMPTS]
            assert together.texts == [answering.tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]
        else:
            assert together.texts != write(model, PROMPTS, answering, temperature=temperature, seed=2).texts
    after = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_samples_follow_the_model(answering):
    logits = 3 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    generators = [prompt_generator(seed, PROMPTS[0]) for seed in range(2000)]
    ids = torch.zeros(len(generators), 1, dtype=torch.int64)
    chosen = (
        _TokenChoices(ids, [], answering, 2.0, generators).choose(ids, logits.expand(len(generators), -1)).argmax(1)
    )
    drawn = torch.bincount(chosen, minlength=VOCABULARY) / len(generators)
    torch.testing.assert_close(drawn, torch.softmax(logits[0] / 2, -1), rtol=0, atol=0.04)


def test_a_text_ends_where_the_task_says(answering):
    model = tiny_llama(vocab_size=VOCABULARY)
    (text,) = write(model, PROMPTS[:1], answering).texts
    first = text.split()[0]
    stopped = Answering(answering.tokenizer, 6, stop=first)
    assert write(model, PROMPTS[:1], stopped).texts == [first]
