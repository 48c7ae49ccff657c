"""Forwards side by side: what they share is done once, whatever they do apart."""

from __future__ import annotations

import contextvars

import pytest
import torch

from zoft.engines.lockstep import Lockstep


def test_all_of_them_meet_at_every_place_in_order():
    together, seen = Lockstep(), []

    def work(brought):
        seen.append(list(brought))
        return [sum(brought)] * len(brought)

    def forward(x):
        for place in "ab":
            x += together.meet(place, x, work)
        return x

    assert together.run([lambda: forward(1), lambda: forward(2), lambda: forward(3)]) == [31, 32, 33]
    assert seen == [[1, 2, 3], [7, 8, 9]]


def test_those_that_part_meet_again():
    together, seen = Lockstep(), []

    def work(brought):
        seen.append(list(brought))
        return brought

    def forward(name, places):
        return [together.meet(place, name, work) for place in places]

    together.run([lambda: forward("x", [1, 2, 9, 10]), lambda: forward("y", [3, 9, 10]), lambda: forward("z", [9, 10])])
    assert seen[-1] == ["x", "y", "z"]
    assert sum(map(len, seen)) == 9


def test_without_company_the_work_is_done_alone():
    together = Lockstep()
    assert together.meet("place", 3, lambda brought: [b + 1 for b in brought]) == 4
    assert together.run([lambda: together.meet("place", 3, lambda brought: [len(brought)])]) == [1]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["first", "second", "work"])
def test_an_error_ends_all_of_them_and_goes_on(where, error):
    together, ended = Lockstep(), []

    def work(brought):
        if where == "work":
            raise error("here")
        return brought

    def forward(name):
        try:
            together.meet("a", name, work)
            if where == name:
                raise error("here")
            together.meet("b", name, work)
        finally:
            ended.append(name)

    with pytest.raises(error, match="here"):
        together.run([lambda: forward("first"), lambda: forward("second"), lambda: forward("third")])
    assert sorted(ended) == ["first", "second", "third"]
    assert together.run([lambda: 1, lambda: together.meet("c", 2, lambda brought: brought)]) == [1, 2]


def test_each_forward_has_its_own_autocast_and_gradient_mode():
    together = Lockstep()

    def forward(low):
        with torch.autocast("cpu", torch.bfloat16, enabled=low), torch.set_grad_enabled(not low):
            dtypes = [torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype]
            together.meet("a", None, lambda brought: brought)
            dtypes.append(torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype)
            assert torch.is_grad_enabled() is not low
        together.meet("b", None, lambda brought: brought)
        dtypes.append(torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype)
        assert torch.is_grad_enabled()
        return dtypes

    low, high = together.run([lambda: forward(True), lambda: forward(False)])
    assert low == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert high == [torch.float32] * 3
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_context_variables_are_seen_and_kept_apart():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(5)
    together = Lockstep()

    def forward(value):
        seen = [variable.get()]
        variable.set(value)
        together.meet("a", None, lambda brought: brought)
        return [*seen, variable.get()]

    assert together.run([lambda: forward(1), lambda: forward(2)]) == [[5, 1], [5, 2]]
    assert variable.get() == 5


def test_inside_a_context_that_must_close_in_order_nobody_waits():
    together, alone = Lockstep(), []

    def forward():
        with torch.device("meta"):
            together.meet("a", None, lambda brought: alone.append(len(brought)) or brought)
        return torch.zeros(1).device.type

    assert together.run([forward, forward]) == ["cpu", "cpu"]
    assert alone == [1, 1]
