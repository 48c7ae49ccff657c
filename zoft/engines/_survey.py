"""Facts that first queries establish of a model: tensors read where no hook sees it, modules that run twice."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

from zoft.engines._pieces import asks_no_values, watching
from zoft.engines._swapper import ForwardState, Swapper, may_be_compiled, uncompiled
from zoft.utils.lazy import nn, torch

log = logging.getLogger(__name__)

_EVERY = 50  # calls of losses from one look at a compiled model's reads to the next

Note = Callable[[Any], None]
"""Called with the arguments of a torch function; it takes tuples and lists of them apart itself."""


class Survey:
    """Finds trained tensors that a model reads outside of their own modules, by watching the calls of torch functions.

    All calls are watched in a session's first queries, later on those alone that get a trained tensor.

    Args:
        engine: its name, for log lines.
        model: the module whose weights move.
        swapper: whose hooks cover what a module reads of its own.
    """

    def __init__(self, engine: str, model: nn.Module, swapper: Swapper) -> None:
        self.engine = engine
        self.swapper = swapper
        self.weights = swapper.weights
        self.whole_forward: list[str] = []  # tensors that are read outside their module's forward
        self.read_outside: set[str] = set()
        self.is_done = False  # the first queries have been made
        self.sets_global_state = False  # the objective: what it sets would be set for the other forwards too
        self._names = {id(tensor): name for name, tensor in self.weights.tensors.items()}
        self._num_calls = 0  # where graphs exist
        self._watchable = _watchable(model, self.weights.tensors.items())

    # ---- the first queries -------------------------------------------------------------------------------------------

    @contextmanager
    def first(self) -> Iterator[None]:
        """Within this block, a forward of the first queries is looked at: its reads, and what it sets for the process.

        A compiled model runs uncompiled here: its graph would call no torch function.
        """
        # random state and kernels as they were before the forward
        before = _global_state()

        def look(*_: Any) -> None:
            self.sets_global_state |= _global_state() != before

        with ExitStack() as hooks, self._watch():
            for module in self.weights.owners:
                hooks.enter_context(module.register_forward_pre_hook(uncompiled(look)))
            yield

    def conclude(self, last: ForwardState) -> bool:
        """After the first queries: are there tensors that perturbing their own modules' forwards does not cover?

        Args:
            last: of the last forward.
        """
        self.is_done = True
        self.whole_forward = [
            # what was never entered belongs to modules that are called past their hooks, or not called at all
            name
            for name in self.weights.tensors
            if name in self.read_outside or name not in last.entered
        ]
        if self.whole_forward:
            log.warning(
                "engine=%s: %d trainable tensors are read outside their own module's forward, or not reached by "
                "it (%s); they are perturbed for the whole forward instead. If the objective never uses them they only "
                "move at random: exclude them with trainable=regex.",
                *(self.engine, len(self.whole_forward), _some(self.whole_forward)),
            )
        self._name_shared_modules(last.visits)
        if self.sets_global_state:
            log.warning(
                "engine=%s: the objective draws random numbers or chooses attention kernels while the model runs: its "
                "queries go one after the other, and z is made for each",
                self.engine,
            )
        return bool(self.whole_forward)

    def _name_shared_modules(self, visits: Counter[Any]) -> None:
        """A module that runs several times a forward moves once, and costs its z each time."""
        runs = {module: visits[id(module)] for module in self.weights.owners}
        # micro-batches call the model several times, and every module as often
        once = min((count for count in runs.values() if count), default=0)  # or once for every micro-batch
        shared = [held[0][1] for module, held in self.weights.owners.items() if runs[module] > once]
        if shared:
            log.warning(
                "engine=%s: %d modules run more than once in a forward (the one with %s): their weights move once, "
                "together, and their directions are made each time",
                *(self.engine, len(shared), _some(shared)),
            )

    # ---- later queries -----------------------------------------------------------------------------------------------

    @contextmanager
    def later(self, look: Callable[[], Any]) -> Iterator[None]:
        """Within this block, a read that the hooks do not cover is noted; a module's own reads cost nothing.

        Where torch has compiled something, its graphs would be made anew for it: one forward in fifty runs uncompiled.

        Args:
            look: evaluates the objective once, for nothing but to be looked at.
        """
        if self.swapper.compiled or graphs_exist():
            # a look costs a forward without graphs, so it is rare; its loss is thrown away
            self._num_calls += 1
            if self._num_calls % _EVERY == 0:
                with self._watch():
                    look()
            yield
            return
        parameters = {name: tensor for name, tensor in self._watchable.items() if name not in self.whole_forward}
        # only parameters of a class of ours are reported: what frozen ones are read by costs nothing
        try:
            with watched(parameters, self._note) as self.swapper.watched:
                yield
        finally:
            self.swapper.watched = {}

    def find_new(self) -> bool:
        """After later queries: has this batch made the model read a tensor outside that no batch before did?"""
        new_reads = sorted(self.read_outside - set(self.whole_forward))
        if not new_reads:
            return False
        log.warning(
            "engine=%s: from this step on %d more trainable tensors are perturbed for the whole forward, which reads "
            "them outside their own module's for some batches (%s)",
            *(self.engine, len(new_reads), _some(new_reads)),
        )
        self.whole_forward += new_reads
        return True

    # ---- reads -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """Within this block, a trained tensor handed to torch while none of its modules runs is noted."""
        # a compiled graph would call no torch function
        eager = torch.compiler.set_stance("force_eager") if may_be_compiled() else nullcontext()
        usual = self.swapper.unseen
        if not torch._C._len_torch_function_stack():  # else contexts of others (torch.device, ...), which hold here too
            self.swapper.unseen = torch._C.DisableTorchFunction  # nine in ten calls are the engine's own
        try:
            with eager, watching(self._call_noted):
                yield
        finally:
            self.swapper.unseen = usual

    def _call_noted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if not asks_no_values(func, result):
            self._note([*args, *kwargs.values()])
        return result

    def _note(self, value: Any) -> None:
        """Note a trained tensor that torch is handed while none of its modules runs."""
        if isinstance(value, (tuple, list)):
            for item in value:
                self._note(item)
        else:
            name = self._names.get(id(value))
            # depth 0: no module that holds it runs, so no hook has swapped it
            if name is not None and not self.swapper.state.depth[name]:
                self.read_outside.add(name)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _watchable(model: nn.Module, tensors: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """The tensors outside of torch's own attention, which takes another path where a tensor is watched."""
    attention = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer)
    of_attention = {id(p) for module in model.modules() if isinstance(module, attention) for p in module.parameters()}
    return {name: tensor for name, tensor in tensors if id(tensor) not in of_attention}


def _global_state() -> Any:
    """What a forward may set for the whole process: the random state, and which attention kernels may be used."""
    cuda = torch.backends.cuda
    kernels = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
    return *kernels, torch.get_rng_state().numpy().tobytes()


def graphs_exist() -> bool:
    """Whether torch has compiled anything in this process."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and bool(dynamo.utils.counters["stats"])


def is_compiled(model: nn.Module) -> bool:
    """Whether some module runs compiled code, which no forward may leave halfway."""
    for module in model.modules() if may_be_compiled() else ():
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            return True
        if hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            return True
    return False


# ---- parameters that say when torch is handed them -------------------------------------------------------------------

_notes: list[Note] = []  # the last one is called


@lru_cache(maxsize=1)
def _watched_class() -> Any:
    class WatchedParameter(torch.nn.Parameter):
        """A parameter that says so when a torch function gets it; what is computed is the same."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            # what func calls in turn belongs to the same read, and is not looked at again
            with torch._C.DisableTorchFunctionSubclass():
                # computed first: an error of the model's own goes on as it is
                result = func(*args, **kwargs)
                if _notes and not asks_no_values(func, result):
                    _notes[-1]([*args, *kwargs.values()])
            return result

    return WatchedParameter


@contextmanager
def watched(parameters: Mapping[str, nn.Parameter], note: Note) -> Iterator[dict[str, type]]:
    """Within this block ``note`` is called with the arguments of every torch function that gets one of the parameters.

    Only these functions are looked at. A caller that expects reads of a parameter for a while gives it its own class
    back for that time. A tensor of another class than ``torch.nn.Parameter`` is left alone: it has a meaning of its own
    for torch.

    Yields:
        name -> the class by which a parameter is watched.
    """
    # a subclass of Parameter (quantised weights, ...) has its own __torch_function__
    changed = {name: parameter for name, parameter in parameters.items() if type(parameter) is torch.nn.Parameter}
    watched_class = _watched_class()
    _notes.append(note)
    try:
        for parameter in changed.values():
            parameter.__class__ = watched_class
        yield dict.fromkeys(changed, watched_class)
    finally:
        # the class is torch's again, whatever was raised: nothing of ours stays on the model
        for parameter in changed.values():
            parameter.__class__ = torch.nn.Parameter
        _notes.pop()
