"""Answers that a causal model writes: batched, with a key-value cache, greedy or sampled by a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoft.lm.data.rows import padded
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.elsewhere import Runtime, runtime_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answering:
    """How a task's answers are written and read; it travels with the batch.

    Args:
        tokenizer: the model's.
        max_new_tokens: tokens an answer may have.
        stop: text that ends an answer, beside the tokenizer's end-of-text mark; empty for none.
        answer_in: the answer in a text that was generated.
        metric: f1 or exact_match.
        as_mezo: F1 as MeZO's published code has it (:func:`zoft.lm.metrics.answers.f1_of_mezo`).
    """

    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    stop: str = ""
    answer_in: Callable[[str], str] = str.strip
    metric: str = "f1"
    as_mezo: bool = False


@dataclass(frozen=True)
class Written:
    """What a model wrote.

    Args:
        texts: one a prompt, without the prompt and without special tokens.
        margins: of each, by how much the likeliest token led the next at the closest of its choices, in logits.
        lengths: of each, how many tokens were chosen, the one that ends it included.
    """

    texts: list[str]
    margins: list[float]
    lengths: list[int]


def write(
    model: nn.Module, prompts: Sequence[Sequence[int]], answering: Answering, *, temperature: float = 0.0, seed: int = 0
) -> Written:
    """Continue prompts, all of them in one batch padded on the left.

    Sampling adds Gumbel noise to the logits and takes the largest, which draws from softmax(logits / temperature). The
    noise of a prompt comes from the seed and the prompt alone: it is the same in every batch and at every point that a
    step asks about, and no global random state moves.

    Args:
        model: a causal language model of transformers, also inside an adapter.
        prompts: token ids, one list each.
        answering: how long answers may be, and what ends them.
        temperature: 0 takes the likeliest token.
        seed: of the samples.

    References: Gumbel 1954; Maddison et al. 2014 (A* sampling) for the maximum.
    """
    runtime = runtime_of(model)
    if runtime is not None and runtime.writes:
        return _written_elsewhere(runtime, model, prompts, answering, temperature, seed)
    import transformers

    from zoft.utils.random_state import prompt_generator

    tokenizer = answering.tokenizer
    # left-padded: every prompt ends at the right end, where its text goes on
    device = next(model.parameters()).device
    ids = padded(prompts, tokenizer.pad_token_id).to(device)
    mask = padded([[1] * len(prompt) for prompt in prompts], 0).to(device)
    ends = _ends(model, tokenizer)
    # a generator for every prompt: the same noise for it in any batch
    watch = _TokenChoices(ids, ends, answering, temperature, [prompt_generator(seed, prompt) for prompt in prompts])
    # Every setting that would change a choice is named: what the model's own generation_config says does not count.
    config = transformers.GenerationConfig(
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        max_new_tokens=answering.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends or None,
        use_cache=True,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
    )
    out: Any = model.generate(  # type: ignore[operator]  # transformers' models have it
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=transformers.LogitsProcessorList([watch.choose]),
        stopping_criteria=transformers.StoppingCriteriaList([watch.finished]),
    )
    # what was written stands behind the prompts' columns
    texts = [watch.text(row) for row in out[:, ids.shape[1] :].tolist()]
    return Written(texts, watch.margins.tolist(), watch.lengths.tolist())


def _written_elsewhere(
    runtime: Runtime, model: nn.Module, prompts: Sequence[Sequence[int]], answering: Answering, temperature: float,
    seed: int,
) -> Written:  # fmt: skip
    """As another runtime writes, whose margins are not known."""
    ends = _ends(model, answering.tokenizer)
    rows = runtime.write(
        prompts, max_new_tokens=answering.max_new_tokens, stop=answering.stop, ends=ends, temperature=temperature,
        seed=seed,
    )  # fmt: skip
    return Written([text_of(row, answering, ends) for row in rows], [math.nan] * len(rows), list(map(len, rows)))


def text_of(row: Sequence[int], answering: Answering, ends: Sequence[int]) -> str:
    """What was written, up to the first of ``ends``, the tokens that end a text; padding behind it is no part of it."""
    # up to the first token that ends a text; behind it is padding
    end = next((place for place, token in enumerate(row) if token in ends), len(row))
    text: str = answering.tokenizer.decode(row[:end], skip_special_tokens=True)
    if not answering.stop:
        return text
    # a stop text is part of the answer, as where it is read it marks the end
    before, stop, _ = text.partition(answering.stop)
    return before + stop


def _ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's own generation config (a turn's end)."""
    eos: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more: list[Any] = eos if isinstance(eos, list) else [eos]
    # chat models end a turn by a token of their generation config
    return sorted({int(token) for token in (tokenizer.eos_token_id, *more) if token is not None})


class _TokenChoices:
    """Looks at every choice of one call of ``generate``: adds the noise, keeps the margins, sees the ends."""

    def __init__(
        self, ids: Tensor, ends: list[int], answering: Answering, temperature: float, generators: list[Any]
    ) -> None:
        self.start = ids.shape[1]
        self.ends = ends
        self.answering = answering
        self.temperature = temperature
        self.generators = generators
        self.done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.margins = torch.full((len(ids),), torch.inf, device=ids.device)
        self.lengths = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)

    def choose(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] -> what the largest is taken of."""
        del ids
        scores = scores.float()
        if self.temperature:
            drawn = torch.stack([torch.rand(scores.shape[1], generator=one) for one in self.generators])
            # rand may give 0, whose noise would be -inf: the token is then not taken, as it should almost never be
            # s + T g with g = -log(-log u): its largest is a draw from softmax(s / T) (Gumbel-max)
            scores = scores + self.temperature * -(-drawn.log()).log().to(scores)
        # by how much the likeliest led: ties would be broken by last bits
        top = scores.topk(2, dim=-1).values
        margins = torch.minimum(self.margins, top[:, 0] - top[:, 1])
        # once a text has ended its later tokens are padding
        self.margins = torch.where(self.done, self.margins, margins)
        return scores

    def finished(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """[B] whether an answer is complete."""
        del scores
        # tokens of texts that have not ended yet, the ending one included
        self.lengths += ~self.done
        self.done = self.done | torch.isin(ids[:, -1], torch.tensor(self.ends, device=ids.device, dtype=ids.dtype))
        if self.answering.stop:
            # a stop text may lie across tokens: the whole text is read
            rows = [
                bool(done) or self.answering.stop in self.text(row)
                for row, done in zip(ids[:, self.start :].tolist(), self.done.tolist(), strict=True)
            ]
            self.done = torch.tensor(rows, device=ids.device)
        return self.done

    def text(self, row: list[int]) -> str:
        """What was written."""
        return text_of(row, self.answering, self.ends)
