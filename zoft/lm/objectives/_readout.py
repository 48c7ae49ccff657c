"""What one forward tells of each position that the loss is read from: what moves there, and the loss's slope in it.

Node directions (``subspace=nodes``) ask for it with and without a perturbation of layers' outputs at these positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from zoft.errors import UserError
from zoft.lm.logits.call import Inputs, inner, is_compiled
from zoft.lm.logits.head import Forward, Positions, logits_of_tokens, with_rows
from zoft.lm.logits.logits import MAX_LOGITS
from zoft.lm.logits.support import probe
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.tensors import layer_of

_FEW = 1e-6  # of a loss: below it the odds of the right answer are taken as 1 / _FEW


@dataclass(frozen=True)
class Readout:
    """One forward of a batch, position by position.

    Args:
        values: what a perturbation at each position is seen in, float32 [P, C].
        slopes: the derivative of the summed losses in them, [P, C].
        keys: [P] int64: positions with the same key answer a perturbation alike on average.
        columns: [C] int64: which values these are, the same from batch to batch.
        losses: the terms whose mean is the loss, [U]; differentiable where gradients are on.
        unit: [P] int64, the term that each position belongs to.
        calls: [P] int64, in how many calls of the model each position's row takes part, where a text is written token
            by token; None where there is one.
        asked: [P, C] whether a value is one of the position's own; None where all are.
    """

    values: Tensor
    slopes: Tensor
    keys: Tensor
    columns: Tensor
    losses: Tensor
    unit: Tensor
    calls: Tensor | None = None
    asked: Tensor | None = None


def of_scores(scores: Tensor, gold: Tensor, columns: Tensor, index: Tensor | None = None) -> Readout:
    """One position an example; seen in the scores of its options, whose common part cancels.

    Args:
        scores: [B, C], of every column.
        gold: [B], the right one of an example's options.
        columns: [C] what each score is of.
        index: [B, O] the columns of an example's options; all of them in order if left out.
    """
    own_scores = scores if index is None else scores.gather(1, index)
    losses = torch.nn.functional.cross_entropy(own_scores, gold, reduction="none")
    slopes = own_scores.detach().softmax(1)  # dL/dz = softmax(z) - onehot(y)
    # -1 at the right answer: the softmax's gradient
    slopes[torch.arange(len(gold), device=gold.device), gold] -= 1
    if index is not None:
        # columns of options that an example does not have get no slope
        slopes = torch.zeros_like(scores.detach()).scatter_add_(1, index, slopes)
    # a shift of all scores moves no loss: it is taken out, and responses need not know it
    values, asked = (scores - scores.mean(1, keepdim=True)).detach(), None
    order = torch.arange(len(gold), device=gold.device)
    if index is not None and len(gold) and index.shape[1] < len(columns):
        # options that other examples of the batch have tell nothing: how a step is cut into batches must not matter
        asked = torch.zeros_like(slopes, dtype=torch.bool).scatter_(1, index, torch.ones_like(index, dtype=torch.bool))
        values = (scores.detach() - own_scores.detach().mean(1, keepdim=True)) * asked
    return Readout(values, slopes, torch.zeros_like(order), columns, losses, order, asked=asked)


def of_losses(losses: Tensor, unit: Tensor) -> Readout:
    """Each position is seen in the loss of its own term; every term is one of a kind."""
    values = losses.detach()[unit].unsqueeze(1)
    zero = torch.zeros(1, dtype=torch.int64, device=unit.device)
    # dL_u/dL_u = 1: the term is the value itself
    return Readout(values, torch.ones_like(values), torch.zeros_like(unit), zero, losses, unit)


def of_log_odds(losses: Tensor, gold: Tensor) -> Readout:
    """One position an example, seen in the log-odds of its right answer, which its loss alone tells.

    Args:
        losses: L = -log p of the right answer, [B].
        gold: [B] which answer is right.
    """
    # expm1(0) = 0 would make infinite odds
    known = losses.detach().clamp_min(_FEW)
    values = -torch.log(torch.expm1(known))  # l(L) = log p / (1 - p)
    slopes = torch.expm1(-known)  # dL/dl = -(1 - p)
    order = torch.arange(len(gold), device=gold.device)
    zero = torch.zeros(1, dtype=torch.int64, device=gold.device)
    return Readout(values.unsqueeze(1), slopes.unsqueeze(1), gold.to(torch.int64), zero, losses, order)


def of_sequences(log_probs: Tensor, rows: Tensor, lengths: Tensor, groups: Sequence[int], gold: Tensor) -> Readout:
    """Options of several tokens: each of their positions is seen in the score of its own option.

    Args:
        log_probs: of the option tokens, [N], row by row.
        rows: tokens of the options, one tensor a row, for their keys.
        lengths: [R] tokens of each row's option.
        groups: how many rows each example has.
        gold: [B].
    """
    num_rows, device = len(lengths), log_probs.device
    row_of = torch.repeat_interleave(torch.arange(num_rows, device=device), lengths)
    # mean log-probability of each option: sum over its tokens / their number
    scores = log_probs.new_zeros(num_rows).index_add(0, row_of, log_probs) / lengths
    example = torch.repeat_interleave(torch.arange(len(groups), device=device), torch.tensor(groups, device=device))
    # [B, O] with -inf where an example has fewer options: they get no probability
    padded = torch.nn.utils.rnn.pad_sequence(
        list(scores.split(list(groups))), batch_first=True, padding_value=-torch.inf
    )
    losses = torch.nn.functional.cross_entropy(padded, gold, reduction="none")
    # dL/ds = softmax(s) - onehot, per option, and each of its positions has that slope
    share = padded.detach().softmax(1)
    share[torch.arange(len(gold), device=device), gold] -= 1
    of_row = torch.cat([one[:count] for one, count in zip(share, groups, strict=True)])
    keys = torch.cat([_keys_of(tokens) for tokens in rows.split(lengths.tolist())]).to(device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    values = scores.detach()[row_of].unsqueeze(1)
    return Readout(values, of_row[row_of].unsqueeze(1), keys, zero, losses, example[row_of])


def _keys_of(tokens: Tensor) -> Tensor:
    """A number for each token of an option: the same wherever the same option stands."""
    digest = hashlib.blake2b(repr(tokens.tolist()).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") + torch.arange(len(tokens))


# ---- the hidden state under the head ---------------------------------------------------------------------------------

Terms = Callable[["Tensor"], "Tensor"]
"""Log-probabilities of tokens, or logits of options -> the terms of the loss."""


def of_hidden(
    model: nn.Module,
    inputs: Inputs,
    places: Positions,
    unit: Tensor,
    *,
    terms: Terms,
    targets: Tensor | None = None,
    options: Tensor | None = None,
) -> Readout:
    """Each position is seen in its own last hidden state h; the loss's slope in h is that of norm and head alone.

    Args:
        model: any causal language model.
        inputs: its keyword arguments.
        places: P positions.
        unit: [P] the term each belongs to.
        terms: the targets' log-probabilities [P], or the options' logits [P, C], to the terms of the loss [U].
        targets: [P] the token that is predicted at each position.
        options: [C] the tokens whose logits alone decide the loss, in place of ``targets``.

    Raises:
        UserError: the model's head cannot be given some of its positions.
    """
    # known before the queries: a perturbed forward must call the model as the clean one does
    known = probe(model, inputs, places)
    if not known.rows or known.after is None:
        why = "head is used in a way that it cannot be read from: use estimator.feedback=loss"
        if is_compiled(model):
            why = "compiled code (trainer.torch_compile=true) does not show it: leave trainer.torch_compile out"
        raise UserError(
            f"estimator.feedback=hidden reads the last hidden state of {type(inner(model)).__name__}, whose {why}"
        )
    norm = _final_norm(model)
    entered: list[Tensor] = []
    hook = nullcontext() if norm is None else norm.register_forward_pre_hook(lambda _m, args: entered.append(args[0]))
    outputs: list[Tensor] = []

    def of_rows(forward: Forward, rows: Tensor) -> Tensor:
        below, through = _under_norm(norm, entered, places, rows)
        after = known.after
        assert after is not None
        with torch.inference_mode(False), torch.enable_grad():
            # a graph of norm and head alone: it is as large as the positions, not as the model
            h = below.detach().clone().requires_grad_()

            def logits_of(part: Tensor) -> Tensor:
                row = through(part)
                if options is None:
                    return after(forward(row.unsqueeze(0)))[0].float()
                # two options need two rows of the head: the whole vocabulary's is most of what a step would read
                if known.tokens:
                    return after(logits_of_tokens(model, row, options).unsqueeze(0))[0]
                return after(forward(row.unsqueeze(0)))[0].index_select(1, options).float()

            outputs.extend((h.detach().float(), *_loss_and_slope(h, logits_of, terms, targets, known.vocabulary)))
        # what the class does behind its head is known, and needs no more than a number to be done with
        return rows.new_zeros(1, 1, 1)

    with torch.no_grad(), hook:
        with_rows(model, inputs, places, of_rows)
    values, losses, slopes = outputs
    zeros, columns = torch.zeros_like(unit), torch.arange(values.shape[1], device=unit.device)
    return Readout(values, slopes.float(), zeros, columns, losses, unit)


def _loss_and_slope(
    h: Tensor, logits_of: Callable[[Tensor], Tensor], terms: Terms, targets: Tensor | None, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """(terms [U], d(sum of terms)/dh [P, H]); token by token in chunks of bounded size."""
    if targets is None:
        losses = terms(logits_of(h))
        # dL/dh by autograd through norm and head: [P, H]
        return losses.detach(), torch.autograd.grad(losses.sum(), h)[0]
    size = max(1, MAX_LOGITS // vocabulary)
    log_probs, slopes = [], []
    # chunk by chunk: logits of all positions at once could take more memory than the model
    for start in range(0, len(h), size):
        part = h[start : start + size]
        piece = -torch.nn.functional.cross_entropy(logits_of(part), targets[start : start + size], reduction="none")
        slopes.append(torch.autograd.grad(piece.sum(), h)[0][start : start + size])  # one position's is its own
        log_probs.append(piece.detach())
    values = torch.cat(log_probs).requires_grad_()
    losses = terms(values)
    # dL/dh_p = dL/dlog p_p * dlog p_p/dh_p
    (weight,) = torch.autograd.grad(losses.sum(), values)
    return losses.detach(), weight.unsqueeze(1) * torch.cat(slopes)


def _final_norm(model: nn.Module) -> nn.Module | None:
    """The last normalisation outside of the numbered layers."""
    norms = [
        module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and layer_of(name) is None and not list(module.children())
    ]
    return norms[-1] if norms else None


def _under_norm(
    norm: nn.Module | None, entered: list[Tensor], places: Positions, rows: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(what enters the last normalisation, the way from there to the head), or the head's own input."""
    if norm is not None and len(entered) == 1 and entered[0].dim() == 3:
        below = places.of(entered[0])
        # the norm must lead to the head's input, or something stands between them
        if torch.allclose(norm(below).float(), rows.float(), 1e-2, 1e-2 * float(rows.abs().max().nan_to_num())):
            return below, partial(_called, norm)
    return rows, lambda part: part


def _called(module: nn.Module, part: Tensor) -> Tensor:
    output: Tensor = module(part)
    return output
