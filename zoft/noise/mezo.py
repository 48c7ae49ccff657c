"""MeZO's noise: torch's generator, seeded for a step and drawn tensor by tensor in order."""

from __future__ import annotations

from collections.abc import Sequence

from zoft.noise.direction import Direction
from zoft.noise.source import NoiseSource, of_step
from zoft.utils.lazy import Tensor, torch

_KEEP_IN_PIECES = 1 << 26  # elements of z that are kept while a tensor is asked for in pieces


class TorchSequentialNoise(NoiseSource):
    """MeZO's stream: one generator a step, seeded with the step's seed, one N(0, 1) draw after another.

    Tensors are drawn in ``named_parameters()`` order, in the parameter's dtype, on the parameter's device. A private
    generator gives the numbers that ``torch.manual_seed`` + ``torch.normal`` would. The generator's state before each
    tensor is kept for the directions of the step in use, so that tensors can also be asked for one by one. A tensor can
    only be drawn whole: one that is asked for in pieces is kept until its last piece (where several directions are
    summed, further ones as long as all of them are at most 64 Mi elements; beyond that they are drawn again).

    Args:
        tensors: (name, shape, dtype, device) in ``named_parameters()`` order.

    References: Malladi et al. 2023 (MeZO), Algorithm 1; the published code draws in this order.
    """

    def __init__(self, tensors: Sequence[tuple[str, torch.Size, torch.dtype, torch.device]]) -> None:
        self.tensors = list(tensors)
        self._shapes = {name: shape for name, shape, _, _ in self.tensors}
        self._dtypes = {name: dtype for name, _, dtype, _ in self.tensors}
        self._states: dict[Direction, dict[str, Tensor]] = {}
        self._in_pieces: dict[Direction, Tensor] = {}  # what is being asked for in pieces: one tensor, flat
        self._in_pieces_of = ""

    def draw(
        self, direction: Direction, name: str, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Elements [start, stop) of tensor ``name`` of z, in the parameter's dtype, flat."""
        dtype = self._dtypes[name]  # whatever is asked for: a sum may be float32 where the parameter is not
        states = of_step(self._states, direction)
        if direction not in states:
            states[direction] = self._record_states(direction)
        if name != self._in_pieces_of:
            self._in_pieces.clear()
            self._in_pieces_of = name
        in_pieces = of_step(self._in_pieces, direction)
        z = in_pieces.get(direction)
        if z is None:
            generator = torch.Generator(device)
            # torch's generator gives a tensor's numbers only from its own place in the stream on
            generator.set_state(states[direction][name])
            shape = self._shapes[name]
            z = torch.normal(mean=0, std=1, size=shape, generator=generator, device=device, dtype=dtype).view(-1)
            # kept while pieces of it are asked for, as long as the kept ones are small enough
            if stop < z.numel() and (not in_pieces or (len(in_pieces) + 1) * z.numel() <= _KEEP_IN_PIECES):
                in_pieces[direction] = z
        if stop == z.numel():
            in_pieces.pop(direction, None)
        piece = z[start:stop]
        return piece.clone() if direction in in_pieces else piece  # the caller may overwrite it

    def gather(self, direction: Direction, name: str, indices: Tensor) -> Tensor:
        """Elements of z at any flat indices, in the parameter's dtype; the whole tensor is drawn for them."""
        z = self.draw(direction, name, 0, self._shapes[name].numel(), indices.device, self._dtypes[name])
        return z[indices]

    def _record_states(self, direction: Direction) -> dict[str, Tensor]:
        generators: dict[torch.device, torch.Generator] = {}
        states = {}
        for name, shape, dtype, device in self.tensors:
            if device not in generators:
                # the step's seed, as `torch.manual_seed(seed)` in MeZO's code
                generators[device] = torch.Generator(device).manual_seed(direction.seed)
            states[name] = generators[device].get_state()
            # drawn and dropped: only the state behind it is wanted
            torch.normal(mean=0, std=1, size=shape, generator=generators[device], device=device, dtype=dtype)
        return states
