"""Logits and log-probabilities at the positions that count, in bounded memory, for whatever causal model is given."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from zoft.lm.logits.call import Inputs, called, refuse_elsewhere, takes
from zoft.lm.logits.head import Forward, Positions, logits_of_rows, with_rows
from zoft.lm.logits.support import HeadSupport, probe, say_once
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.elsewhere import runtime_of

MAX_LOGITS = 2**24
"""Elements of logits that are alive at once, 64 MiB of float32; what would be more is computed in chunks."""


def logits_at(model: nn.Module, inputs: Inputs, positions: Positions, tokens: Tensor | None = None) -> Tensor:
    """Logits at some positions of a batch; the head is applied to those positions only.

    Args:
        model: any causal language model of transformers, also inside an adapter or compiled.
        inputs: its keyword arguments, as :func:`zoft.lm.logits.call.arguments` makes them.
        positions: N positions.
        tokens: [C] vocabulary indices; of a linear head only their rows are read.

    Returns:
        [N, V], or [N, C] with ``tokens``; float32. Where the forward runs elsewhere they are log-probabilities, which
        differ from logits by a number for each position.

    Raises:
        UserError: the forward runs elsewhere, where logits of the whole vocabulary cannot be had.
    """
    # engine=onnx or server: log-probabilities come from there, over the whole vocabulary
    if tokens is None:
        refuse_elsewhere(model)
    elif (runtime := runtime_of(model)) is not None:
        return runtime.log_probs(inputs, positions.row, positions.column, tokens.expand(len(positions), -1))
    known = probe(model, inputs, positions)
    if not known.rows:
        logits = _plainly(model, inputs, positions, known)
    elif tokens is None or not known.tokens:
        logits = logits_of_rows(model, inputs, positions)
    # z of all tokens at the wanted rows: [N, V]
    else:
        return logits_of_rows(model, inputs, positions, tokens).float()
    return (logits if tokens is None else logits.index_select(1, tokens)).float()


def log_probs_at(model: nn.Module, inputs: Inputs, positions: Positions, targets: Tensor) -> Tensor:
    """Log-probability of one token at each position, with no more than :data:`MAX_LOGITS` logits alive.

    More are computed in chunks behind one forward; where the model cannot do that, a few sequences at a time.

    Args:
        model: any causal language model of transformers.
        inputs: its keyword arguments.
        positions: N positions, sequence by sequence.
        targets: [N] the tokens.

    Returns:
        float32 [N].
    """
    runtime = runtime_of(model)
    if runtime is not None:
        return runtime.log_probs(inputs, positions.row, positions.column, targets.unsqueeze(1)).squeeze(1)
    return log_probs_here(model, inputs, positions, targets)


def log_probs_here(model: nn.Module, inputs: Inputs, positions: Positions, targets: Tensor) -> Tensor:
    """:func:`log_probs_at` of a model that is called in this process."""
    known = probe(model, inputs, positions)
    # all at once where they fit: one product of the head
    if known.rows and len(targets) * known.vocabulary <= MAX_LOGITS:
        return _log_probs(logits_of_rows(model, inputs, positions), targets)
    # chunk by chunk behind one forward: the head is the part that takes memory
    if known.rows and known.after is not None:
        return _in_chunks(model, inputs, positions, targets, known)
    # a few sequences at a time: the model gives whole rows of logits only
    parts = _by_sequences(model, inputs, positions, known)
    return torch.cat([_log_probs(logits_at(model, part, within), targets[which]) for part, within, which in parts])


def log_probs_of(model: nn.Module, inputs: Inputs, positions: Positions, tokens: Tensor) -> Tensor:
    """Log-probabilities of several tokens at each position, over the whole vocabulary.

    Args:
        model: any causal language model of transformers.
        inputs: its keyword arguments.
        positions: N positions.
        tokens: [N, C] the tokens.

    Returns:
        float32 [N, C].
    """
    runtime = runtime_of(model)
    if runtime is not None:
        return runtime.log_probs(inputs, positions.row, positions.column, tokens)
    return torch.log_softmax(logits_at(model, inputs, positions), dim=-1).gather(1, tokens)


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    # log p_t = z_t - log sum_v exp(z_v), in float32 whatever the logits are
    return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _plainly(model: nn.Module, inputs: Inputs, positions: Positions, known: HeadSupport) -> Tensor:
    """Whole rows of logits, or their ends where the class offers that; the positions are taken from them."""
    if not known.ends or not takes(model, "logits_to_keep"):
        return positions.of(called(model, inputs))
    # As indices, not as a number: a slice of the hidden states is not contiguous, and the head would then be one
    # small product per row that reads the whole vocabulary matrix each time (75 ms instead of 10 for 16 rows).
    last = torch.arange(int(positions.column.min()), 0, device=positions.column.device)
    return positions.of(called(model, inputs, logits_to_keep=last))


def _in_chunks(model: nn.Module, inputs: Inputs, positions: Positions, targets: Tensor, known: HeadSupport) -> Tensor:
    """One forward, whose head goes through its rows a chunk at a time and keeps their log-probabilities only."""
    # N x V <= MAX_LOGITS for each chunk
    size = max(1, MAX_LOGITS // known.vocabulary)
    say_once(model, f"logits are computed {size:,} positions at a time", logging.INFO)
    parts: list[Tensor] = []

    def of_rows(forward: Forward, rows: Tensor) -> Tensor:
        for chunk, wanted in zip(rows.split(size), targets.split(size), strict=True):
            logits = forward(chunk.unsqueeze(0))
            assert known.after is not None
            parts.append(_log_probs(known.after(logits)[0], wanted))
            first = logits[:, :1].clone()
            del logits  # before the next chunk is made
        return first  # something for what the class does behind its head: the result is in ``parts``

    with_rows(model, inputs, positions, of_rows)
    return torch.cat(parts)


def _by_sequences(
    model: nn.Module, inputs: Inputs, positions: Positions, known: HeadSupport
) -> Iterator[tuple[Inputs, Positions, Tensor]]:
    """(part of the batch, its positions, which of all they are): as many sequences as the bound allows, one or more."""
    batch, length = inputs["input_ids"].shape
    # logits that a sequence costs: its positions where rows can be taken, else its whole length
    counts = torch.bincount(positions.row, minlength=batch).tolist()
    if not known.rows:
        num_columns = -int(positions.column.min()) if known.ends and takes(model, "logits_to_keep") else length
        counts = [num_columns if count else 0 for count in counts]
    cuts = [0]
    # cut where the next sequence would exceed the bound; one sequence is never cut
    for row in range(1, batch):
        if sum(counts[cuts[-1] : row + 1]) * known.vocabulary > MAX_LOGITS:
            cuts.append(row)
    if len(cuts) > 1:
        say_once(model, "the logits of a batch are too many at once: it is computed in parts", logging.WARNING)
    for first, last in zip(cuts, [*cuts[1:], batch], strict=True):
        if any(counts[first:last]):
            # positions of these sequences, with rows counted from the first of them
            which = (positions.row >= first) & (positions.row < last)
            part = {
                key: value[first:last] if torch.is_tensor(value) and value.shape[:1] == (batch,) else value
                for key, value in inputs.items()
            }
            yield part, Positions(positions.row[which] - first, positions.column[which]), which
