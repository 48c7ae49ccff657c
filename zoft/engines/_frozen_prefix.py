"""Hidden states below the lowest trained block: computed once per example, alone and unpadded, and reused.

Where nothing below block k is trained, what enters block k depends on the example alone. Every query and every
evaluation then runs only the blocks from k on. A row's states are computed by itself, so they do not depend on which
batch it first appeared in, and a resumed run finds the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from zoft.engines._lockstep import sequential
from zoft.engines._prefix import (
    forwards_replaced,
    hidden_states_in,
    longest_stack,
    lowest_with,
    passes_through,
    with_hidden_states,
)
from zoft.engines._rows import NOT_HIDDEN, RowStore, row_inputs, row_key, same_rows, without_padding
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.tensors import Weights
from zoft.weights.wider import TOLERANCE, widened

log = logging.getLogger(__name__)


class FrozenPrefix:
    """The kept hidden states of one model.

    Args:
        model: the module that the objective calls with keyword arguments.
        blocks: its stack of blocks.
        first: index k of the lowest block that is trained.
        outside: modules outside the stack that are trained; none of them may run before block k.
        max_bytes: bound on what is kept; rows beyond it are computed again when they come.
    """

    def __init__(
        self, model: nn.Module, blocks: list[nn.Module], first: int, outside: list[nn.Module], max_bytes: int
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.first = first
        self.outside = outside
        self.max_bytes = max_bytes
        self.usable = True
        self._left_out = ExitStack()  # puts back the forwards of the blocks that pass their input through
        self._checked = self._capturing = self._filling = False
        self.clear()

    @classmethod
    def of(cls, model: nn.Module, weights: Weights, max_mb: int) -> FrozenPrefix | None:
        """The prefix of this model under these trained weights, or None where there is none to keep."""
        blocks = longest_stack(model)
        trained = set(weights.owners)
        first = lowest_with(trained, blocks)
        if not 0 < first < len(blocks):
            return None
        # outside of the stack: a head is behind block k, embeddings in front of it; the first forward shows which
        inside = {module for block in blocks for module in block.modules()}
        outside = [module for module in trained if module not in inside]
        return cls(model, blocks, first, outside, max_mb * 2**20)

    def clear(self) -> None:
        """Drop all kept hidden states."""
        self.rows = RowStore(self.max_bytes)
        self._batch: tuple[dict[str, Tensor], Tensor] | None = None  # the last batch, put together
        self._serving: Tensor | None = None

    def share(self, other: FrozenPrefix) -> None:
        """Keep the rows that another prefix keeps too: of the same weights below the same block, in another model.

        Whether they are what enters this model's block is checked at its first batch, as ever: what is trained outside
        the blocks may be another part here. It has been checked where model and trained parts are the same ones.
        """
        self.rows = other.rows
        same = self.model is other.model and self.first == other.first and self.outside == other.outside
        self._checked = self._checked or (same and other._checked)

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Within this block, forwards of the model start at block k wherever that is exact."""
        # what the call's inputs decide; the states, given to block k; and everything put back behind the model
        with ExitStack() as hooks:
            hooks.callback(self._after)
            hooks.enter_context(self.model.register_forward_pre_hook(self._before, with_kwargs=True))
            hooks.enter_context(self.blocks[self.first].register_forward_pre_hook(self._inject, with_kwargs=True))
            hooks.enter_context(self.model.register_forward_hook(self._after, always_call=True))
            yield

    def fill(self, forward: Callable[[], Any]) -> None:
        """Keep the rows of one batch of equal lengths, computed together: several times faster than one by one.

        Which rows are computed together can change their last bits, so a run that has to be repeatable fills in an
        order that depends on its data alone (:meth:`zoft.trainer.forward.QueryForward.fill_prefix`).

        Args:
            forward: calls the model once on that batch; it is cut short at block k.
        """
        self._filling = True
        try:
            with self.reused():
                forward()
        except _Stopped:
            pass
        finally:
            self._filling = False

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # positional arguments could be anything; and a forward that captures states must run the lower blocks
        if not self.usable or args or self._capturing:
            return
        inputs = row_inputs(kwargs)
        if inputs is None:
            return
        # rows without padding can go together; a padded row's states could depend on the rows beside it
        if self._filling and bool(inputs["attention_mask"].all()):
            self._keep_together(inputs)
            raise _Stopped(inputs["input_ids"])
        # the points of a step ask for one batch again and again: it is put together once
        if self._batch is None or not same_rows(self._batch[0], inputs):
            hidden = self._hidden_of(inputs)
            if hidden is None:
                return
            self._batch = (inputs, hidden)
            # the first batch goes the ordinary way too: exactness is seen, not assumed
            if not self._checked:
                self._check(kwargs, inputs, hidden)
                if not self.usable:
                    return
        self._serving = self._batch[1]
        for block in self.blocks[: self.first]:
            if block.__dict__.get("forward") is not passes_through:  # another forward, side by side, may have come by
                self._left_out.enter_context(forwards_replaced([block], lambda _: passes_through))

    def _inject(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._serving is None:
            return None
        # a copy: a block may write into its input
        return with_hidden_states(self._serving.clone(), args, kwargs)

    def _after(self, *_: Any) -> None:
        if self._capturing:
            return
        self._serving = None
        self._left_out.close()

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _hidden_of(self, inputs: dict[str, Tensor], keep: bool = True) -> Tensor | None:
        """What enters block k for a padded batch, [B, T, H]; zeros at padding."""
        rows = []
        for row in without_padding(inputs):
            states = self._row(row) if keep else self._capture_row(row)
            if states is None:
                return None
            rows.append(states)
        mask = inputs["attention_mask"].bool()
        # zeros at padding change nothing elsewhere: every block masks it
        hidden = rows[0].new_zeros((*mask.shape, rows[0].shape[-1]))
        # [B, T, H] at the mask <- the rows' own states, one behind the other
        hidden[mask] = torch.cat(rows)
        return hidden

    def _row(self, row: dict[str, Tensor]) -> Tensor | None:
        key = row_key(row)
        hidden = self.rows.get(key)
        if hidden is not None:
            return hidden
        hidden = self._capture_row(row)
        if hidden is not None:
            self.rows.put(key, hidden)
        return hidden

    def _capture_row(self, row: dict[str, Tensor]) -> Tensor | None:
        hidden = self._capture(row)
        return None if hidden is None else hidden[0]

    def _keep_together(self, inputs: dict[str, Tensor]) -> None:
        # the rows of this batch that are not known yet, each once
        rows = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(len(inputs["input_ids"]))]
        missing = {key: i for i, key in enumerate(map(row_key, rows)) if key not in self.rows}
        if missing:
            chosen = list(missing.values())
            hidden = self._capture({name: value[chosen] for name, value in inputs.items()})
            if hidden is not None:
                for key, states in zip(missing, hidden, strict=True):
                    # a copy: a view of one row would keep the whole batch's states alive
                    self.rows.put(key, states.clone())

    def _capture(self, kwargs: dict[str, Any]) -> Tensor | None:
        """Run the model up to block k, return what would enter it; None (and never again) where that is not exact."""
        early: list[nn.Module] = []
        # what runs before block k is noted by hooks: the forward itself is cut off there
        handles = [module.register_forward_pre_hook(lambda m, _: early.append(m)) for module in self.outside]
        if self.first:
            handles.append(self.blocks[0].register_forward_hook(self._look_at_output))
        handles.append(self.blocks[self.first].register_forward_pre_hook(_stop, with_kwargs=True))
        self._capturing = True  # the hooks of `reused` stay out of this forward
        try:
            # sequential: the forwards beside this one are not waited for
            with torch.no_grad(), sequential():
                self.model(**kwargs, use_cache=False)
        except _Stopped as stopped:
            if early:
                self._give_up("a trained module outside the blocks runs before them")
            return stopped.hidden.detach() if self.usable else None
        finally:
            self._capturing = False
            for handle in handles:
                handle.remove()
        self._give_up("the blocks are not called by the model's forward")
        return None

    def _look_at_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            self._give_up("a block hands more than hidden states to the next one")

    def _check(self, kwargs: dict[str, Any], inputs: dict[str, Tensor], hidden: Tensor) -> None:
        """The first batch is computed the ordinary way too: the kept states must be what enters block k."""
        self._checked = True
        kwargs = {name: value for name, value in kwargs.items() if name not in NOT_HIDDEN}
        ordinary = self._capture(kwargs)
        # 16 bits round by the shape of the call: two ways to the same states differ by units in the last place
        if ordinary is not None and self._agree(
            ordinary, hidden, inputs, 5e-2 if hidden.element_size() < 4 else TOLERANCE
        ):
            self._check_in_float32(kwargs, inputs)

    def _check_in_float32(self, kwargs: dict[str, Any], inputs: dict[str, Tensor]) -> None:
        """Compare in float32, where no rounding hides that states depend a little on the batch."""
        with widened(self.model) as dtype:
            if dtype is None:
                return
            try:
                ordinary, hidden = self._capture(kwargs), self._hidden_of(inputs, keep=False)
            except (RuntimeError, TypeError, ValueError) as error:
                self._give_up(f"the class cannot compute them in float32, to compare ({error})")
                return
        if ordinary is not None and hidden is not None:
            self._agree(ordinary, hidden, inputs, TOLERANCE)

    def _agree(self, ordinary: Tensor, hidden: Tensor, inputs: dict[str, Tensor], tolerance: float) -> bool:
        """Whether two ways to the states [B, T, H] agree, at each position beside its own largest value."""
        # max_h |difference| / max_h |state|: a position with large states does not hide one with small ones
        off = (ordinary - hidden).abs().amax(-1) / ordinary.abs().amax(-1).clamp_min(1e-30)
        largest = float(off[inputs["attention_mask"].bool()].max())
        if not largest <= tolerance:
            self._give_up(f"its states depend on the batch (off by {largest:.2g} of the largest value)")
        return largest <= tolerance

    def _give_up(self, why: str) -> None:
        self.usable = False
        self.clear()
        log.warning("hidden states below block %d are not kept between queries: %s", self.first, why)


class _Stopped(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Stopped(hidden_states_in(args, kwargs))
