"""The queries of a step with node directions: a clean forward, probes of layers' outputs, and the factors they give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from zoft.engines._context import Context, ContextCache
from zoft.engines.nodes import NodeSession
from zoft.errors import UserError
from zoft.estimators._response import answers, index_of, node_gradients, says_unknown, taken_in, widened
from zoft.estimators.nodes import Nodes
from zoft.noise.direction import Direction
from zoft.optimizers._factors import Factors
from zoft.step.parts import go_inside, probes_at, refuse_uncalled
from zoft.step.positions import NodePositions, ObjectiveReader, expand, numbered
from zoft.step.shares import Shares
from zoft.subspaces._node_layers import Node
from zoft.subspaces.nodes import NodeSpace
from zoft.utils.lazy import Tensor, torch

_ROWS = 256  # directions of a node that are drawn together
_MOST = 4096  # keys times columns of a response: beyond it, options are not what examples have in common
_LAYOUTS = {"experts": "experts", "linear": "matrix", "conv1d": "turned", "scale": "vector", "shift": "vector"}


@dataclass(frozen=True)
class NodeEstimate:
    """What a step with node directions found.

    Args:
        factors: of each tensor's gradient.
        loss: the clean loss.
        num_queries: forward passes that were made; a backward pass counts as two.
        usable: whether everything is finite; otherwise there are no factors.
    """

    factors: dict[str, Factors]
    loss: float
    num_queries: int
    usable: bool


@dataclass
class _Part:
    """A micro-batch between its clean forward and its probes."""

    batch: Any
    places: NodePositions
    clean: Any = None
    tail: Any = None  # the last tokens of each row, where a probe computes those alone
    context: Context | None = None  # what is in front of them
    seen: dict[str, Tensor] = field(default_factory=dict)
    e: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, Tensor] = field(default_factory=dict)  # of each row of e and seen, the expert it is of
    offset: int = 0  # number of its first position in the step, over all processes

    def takes_part(self, call: str) -> Tensor | None:
        """[P] whose text is not complete at this call, where texts are written token by token; None for all."""
        calls = self.clean.calls
        return None if calls is None else calls[self.places.anchor] > int(call.partition("@")[2] or 0)


@dataclass
class _Drawn:
    """The directions of some probes of a step, over all its positions."""

    space: NodeSpace
    direction: Direction
    first: int
    count: int
    total: int
    kept: dict[str, Tensor] = field(default_factory=dict)

    def draw(self, key: str, size: int, device: torch.device) -> None:
        """Draw the directions of one node's outputs, where they are not drawn yet."""
        if key not in self.kept:
            named, rows = f"{key}|{self.first}", self.count * self.total
            self.kept[key] = self.space.directions(self.direction, named, size, rows, device)

    def rows(self, key: str, part: _Part, probe: int) -> Tensor:
        """The directions v of one probe at a micro-batch's positions, [P, m]."""
        start = probe * self.total + part.offset
        return self.kept[key][start : start + len(part.places.rows)]


@dataclass
class NodeQueries:
    """Asks the objective for a step's node gradients.

    Args:
        session: of engine=nodes.
        reader: reads the objective.
        gather: a tensor of this process -> those of all of them; None where there is one.
        rank: number of this process.
        shares: which of a step's probes this process makes, where several have its rows.
    """

    session: NodeSession
    reader: ObjectiveReader
    gather: Callable[[Tensor], list[Tensor]] | None = None
    rank: int = 0
    shares: Shares = field(default_factory=Shares)
    _warned: bool = field(default=False, init=False)

    def __call__(self, batch: Any, direction: Direction, estimator: Nodes) -> NodeEstimate:
        """The estimate of a step.

        Args:
            batch: handed to the reader.
            direction: any of the step's.
            estimator: as it is at this place of the run.
        """
        space = self._space()
        parts = [_Part(one, expand(self.reader.places(one), space)) for one in self.reader.parts(batch)]
        total = self._number(parts)
        probes, exact = probes_at(space, estimator, direction.step), estimator.feedback == "exact"
        first = next((n for n, part in enumerate(parts) if len(part.places.rows)), -1)
        shared = first < 0  # a process without positions leaves it to the others
        for number, part in enumerate(parts):
            # feedback=exact has its own forward, with a graph; the others share one clean forward with the probes
            if exact:
                self._exactly(part)
            elif space.shared is None and number == first and probes:
                with self._keeping_context(part, wanted=True), self._seeing_sums(part) as adds_parts:
                    self._cleanly(part)
                shared = adds_parts()
            else:
                with self._keeping_context(part, wanted=probes > 0):
                    self._cleanly(part)
        refuse_uncalled(space, parts[0].seen)
        # L = sum_i L_i / n over the terms i of all micro-batches and processes
        sums = [sum(float(part.clean.losses.detach().double().sum()) for part in parts)]
        sums.append(sum(len(part.clean.losses) for part in parts))
        total_loss, num_terms = torch.stack(self._all(torch.tensor(sums, dtype=torch.float64))).sum(0).tolist()
        loss = total_loss / num_terms if num_terms else math.nan
        queries = estimator.num_queries + probes
        # a clean loss that is not finite: no probe is made, and the step moves nothing
        if not math.isfinite(loss):
            return NodeEstimate({}, loss, estimator.num_queries, usable=False)
        before = dict(space.response), space.tables, space.shared
        if space.shared is None and probes:
            space.shared = all(bool(one) for one in self._all(torch.tensor([shared])))
        if estimator.feedback == "loss":
            self._own(parts, direction, probes, estimator.eps, total)
        elif not exact:
            if probes:
                self._learn(parts, direction, probes, estimator.eps, total)
            if estimator.response == "identity":
                self._pass_down(parts)
            else:
                self._answer(parts)
        for part in parts:
            self._end_texts(part)
            part.experts = go_inside(self.session, part.e, part.seen)
        factors = self._factors(parts, num_terms, noisy=not exact and estimator.response != "identity")
        # one number that is not finite would spread to the whole tensor
        usable = all(bool(torch.isfinite(one.e).all()) for one in factors.values())
        if not usable:  # such a probe may not stay in the mean that later steps take
            space.response, space.tables, space.shared = before
        return NodeEstimate(factors if usable else {}, loss, queries, usable)

    def _number(self, parts: list[_Part]) -> int:
        """Number the positions by micro-batch, process and row, as one process would have them; how many there are."""
        counts = [each.tolist() for each in self._all(torch.tensor([len(part.places.rows) for part in parts]))]
        offsets, total = numbered(counts, self.rank)
        for number, part in enumerate(parts):
            part.offset = offsets[number]
        return total

    def _space(self) -> NodeSpace:
        space = self.session.coordinates
        assert isinstance(space, NodeSpace)
        return space

    def _contexts(self) -> ContextCache:
        return self.session.contexts(self._space().perturbed(), self.reader.new_cache)

    def _all(self, tensor: Tensor) -> list[Tensor]:
        return [tensor] if self.gather is None else self.gather(tensor)

    # ---- forwards ----------------------------------------------------------------------------------------------------

    def _cleanly(self, part: _Part) -> None:
        """Run the clean forward of a micro-batch; keep its losses, its scores, and the inputs of the nodes."""
        at = part.places
        # not in inference mode: what is seen goes into factors, which are used outside of the query
        with torch.no_grad(), self.session.seeing(self._space().seen(), at.rows, at.columns, len(at.starts)) as seen:
            part.clean = self.reader.read(part.batch)
        part.seen = seen

    @contextmanager
    def _seeing_sums(self, part: _Part) -> Iterator[Callable[[], bool]]:
        """Within this block the clean forward tells whether the parts of all blocks share one response."""
        space, at = self._space(), part.places
        asked = space.subspace.probed
        if asked != "auto" or len(space.parts) < 2 or space.subspace.positions != "loss":
            # one part alone is its own stream; what is asked for is done
            yield lambda: asked == "shared"
            return
        with self.session.adding(space.parts, at.rows, at.columns, len(at.starts)) as verdict:
            yield verdict

    @contextmanager
    def _keeping_context(self, part: _Part, *, wanted: bool) -> Iterator[None]:
        """Within this block the clean forward keeps the context of its last positions, if probes move those alone."""
        contexts = self._contexts()
        last = -int(part.places.columns.min()) if wanted and contexts.usable and len(part.places.columns) else 0
        tail = self.reader.tail(part.batch, last) if last else None
        if tail is None:
            yield
            return
        with contexts.kept(last) as context:
            yield
        if not context.is_whole:
            contexts.give_up("the model is not called once, with a mask and positions")
            return
        part.tail, part.context = tail, context
        if not contexts.checked:
            self._check(part, context)

    def _check(self, part: _Part, context: Context) -> None:
        """Check, once a model, that a forward behind a kept context reads what whole rows give."""
        contexts = self._contexts()
        contexts.checked = True
        # once a model: the values behind kept keys must be those of whole rows, up to rounding
        wanted = part.clean.values
        try:
            with torch.no_grad(), contexts.reused(context):
                values = self.reader.read(part.tail).values
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            values, why = None, f"{type(error).__name__}: {error}"
        else:
            off = float((values - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)) if len(wanted) else 0.0
            few_bits = next(iter(self.session.weights.tensors.values())).element_size() < 4
            values, why = (values if off < (5e-2 if few_bits else 1e-3) else None), f"off by {off:.2g}"
        if values is None:
            contexts.give_up(why)
            part.tail = part.context = None

    def _exactly(self, part: _Part) -> None:
        """Run the clean forward with its graph, and backpropagate to the nodes."""
        # A zero is added to every node's output; dL/d zero is the node's gradient, and no weight needs one.
        at, zeros = part.places, dict[str, Any]()

        def shift(key: str, size: int) -> Tensor:
            device = at.rows.device
            zeros[key] = torch.zeros(len(at.rows), size, device=device, requires_grad=True)
            return zeros[key]

        space = self._space()
        with (
            torch.enable_grad(),
            self.session.seeing(space.seen(), at.rows, at.columns, len(at.starts)) as seen,
            self.session.moved(space.perturbed(), at.rows, at.columns, len(at.starts), shift),
        ):
            part.clean = self.reader.read(part.batch)
            # the sum: every term's gradient is its own, and the mean is taken by _factors over all micro-batches
            of = list(zeros.values())
            gradients = torch.autograd.grad(part.clean.losses.sum(), of, allow_unused=True) if of else ()
        part.seen = seen
        part.e = {
            key: torch.zeros_like(zero).detach() if e is None else e.detach()
            for (key, zero), e in zip(zeros.items(), gradients, strict=True)
        }

    def _probes(
        self, parts: list[_Part], direction: Direction, probes: int, eps: float, total: int
    ) -> Iterator[tuple[_Part, Tensor, dict[str, Tensor]]]:
        """(part, (s' - s) / eps [q, P, C], key -> v [q, P, m]) for some probes at a time."""
        space = self._space()
        # total counts the positions of all processes: whichever has a position, its direction is the same
        at_once = max(1, _ROWS // max(1, total))  # few positions: several probes' directions are drawn in one call
        draws = [_Drawn(space, direction, at, min(at_once, probes - at), total) for at in range(0, probes, at_once)]
        joined = [] if self.shares.count == 1 else self._asked(parts, draws, probes, eps)
        for drawn in draws:
            for number, part in enumerate(parts):
                if joined:  # what others' probes moved is drawn here too: names are enough
                    changes_of, sizes = joined[number]
                    changes = changes_of[drawn.first : drawn.first + drawn.count]
                    for key, size in sizes.items():
                        drawn.draw(key, size, part.places.rows.device)
                else:
                    changes = torch.stack([self._probe(part, drawn, probe, eps) for probe in range(drawn.count)])
                count = range(drawn.count)
                directions = {key: torch.stack([drawn.rows(key, part, j) for j in count]) for key in drawn.kept}
                # [q, P_loss, C] -> [q, P, C]: a position reads the change of the loss's position that it belongs to
                yield part, changes[:, part.places.anchor], directions
            drawn.kept.clear()

    def _asked(
        self, parts: list[_Part], some: list[_Drawn], probes: int, eps: float
    ) -> list[tuple[Tensor, dict[str, int]]]:
        """Of each part: (s' - s) / eps of all probes [q, A, C], each made by one process; and key -> m of its nodes."""
        numbers, sizes = self.shares.questions(probes), [dict[str, int]() for _ in parts]
        changes_of: list[list[Tensor]] = [[] for _ in parts]
        for drawn in some:
            probes_here = [probe - drawn.first for probe in numbers if 0 <= probe - drawn.first < drawn.count]
            for number, part in enumerate(parts if probes_here else ()):
                changes_of[number] += [self._probe(part, drawn, probe, eps) for probe in probes_here]
                sizes[number] = {key: v.shape[-1] for key, v in drawn.kept.items()}
            drawn.kept.clear()
        stacked = [torch.stack(changes) for changes in changes_of]
        joined = self.shares.joined(torch.cat([one.flatten(1) for one in stacked], dim=1), probes)
        split = joined.split([one[0].numel() for one in stacked], dim=1)
        return [(s.reshape(probes, *one.shape[1:]), keys) for s, one, keys in zip(split, stacked, sizes, strict=True)]

    def _probe(self, part: _Part, drawn: _Drawn, probe: int, eps: float) -> Tensor:
        """(s' - s) / eps, [P, C]."""
        at, nodes = part.places, self._space().perturbed()

        def shift(key: str, size: int) -> Tensor:
            drawn.draw(key, size, at.rows.device)
            return eps * drawn.rows(key, part, probe)

        behind = part.context and self._contexts().reused(part.context)
        moved = self.session.moved(nodes, at.rows, at.columns, len(at.starts), shift)
        with torch.no_grad(), behind or nullcontext(), moved:
            perturbed = self.reader.read(part.tail if behind else part.batch)
        # (s(h + eps v) - s(h)) / eps, of every score or of the loss itself
        change: Tensor = (perturbed.values - part.clean.values) / eps
        return change

    # ---- estimates ---------------------------------------------------------------------------------------------------

    def _own(self, parts: list[_Part], direction: Direction, probes: int, eps: float, total: int) -> None:
        """e_p = (L' - L) / eps v_p, the mean over probes."""
        for part, changes, directions in self._probes(parts, direction, probes, eps, total):
            for key, v in directions.items():
                # e_p = 1/q sum_j (L(h + eps v_j) - L(h)) / eps v_jp; E[v v^T] = I makes it dL/dh_p in expectation
                e = (changes * v).sum(0) / probes  # [P, m]
                part.e[key] = part.e[key] + e if key in part.e else e

    def _learn(self, parts: list[_Part], direction: Direction, probes: int, eps: float, total: int) -> None:
        """Add the answers to this step's probes to the response."""
        space = self._space()
        tables, apart = space.tables, space.subspace.positions == "last"
        keys = [part.places.keys(part.clean.keys, apart=apart) for part in parts]
        known = {
            "keys": self._taken_in(tables.get("keys"), torch.cat(keys)),
            "columns": self._taken_in(tables.get("columns"), torch.cat([part.clean.columns for part in parts])),
        }
        num_keys, num_columns = len(known["keys"]), len(known["columns"])
        if num_keys * num_columns > _MOST:
            # one sum [K, C, m] a node: with options that differ from example to example it would grow with the data
            raise UserError(
                f"estimator.feedback: the objective has {num_keys * num_columns:,} different scores, too many to "
                "learn a response to each (options that differ from example to example): use estimator.feedback=hidden"
            )
        counts = widened(tables.get("counts", torch.zeros(0, 0)).unsqueeze(2), num_keys, num_columns).squeeze(2)
        where = {id(part): index_of(known["keys"], key.cpu()) for part, key in zip(parts, keys, strict=True)}
        sums: dict[str, Tensor] = {}
        answered = torch.zeros(num_keys, num_columns)
        for part, changes, directions in self._probes(parts, direction, probes, eps, total):
            at = where[id(part)].to(changes.device)
            columns = index_of(known["columns"], part.clean.columns.cpu()).to(changes.device)
            asked = torch.ones_like(part.clean.values) if part.clean.asked is None else part.clean.asked.float()
            of_keys = asked.new_zeros(num_keys, asked.shape[1]).index_add(0, at, asked[part.places.anchor])
            answered[:, columns.cpu()] += changes.shape[0] * of_keys.cpu()
            for key, v in directions.items():
                # R <- R + sum_p ds_p v_p^T for the key and the columns of each position: R / count tends to ds/dh
                answered_here = answers(changes, v, at, columns, num_keys, num_columns)
                sums[key] = sums[key] + answered_here if key in sums else answered_here
        # every process adds the answers of all, so that their responses stay the same
        counts += torch.stack(self._all(answered)).sum(0)
        total_sums: dict[str, list[Tensor]] = {}
        for key, of_process in sums.items():
            total_sum = torch.stack([one.to(of_process.device) for one in self._all(of_process)]).sum(0)
            total_sums.setdefault(space.response_of(key), []).append(total_sum)
        for name, each in total_sums.items():
            # parts that share a response: each has answered for all, so it is their mean
            mean = each[0] if len(each) == 1 else torch.stack(each).mean(0)
            old = space.response.get(name)
            space.response[name] = mean if old is None else widened(old, num_keys, num_columns) + mean
        space.tables = {**known, "counts": counts}

    def _taken_in(self, known: Tensor | None, seen: Tensor) -> Tensor:
        all_seen = torch.cat([one.cpu() for one in self._all(seen.cpu())])
        return taken_in(torch.empty(0, dtype=torch.int64) if known is None else known, all_seen)

    def _answer(self, parts: list[_Part]) -> None:
        """e_p = R^T dL/ds_p."""
        space = self._space()
        tables, apart = space.tables, space.subspace.positions == "last"
        for part in parts:
            slopes = part.clean.slopes[part.places.anchor]
            keys = index_of(tables["keys"], part.places.keys(part.clean.keys, apart=apart).cpu())
            columns = index_of(tables["columns"], part.clean.columns.cpu()).to(slopes.device)
            self._warned = self._warned or says_unknown(keys)
            for name, response in space.response.items():
                e = node_gradients(slopes, response, tables["counts"], keys.to(slopes.device), columns)
                part.e.update({key: e for key in part.seen if space.response_of(key) == name})

    def _pass_down(self, parts: list[_Part]) -> None:
        """e_p = dL/dh_p, with h the last hidden state: what a part adds to the residual stream reaches h as it is."""
        space = self._space()
        for part in parts:
            slopes = part.clean.slopes[part.places.anchor]
            part.e.update({key: slopes for key in part.seen if key.partition("@")[0] in space.parts})

    def _end_texts(self, part: _Part) -> None:
        """No gradient at the calls behind a text's end: an expert's rows are not told apart by text."""
        for call, e in part.e.items():
            is_written = part.takes_part(call)
            if is_written is not None:
                part.e[call] = e * is_written.unsqueeze(1)

    # ---- factors -----------------------------------------------------------------------------------------------------

    def _factors(self, parts: list[_Part], num_terms: float, *, noisy: bool) -> dict[str, Factors]:
        """E and X of each tensor, over micro-batches, calls, tied layers and processes."""
        nodes = self._space().nodes
        pairs: dict[str, list[tuple[Tensor, Tensor, str]]] = {}
        experts: dict[str, list[Tensor]] = {}
        for key, node in nodes.items():
            for part in parts:
                for call in [name for name in part.seen if name.partition("@")[0] == key]:
                    e, x = self._e(part, call, node), part.seen[call]
                    if e is not None:
                        # a text that has ended at this call has no loss behind it
                        is_written = None if call in part.experts else part.takes_part(call)
                        e, x = (e, x) if is_written is None else (e[is_written], x[is_written])
                        pairs.setdefault(node.name, []).append((e / num_terms, x, _LAYOUTS[node.kind]))
                    if call in part.experts:
                        experts.setdefault(node.name, []).append(part.experts[call])
        factors = {}
        for name, of_tensor in pairs.items():
            # dL/dW = sum_p e_p x_p^T: the rows of all calls one below the other, never their product
            e = torch.cat(self._all(torch.cat([pair[0] for pair in of_tensor])))
            x = torch.cat(self._all(torch.cat([pair[1] for pair in of_tensor])))
            numbers = torch.cat(self._all(torch.cat(experts[name]))) if name in experts else None
            count = len(self.session.weights.tensors[name]) if name in experts else 0
            factors[name] = Factors(e, x, of_tensor[0][2], noisy, numbers, count)
        return factors

    def _e(self, part: _Part, call: str, node: Node) -> Tensor | None:
        """The node gradient: measured, or by the chain rule from the layer behind."""
        if node.behind is None:
            return part.e.get(call)
        suffix = call.partition("@")[2]
        behind = part.e.get(f"{node.behind}@{suffix}" if suffix else node.behind)
        if behind is None:
            return None
        weight = self.session.weights.tensors[node.behind].detach()
        return behind @ weight.to(behind.dtype)  # e_A = W_B^T e_B, row by row
