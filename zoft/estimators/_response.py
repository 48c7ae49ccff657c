"""The response: how the objective answers a perturbation of a layer's outputs, on average over all positions so far."""

from __future__ import annotations

import logging

from zoft.utils.lazy import Tensor, torch

log = logging.getLogger(__name__)


def taken_in(known: Tensor, seen: Tensor) -> Tensor:
    """``known``, and behind it the values of ``seen`` that it lacks, in order.

    Example:
        >>> taken_in(torch.tensor([5, 2]), torch.tensor([7, 2, 3])).tolist()
        [5, 2, 3, 7]
    """
    new = seen.unique()
    return torch.cat((known, new[~torch.isin(new, known)]))


def index_of(known: Tensor, seen: Tensor) -> Tensor:
    """Where each of ``seen`` stands in ``known``; -1 where it does not."""
    # [P, 1] == [K]: each of `seen` against all of `known`
    same = seen.unsqueeze(1) == known  # [P, K]
    return torch.where(same.any(1), same.int().argmax(1), -1)


def says_unknown(keys: Tensor) -> bool:
    """Whether positions have no response (-1 in ``keys``), which is warned of."""
    if count := int((keys < 0).sum()):
        what = "%d of %d positions of a step move nothing, as no probe has seen their answer, and later ones may"
        log.warning(f"{what}: set estimator.every=1 or a larger trainer.per_device_train_batch_size", count, len(keys))
    return count > 0


def widened(response: Tensor, keys: int, columns: int) -> Tensor:
    """A response [K, C, m] with zeros for keys and columns that have come since."""
    # the old answers keep their places: keys and columns are only ever added behind
    wide = response.new_zeros(keys, columns, response.shape[2])
    wide[: response.shape[0], : response.shape[1]] = response
    return wide


def answers(changes: Tensor, directions: Tensor, keys: Tensor, columns: Tensor, count: int, width: int) -> Tensor:
    """sum over probes and positions of (s' - s) / eps v^T, for each key: [K, C, m].

    Args:
        changes: (s' - s) / eps, [q, P, c].
        directions: v, [q, P, m].
        keys: [P] which key each position has, in [0, K).
        columns: [c] which column each value is, in [0, C).
        count: K.
        width: C.
    """
    sums = directions.new_zeros(count, width, directions.shape[2])
    # key by key: a batch has few of them, and each is one product over its positions
    for key in keys.unique().tolist():
        of_key = keys == key
        # R_k <- R_k + sum_qp (ds_qp / eps) v_qp^T over the positions p of key k
        sums[key, columns] += torch.einsum("qpc,qpm->cm", changes[:, of_key], directions[:, of_key])
    return sums


def node_gradients(slopes: Tensor, response: Tensor, counts: Tensor, keys: Tensor, columns: Tensor) -> Tensor:
    """e_p = R^T dL/ds_p, with R the mean answer of the position's key: [P, m]; zero for keys never probed.

    Args:
        slopes: dL/ds, [P, c].
        response: sums [K, C, m].
        counts: [K, C] of how many answers.
        keys: [P] which key each position has; -1 for an unknown one.
        columns: [c] which column each value is; -1 for an unknown one.
    """
    e = slopes.new_zeros(len(keys), response.shape[2])
    is_known = columns >= 0
    for key in keys.unique().tolist():
        if key >= 0:
            of_key, known = keys == key, columns[is_known]
            # e_p = R_k^T dL/ds_p with R_k = sums / count; columns never probed are left out
            count = counts[key].to(response.device)[known].clamp_min(1).unsqueeze(1)
            e[of_key] = slopes[of_key][:, is_known] @ (response[key, known] / count)
    return e
