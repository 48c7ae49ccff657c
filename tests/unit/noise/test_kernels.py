"""Compiled noise: the bits of the eager code, chosen where it pays, and never the reason why a run stops."""

from __future__ import annotations

import logging
from itertools import product
from pathlib import Path

import pytest
import torch

from zoft.errors import UserError
from zoft.lm.data import assets
from zoft.noise import counter, kernels
from zoft.noise.counter import compiled_on, random_words, squared_norm
from zoft.noise.direction import Direction
from zoft.noise.kernels import choice, cpu
from zoft.noise.mezo import TorchSequentialNoise
from zoft.noise.source import LAWS, CounterNoise, agrees, prepare
from zoft.weights.tensors import perturbed

CPU, F32 = torch.device("cpu"), torch.float32
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HERE = Direction(11, 22, 3)
SIZES = (0, 1, 2, 3, 31, 32, 33, 1000, 1023, 1024, 1025, 5000, 40_000)  # a tile is 1,024; threads share from 32,768
STARTS = (0, 1, 2, 31, 32, 1023, 1025, 65_537)
SCALES = (1e-3, -0.37, 1.0, 3e38)
needs_compiler = pytest.mark.skipif(cpu.compiler() is None, reason="no C++ compiler here")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> cpu.CpuKernels:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return cpu.load()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has not chosen yet, and an empty cache folder."""
    for name, value in (("ACTIVE", {}), ("_why", {}), ("_broken", set())):
        monkeypatch.setattr(choice, name, value)
    monkeypatch.delenv("ZOFT_COMPILE", raising=False)
    monkeypatch.setenv("ZOFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the sign of a zero; one NaN is as good as another."""
    numbers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    nan = a != a
    return a.dtype == b.dtype and torch.equal(nan, b != b) and torch.equal(a[~nan].view(numbers), b[~nan].view(numbers))


def both(compiled: kernels.Kernels, work) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``work()`` gives compiled, and eager."""
    with kernels.using(CPU, compiled):
        ours = work()
    with kernels.using(CPU, None):
        return ours, work()


# ------------------------------------------------------------------------------------------------------- the same bits


@needs_compiler
@pytest.mark.parametrize("law", LAWS)
def test_draw_add_and_gather_have_the_bits_of_the_eager_code(compiled, law):
    source = CounterNoise(law, {"w": 120_000})
    torch.manual_seed(0)
    for start, size in product(STARTS, SIZES):
        old = torch.randn(size)

        def draw(start=start, size=size):
            return source.draw(HERE, "w", start, start + size, CPU, F32)

        def add(start=start, old=old):
            out = old.clone()
            for scale in SCALES:
                source.add_(out, HERE, "w", start, scale)
            return out

        def gather(start=start, size=size):
            return source.gather(HERE, "w", torch.arange(start, start + size).flip(0))

        for work in (draw, add, gather):
            assert equal(*both(compiled, work)), (work.__name__, start, size)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", LAWS)
def test_perturb_has_the_bits_of_perturbed(compiled, law, dtype):
    source = CounterNoise(law, {"w": 120_000})
    torch.manual_seed(1)
    for start, size in product(STARTS[::2], SIZES):
        weight = torch.randn(size).to(dtype)
        z = source.draw(HERE, "w", start, start + size, CPU, F32)
        for chosen in (None, compiled):
            with kernels.using(CPU, chosen):
                outs = [torch.empty_like(weight) for _ in SCALES]
                source.perturb(weight, HERE, "w", start, SCALES, outs)
                assert all(equal(out, perturbed(weight, z, scale)) for out, scale in zip(outs, SCALES, strict=True))
                here = weight.clone()
                source.perturb(here, HERE, "w", start, [0.3], [here])
                assert equal(here, perturbed(weight, z, 0.3))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_perturbed_as_eager_torch_does(compiled, dtype):
    """Subnormals, infinities, overflow, ties and signed zeros among them."""
    weight = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    source, scales = CounterNoise("gaussian", {"w": 1 << 16}), (0.0, 1e-9, 1e-6, 1e-3, 0.5, 300.0, 3e38)

    def work():
        outs = [torch.empty_like(weight) for _ in scales]
        source.perturb(weight, HERE, "w", 0, scales, outs)
        return torch.cat(outs)

    assert equal(*both(compiled, work))


@needs_compiler
@pytest.mark.parametrize("law", LAWS)
def test_bits_across_a_block_border(compiled, law, monkeypatch):
    monkeypatch.setattr(counter, "_BLOCK_WORDS", 40)
    size = 4000
    source = CounterNoise(law, {"w": size})
    whole = source.draw(HERE, "w", 0, size, CPU, F32)
    assert len(whole[:2560].unique()) > (1 if law == "rademacher" else 2000)
    for start, stop in [(0, size), (1, 79), (79, 81), (80, 160), (77, 2563), (1279, 1281), (1281, 3999)]:

        def draw(start=start, stop=stop):
            return source.draw(HERE, "w", start, stop, CPU, F32)

        def add(start=start, stop=stop):
            out = torch.ones(stop - start)
            source.add_(out, HERE, "w", start, 0.3)
            return out

        def perturb(start=start, stop=stop):
            out = torch.ones(stop - start, dtype=torch.bfloat16)
            source.perturb(out, HERE, "w", start, [0.3], [out])
            return out

        def gather(start=start, stop=stop):
            return source.gather(HERE, "w", torch.arange(start, stop))

        for work in (draw, add, perturb, gather):
            assert equal(*both(compiled, work)), (work.__name__, start, stop)
        assert equal(draw(), whole[start:stop])
        assert equal(gather(), whole[start:stop])
    words = both(compiled, lambda: random_words(5, 33, 333))
    assert equal(*words)
    assert len(words[0].unique()) == 300
    norms = both(compiled, lambda: torch.tensor(squared_norm(5, 3001)))
    assert equal(*norms)


@needs_compiler
def test_two_threads_make_the_same_bits(compiled, monkeypatch):
    monkeypatch.setattr(cpu, "_threads", lambda count: 2)
    assert agrees(compiled, CPU)
    source = CounterNoise("gaussian", {"w": 1 << 17})
    assert equal(*both(compiled, lambda: source.draw(HERE, "w", 3, 100_003, CPU, F32)))


@needs_compiler
def test_autograd_learns_that_a_weight_was_written(compiled):
    weight = torch.ones(10, requires_grad=True)
    loss = (weight * weight).sum()
    with kernels.using(CPU, compiled), torch.no_grad():
        CounterNoise("gaussian", {"w": 10}).perturb(weight, HERE, "w", 0, [0.1], [weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_what_kernels_cannot_take_is_refused_before_any_pointer_is(compiled):
    stream = kernels.Stream(1, 2)
    for out in (torch.empty(4, 4).T, torch.empty(16, dtype=torch.float64), torch.empty(16, device="meta")):
        with pytest.raises(AssertionError):
            compiled.draw(stream, 0, out)
    with pytest.raises(AssertionError):
        compiled.perturb(stream, 0, torch.empty(8), [0.1], [torch.empty(7)])


def test_generic_operations_of_every_source_are_those_of_draw():
    """MeZO's own stream has them too: in the tensor's dtype, whatever it is added to."""
    for dtype in (torch.float32, torch.bfloat16):
        source = TorchSequentialNoise([("v", torch.Size([5]), dtype, CPU), ("w", torch.Size([30, 2]), dtype, CPU)])
        z = source.draw(HERE, "w", 0, 60, CPU, dtype)
        indices = torch.tensor([[3, 59], [0, 7]])
        assert equal(source.gather(HERE, "w", indices), z[indices])
        out, weight = torch.ones(20), torch.ones(20).to(dtype)
        source.add_(out, HERE, "w", 30, 0.3)
        assert equal(out, torch.ones(20).add_(z[30:50].clone().mul_(0.3)))
        outs = [torch.empty_like(weight) for _ in range(2)]
        source.perturb(weight, HERE, "w", 30, (0.1, -2.0), outs)
        assert all(equal(o, perturbed(weight, z[30:50], c)) for o, c in zip(outs, (0.1, -2.0), strict=True))


@pytest.mark.parametrize("law", LAWS)
def test_add_and_perturb_take_a_piece_at_a_time(law, monkeypatch):
    monkeypatch.setattr(counter, "_CHUNK_WORDS", 16)
    source = CounterNoise(law, {"w": 1000})
    with kernels.using(CPU, None):
        z = source.draw(HERE, "w", 7, 1000, CPU, F32)
        out, weight = torch.ones(993), torch.linspace(0, 1, 993)
        source.add_(out, HERE, "w", 7, 0.3)
        assert equal(out, torch.ones(993).add_(z.clone().mul_(0.3)))
        wanted = perturbed(weight, z, 0.3)
        source.perturb(weight, HERE, "w", 7, [0.3], [weight])
        assert equal(weight, wanted)


def test_gather_of_a_tensor_that_is_not_among_the_shapes():
    source = CounterNoise("gaussian", {})
    assert equal(
        source.gather(HERE, "v", torch.tensor([[9, 3]])), source.draw(HERE, "v", 0, 10, CPU, F32)[[9, 3]][None]
    )
    assert source.gather(HERE, "v", torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3)


# -------------------------------------------------------------------------------------------------------------- choice


@needs_compiler
def test_compiled_where_it_pays(fresh):
    few, many = 1000, choice.WORTH_BUILDING["cpu"]
    assert prepare(few, CPU) == "eager"
    assert compiled_on(CPU) is None
    assert "fewer than pay" in kernels.why(CPU)
    assert not fresh.exists()  # a small run writes nothing
    assert prepare(many, CPU) == "compiled"
    assert compiled_on(CPU) is not None
    assert [path.name for path in (fresh / "compiled").iterdir()] == [cpu.library().name]
    choice.ACTIVE.clear()
    assert prepare(few, CPU) == "compiled"  # it is built: nothing is to be paid
    assert prepare(many, torch.device("meta")) == "eager"
    assert compiled_on("cpu:0") is compiled_on(CPU)


@needs_compiler
def test_the_environment_decides(fresh, monkeypatch):
    monkeypatch.setenv("ZOFT_COMPILE", "always")
    assert prepare(1, CPU) == "compiled"
    monkeypatch.setenv("ZOFT_COMPILE", "never")
    assert prepare(1 << 40, CPU) == "eager"
    assert compiled_on(CPU) is None
    assert kernels.why(CPU) == "ZOFT_COMPILE=never"
    monkeypatch.setenv("ZOFT_COMPILE", "auto")
    assert prepare(1 << 40, CPU) == "compiled"


def test_an_unknown_choice_names_the_three(fresh, monkeypatch):
    monkeypatch.setenv("ZOFT_COMPILE", "sometimes")
    with pytest.raises(UserError, match="ZOFT_COMPILE must be one of auto, always, never, got 'sometimes'"):
        prepare(1, CPU)


def warned(caplog) -> list[str]:
    """What two runs, prepared one after the other, say; both go on."""
    with caplog.at_level(logging.WARNING, logger="zoft"):
        assert prepare(1 << 40, CPU) == "eager"
        assert prepare(1 << 40, CPU) == "eager"
    assert compiled_on(CPU) is None
    assert CounterNoise("gaussian", {"w": 9}).draw(HERE, "w", 0, 9, CPU, F32).numel() == 9
    return [record.message for record in caplog.records]


def test_no_compiler_is_one_warning(fresh, monkeypatch, caplog):
    monkeypatch.setattr(cpu.shutil, "which", lambda name: None)
    (message,) = warned(caplog)
    assert "there is no C++ compiler: install g++, or set CXX" in message
    assert not fresh.exists()


def test_a_failing_compiler_is_one_warning(fresh, monkeypatch, tmp_path, caplog):
    script = tmp_path / "broken-g++"
    script.write_text("#!/bin/sh\necho 'out of licences' >&2\necho more >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"{script} -quick")
    (message,) = warned(caplog)
    assert message.endswith("broken-g++ -quick failed: out of licences")


@needs_compiler
def test_other_numbers_are_one_warning(fresh, monkeypatch, caplog):
    """What a compiler that fuses multiply and add would do."""
    monkeypatch.setattr(cpu.CpuKernels, "add_", lambda self, stream, offset, out, scale: out.add_(1))
    (message,) = warned(caplog)
    assert "other numbers than the eager code" in message


@needs_compiler
def test_a_damaged_library_is_built_again(fresh):
    path = cpu.library()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half of it")
    assert prepare(1, CPU) == "compiled"
    assert path.stat().st_size > 1000


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZOFT_CACHE", str(tmp_path / "file"))
    assert prepare(1 << 40, CPU) == "compiled"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@needs_compiler
def test_flags_are_part_of_the_library_s_name(fresh, monkeypatch):
    before = cpu.library()
    monkeypatch.setattr(cpu, "_instructions", lambda: ("-DOTHER",))
    assert cpu.library() != before
    assert cpu.library().parent == before.parent == fresh / "compiled"


@pytest.mark.parametrize("variables", [{"ZOFT_CACHE": "/a"}, {"XDG_CACHE_HOME": "/b"}, {}])
def test_one_cache_folder_for_everything(variables, monkeypatch):
    for name in ("ZOFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    wanted = {"ZOFT_CACHE": Path("/a"), "XDG_CACHE_HOME": Path("/b/zoft")}
    wanted = wanted[next(iter(variables))] if variables else Path.home() / ".cache" / "zoft"
    assert cpu.library().parent == wanted / "compiled"
    assert assets.cache_dir() == wanted
