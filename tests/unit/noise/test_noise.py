"""Directions: their law, their independence, the same bits for any slice and order, and nothing global touched."""

from __future__ import annotations

import hashlib
import random
from itertools import combinations, pairwise
from statistics import NormalDist

import numpy
import pytest
import torch

from zoft.noise import counter, kernels, mezo
from zoft.noise.counter import random_words, sample, squared_norm
from zoft.noise.direction import Direction, key_of, step_seed
from zoft.noise.mezo import TorchSequentialNoise
from zoft.noise.source import LAWS, CounterNoise

CPU, F32 = torch.device("cpu"), torch.float32
N = 1 << 19
FIVE_SIGMA = 5 / N**0.5


@pytest.fixture(autouse=True)
def eager():
    """This file is about the definition; tests/unit/noise/test_kernels.py compares the compiled noise with it."""
    with kernels.using(CPU, None):
        yield


def moments(z: torch.Tensor) -> tuple[float, float, float, float]:
    z = z.double()
    mean = z.mean()
    centred = z - mean
    variance = centred.square().mean()
    return (
        float(mean),
        float(variance),
        float(centred.pow(3).mean() / variance**1.5),
        float(centred.pow(4).mean() / variance**2),
    )


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.double().view(-1), b.double().view(-1))))[0, 1])


def words_in_plain_python(key: int, index: int) -> int:
    """The documented generator in unbounded integers: what `random_words` must agree with for ever."""
    block, index = divmod(index, 1 << 30)
    if block:
        key = int.from_bytes(hashlib.blake2b(f"{key}|{block}".encode(), digest_size=8).digest(), "little")
    low, high, mask = key & 0xFFFFFFFF, key >> 32, 0xFFFFFFFF

    def mix(word: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            word = (word ^ (word >> shift)) * factor & mask
        return word ^ (word >> 16)

    return mix((mix((index * 0x9E3779B9 & mask) ^ low) + high) & mask)


# ------------------------------------------------------------------------------------------------------------ the laws


def test_gaussian_moments_and_tails():
    z = sample("gaussian", key_of(Direction(1, 2), "w"), 0, N)
    mean, variance, skew, kurtosis = moments(z)
    assert abs(mean) < FIVE_SIGMA
    assert abs(variance - 1) < 2**0.5 * FIVE_SIGMA
    assert abs(skew) < 6**0.5 * FIVE_SIGMA
    assert abs(kurtosis - 3) < 24**0.5 * FIVE_SIGMA
    for bound in (1.0, 2.0, 3.0, 3.9, 4.0):
        wanted = 2 * NormalDist().cdf(-bound)
        assert float((z.abs() > bound).double().mean()) == pytest.approx(wanted, abs=5 * (wanted / N) ** 0.5)


def test_gaussian_distribution_function():
    z = sample("gaussian", 12345, 0, N).double().sort().values
    wanted = torch.distributions.Normal(0.0, 1.0).cdf(z)
    observed = torch.arange(1, N + 1, dtype=torch.float64) / N
    assert float((wanted - observed).abs().max()) < 1.95 / N**0.5  # Kolmogorov-Smirnov at 0.1 %


def test_quantile_table_is_symmetric_monotone_and_of_unit_variance():
    table = counter._quantile_table("cpu").to(torch.int64)
    assert table.numel() == 65_536
    assert int(table.sum()) == 0  # the mean is exactly zero, not nearly
    assert torch.equal(table, -table.flip(0))
    assert bool((table.diff() >= 0).all())
    scaled = table.double() / 2**16
    assert float(scaled.square().mean()) == pytest.approx(1.0, abs=1e-6)
    assert float(scaled.pow(4).mean()) == pytest.approx(3.0, abs=0.01)
    assert 4.0 < float(scaled.max()) < 4.6


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.0, 3.5, 4.0])
def test_quantile_table_has_the_tails_of_the_normal_law(sigma):
    """To one entry of 65,536 on either side; the last one stands for all beyond 4.17 sigma."""
    scaled = counter._quantile_table("cpu").double() / 2**16
    wanted = 65_536 * NormalDist().cdf(-sigma)
    assert abs(int((scaled > sigma).sum()) - wanted) <= 1
    assert abs(int((scaled < -sigma).sum()) - wanted) <= 1


@pytest.mark.parametrize("sigma", [3.0, 4.0])
def test_gaussian_tails_of_four_million(sigma):
    count = 1 << 22
    z = sample("gaussian", key_of(Direction(8, 1), "tails"), 0, count)
    each = sum(1 for q in (counter._quantile_table("cpu") / 2**16).tolist() if q > sigma) / 65_536
    for tail in (z > sigma, z < -sigma):
        assert abs(int(tail.sum()) - count * each) < 5 * (count * each) ** 0.5


def test_rademacher_is_plus_or_minus_one_and_balanced():
    z = sample("rademacher", 99, 0, N)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(z.mean())) < FIVE_SIGMA
    assert z.dtype == torch.float32


def test_sign_table_is_balanced_exactly():
    table = counter._sign_table("cpu")
    assert table.shape == (256, 8)
    assert bool((table.sum(0) == 0).all())
    assert len({tuple(row) for row in table.tolist()}) == 256


@pytest.mark.parametrize("law", LAWS)
def test_every_law_has_the_squared_norm_of_its_size(law):
    source = CounterNoise(law, {"a": 1000, "b": 40_000, "c": 3})
    total = sum(
        float(source.draw(Direction(5, 1), name, 0, n, CPU, F32).double().square().sum())
        for name, n in source.shapes.items()
    )
    assert total == pytest.approx(41_003, rel=0.05 if law == "gaussian" else 1e-6)


# --------------------------------------------------------------------------------------------------------- independence


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_streams_are_uncorrelated_across_seed_step_probe_name_and_role(law):
    count = 1 << 16
    directions = [(Direction(0, 0), "w"), (Direction(1, 0), "w"), (Direction(0, 1), "w"), (Direction(0, 0, 1), "w")]
    keys = [key_of(direction, name) for direction, name in directions]
    keys += [key_of(Direction(0, 0), "v"), key_of(Direction(0, 0), "w", role="other"), key_of(Direction(1, 1), "w")]
    keys += [key_of(Direction(0, 10), "w"), key_of(Direction(10, 0), "w"), key_of(Direction(0, 1, 0), "0|w")]
    assert len(set(keys)) == len(keys)
    draws = [sample(law, key, 0, count) for key in keys]
    for (i, a), (j, b) in combinations(enumerate(draws), 2):
        assert abs(correlation(a, b)) < 5 / count**0.5, (i, j)
        if law == "gaussian":
            assert abs(correlation(a.square(), b.square())) < 5 / count**0.5, (i, j)


def test_keys_of_fields_that_read_alike_differ():
    assert key_of(Direction(1, 23), "a") != key_of(Direction(12, 3), "a")
    assert key_of(Direction(0, 1, 11), "a") != key_of(Direction(0, 11, 1), "a")


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
@pytest.mark.parametrize("lag", [1, 2, 3, 8, 16, 31, 32, 33, 64, 256, 1024])
def test_neighbouring_elements_are_uncorrelated(law, lag):
    z = sample(law, key_of(Direction(3, 4), "w"), 0, N)
    assert abs(correlation(z[:-lag], z[lag:])) < FIVE_SIGMA
    if law == "gaussian":
        assert abs(correlation(z[:-lag].square(), z[lag:].square())) < FIVE_SIGMA


@pytest.mark.parametrize("neighbours", ["steps", "probes", "seeds", "tensors"])
def test_bits_of_neighbouring_streams_agree_as_often_as_chance_has_it(neighbours):
    """900 standardised correlations of 32,768 bits, at lags of -1, 0 and 1 word: of a normal spread and tail."""
    names = {
        "steps": lambda i: (Direction(3, i), "w"),
        "probes": lambda i: (Direction(3, 1, i), "w"),
        "seeds": lambda i: (Direction(i, 1), "w"),
        "tensors": lambda i: (Direction(3, 1), f"layers.{i}.w"),
    }
    words = [random_words(key_of(*names[neighbours](i)), 0, 1024).numpy().view(numpy.uint32) for i in range(301)]
    scores = []
    for a, b in pairwise(words):
        for x, y in ((a[1:], b[:-1]), (a, b), (a[:-1], b[1:])):
            differ, count = int(numpy.bitwise_count(x ^ y).sum()), 32 * len(x)
            scores.append((count - 2 * differ) / count**0.5)
    _, variance, _, kurtosis = moments(torch.tensor(scores))
    assert abs(variance - 1) < 5 * (2 / 900) ** 0.5
    assert abs(kurtosis - 3) < 5 * (24 / 900) ** 0.5
    assert max(map(abs, scores)) < 5


@pytest.mark.parametrize("lag", [1, 2, 31, 1024])
def test_gaussian_streams_are_uncorrelated_at_a_lag(lag):
    """One stream is not a shifted copy of another: steps, probes, seeds and neighbouring tensors."""
    count = 1 << 16
    base = sample("gaussian", key_of(Direction(5, 7), "layers.0.w"), 0, count)
    for direction, name in [
        (Direction(5, 8), "layers.0.w"),
        (Direction(5, 7, 1), "layers.0.w"),
        (Direction(6, 7), "layers.0.w"),
        (Direction(5, 7), "layers.1.w"),
    ]:
        other = sample("gaussian", key_of(direction, name), 0, count)
        assert abs(correlation(base[lag:], other[:-lag])) < 5 / count**0.5
        assert abs(correlation(base[:-lag].square(), other[lag:].square())) < 5 / count**0.5


@pytest.mark.parametrize("key", [0, 1, 2026, key_of(Direction(6, 6), "w")])
def test_chi_square_of_bytes_and_of_halves(key):
    words = random_words(key, 0, 1 << 20)
    for width, per_word in ((8, 4), (16, 2)):
        pieces = torch.stack([(words >> (width * i)) & (2**width - 1) for i in range(per_word)]).view(-1)
        counts = torch.bincount(pieces, minlength=2**width).double()
        expected, freedom = pieces.numel() / 2**width, 2**width - 1
        chi_square = float(((counts - expected).square() / expected).sum())
        assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5, width  # neither too rough nor too smooth


def test_chi_square_of_pairs_of_neighbouring_nibbles():
    """The low nibble of a word against the next word's: a counter's weakest place, were it not mixed twice."""
    words = random_words(99, 0, 1 << 20) & 15
    counts = torch.bincount(words[1:] * 16 + words[:-1], minlength=256).double()
    expected = (len(words) - 1) / 256
    assert abs(float(((counts - expected).square() / expected).sum()) - 255) < 5 * (2 * 255) ** 0.5


def test_bits_are_fair_and_pairwise_independent():
    words = random_words(2026, 0, 1 << 17)
    bits = ((words.unsqueeze(1) >> torch.arange(32)) & 1).double()  # [N, 32]
    sigma = 0.5 / len(words) ** 0.5
    assert float((bits.mean(0) - 0.5).abs().max()) < 5 * sigma
    within = torch.corrcoef(bits.T) - torch.eye(32)
    assert float(within.abs().max()) < 6 / len(words) ** 0.5  # 496 pairs
    across = (bits[1:] - 0.5).T @ (bits[:-1] - 0.5) / (len(words) - 1) * 4  # bit i of a word, bit j of the next
    assert float(across.abs().max()) < 6 / len(words) ** 0.5


def test_flipping_any_bit_of_the_key_flips_half_of_the_bits():
    base = random_words(0x0123456789ABCDEF, 0, 4096)
    for bit in range(64):
        other = random_words(0x0123456789ABCDEF ^ (1 << bit), 0, 4096)
        flipped = ((base ^ other).unsqueeze(1) >> torch.arange(32)) & 1
        assert float(flipped.double().mean()) == pytest.approx(0.5, abs=0.01), bit
        assert float((flipped.double().mean(0) - 0.5).abs().max()) < 0.05, bit


# ----------------------------------------------------------------------------------------------- slices, order, devices


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_any_slice_is_a_part_of_the_whole(law):
    key, whole = 4242, sample(law, 4242, 0, 1000)
    for start, stop in [
        (0, 0),
        (7, 7),
        (0, 1),
        (1, 2),
        (1, 999),
        (31, 33),
        (32, 64),
        (33, 95),
        (501, 777),
        (999, 1000),
    ]:
        assert torch.equal(sample(law, key, start, stop), whole[start:stop]), (start, stop)


@pytest.mark.parametrize(("law", "per_word"), [("gaussian", 2), ("rademacher", 32)])
def test_slices_across_chunks(law, per_word, monkeypatch):
    whole = sample(law, 8, 0, 2000)
    monkeypatch.setattr(counter, "_CHUNK_WORDS", 5)
    border = 5 * per_word
    assert torch.equal(sample(law, 8, 0, 2000), whole)
    for start, stop in [
        (border - 1, border + 1),
        (border, 3 * border + 1),
        (1, 2 * border),
        (border - 3, 7 * border + 2),
    ]:
        assert torch.equal(sample(law, 8, start, stop), whole[start:stop]), (start, stop)


def test_slices_across_the_real_chunk_border():
    border = 2 * counter._CHUNK_WORDS
    whole = sample("gaussian", 8, 0, border + 11)
    assert torch.equal(sample("gaussian", 8, border - 7, border + 11), whole[border - 7 :])


@pytest.mark.parametrize("border", [1 << 30, 3 << 30])
def test_words_across_a_block_border(border):
    words = random_words(77, border - 4, border + 4)
    assert len(words.unique()) == 8
    assert [int(w) & 0xFFFFFFFF for w in words] == [words_in_plain_python(77, border + i) for i in range(-4, 4)]
    for start, stop in [(-4, -1), (-1, 1), (0, 4), (3, 4)]:
        assert torch.equal(random_words(77, border + start, border + stop), words[4 + start : 4 + stop])
    assert not torch.equal(random_words(77, border, border + 4), random_words(77, 0, 4))  # a block has a key of its own
    assert torch.equal(
        sample("gaussian", 77, 2 * border - 3, 2 * border + 3)[2:5],
        sample("gaussian", 77, 2 * border - 1, 2 * border + 2),
    )


def test_order_of_tensors_and_of_directions_does_not_matter():
    shapes = {"a": 10, "b": 300, "c": 7}
    asked = [(Direction(0, step), name) for step in (0, 1) for name in shapes]

    def drawn(law, order):
        source = CounterNoise(law, shapes)
        return {(d, n): source.draw(d, n, 0, shapes[n], CPU, F32) for d, n in order}

    for law in LAWS:
        forwards, backwards = drawn(law, asked), drawn(law, asked[::-1])
        alone = drawn(law, asked[3:4])
        assert all(torch.equal(forwards[key], backwards[key]) for key in asked)
        assert torch.equal(alone[asked[3]], forwards[asked[3]])


def test_same_shaped_tensors_of_other_names_get_other_noise():
    source = CounterNoise("gaussian", {"layers.0.w": 4096, "layers.1.w": 4096})
    a, b = (source.draw(Direction(0, 0), name, 0, 4096, CPU, F32) for name in source.shapes)
    assert abs(correlation(a, b)) < 0.08
    assert not torch.equal(a, b)


def test_noise_is_float32_whatever_the_weights_are():
    source = CounterNoise("gaussian", {"w": 64})
    draws = [source.draw(Direction(0, 0), "w", 0, 64, CPU, t) for t in (torch.float32, torch.bfloat16, torch.float16)]
    assert all(z.dtype == torch.float32 and torch.equal(z, draws[0]) for z in draws)


# -------------------------------------------------------------------------------------------------------------- sphere


def test_sphere_has_norm_root_d_over_all_tensors_and_a_direction_of_its_own_each_step():
    shapes = {"a": 5, "b": 1234, "c": 77}
    source = CounterNoise("sphere", shapes)
    for step in range(4):
        z = torch.cat([source.draw(Direction(9, step), n, 0, size, CPU, F32) for n, size in shapes.items()]).double()
        assert float(z.norm()) == pytest.approx(sum(shapes.values()) ** 0.5, rel=1e-7)
        gaussian = torch.cat([sample("gaussian", key_of(Direction(9, step), n), 0, size) for n, size in shapes.items()])
        assert float(torch.nn.functional.cosine_similarity(z, gaussian.double(), dim=0)) == pytest.approx(
            1.0, abs=1e-12
        )


def test_sphere_scale_depends_on_no_order_of_tensors():
    shapes = {f"t{i}": 11 * i + 3 for i in range(20)}
    forward, back = CounterNoise("sphere", shapes), CounterNoise("sphere", dict(reversed(shapes.items())))
    for step in range(3):
        assert forward._factor(Direction(0, step), CPU) == back._factor(Direction(0, step), CPU)


def test_squared_norm_is_exact_for_any_chunk(monkeypatch):
    z = counter._expand(31, 0, 4001, 2, counter._quantiles_of_words, "cpu")
    wanted = sum(int(x) ** 2 for x in z.tolist())
    assert squared_norm(31, 4001) == wanted
    monkeypatch.setattr(counter, "_CHUNK_WORDS", 17)
    assert squared_norm(31, 4001) == wanted


# ------------------------------------------------------------------------------------------- the noise never changes


def test_words_agree_with_the_generator_written_in_plain_integers():
    for key in (0, 1, 0xFFFFFFFFFFFFFFFF, 0x8000000080000000, key_of(Direction(3, 1), "w")):
        words = random_words(key, 0, 50)
        assert [int(w) & 0xFFFFFFFF for w in words] == [words_in_plain_python(key, i) for i in range(50)]


def test_golden_values():
    """A run can only be replayed while these hold: changing any of them breaks every journal written so far."""
    key = key_of(Direction(42, 7, 1), "model.layers.0.mlp.up_proj.weight")
    assert key == GOLDEN["key"]
    assert random_words(key, 0, 4).tolist() == GOLDEN["words"]
    assert random_words(key, (1 << 30) - 1, (1 << 30) + 1).tolist() == GOLDEN["border"]
    assert [float(x).hex() for x in sample("gaussian", key, 0, 4)] == GOLDEN["gaussian"]
    assert sample("rademacher", key, 0, 12).int().tolist() == GOLDEN["rademacher"]
    assert squared_norm(key, 1000) == GOLDEN["squared_norm"]
    sphere = CounterNoise("sphere", {"a": 3, "b": 5})
    assert [float(x).hex() for x in sphere.draw(Direction(1, 1), "b", 0, 2, CPU, F32)] == GOLDEN["sphere"]
    assert step_seed(0, 0) == GOLDEN["step_seed"]
    table = counter._quantile_table("cpu")
    assert hashlib.sha256(table.numpy().tobytes()).hexdigest() == GOLDEN["table"]


GOLDEN = {
    "key": 17387653263458458949,
    "words": [-868075859, -1267506771, 1710147370, -302441785],
    "border": [1991754393, -1061425448],
    "gaussian": ["-0x1.968e000000000p-1", "0x1.ab12000000000p-1", "-0x1.34a4000000000p-2", "0x1.13b8000000000p-1"],
    "rademacher": [1, -1, 1, 1, -1, 1, -1, 1, -1, 1, 1, -1],
    "squared_norm": 3981014912778,
    "sphere": ["-0x1.4b2dc00000000p+0", "-0x1.c7d1a80000000p+0"],
    "step_seed": 478389722,
    "table": "07b1439ff184dbec83a8b587beb0a82d4f72fc574e6dbf944b5e2fd35b68664b",
}


# ---------------------------------------------------------------------------------------------------- torch_sequential


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_sequential_is_the_walk_of_manual_seed_and_normal_in_any_order(dtype):
    shapes = {"a": (33, 7), "b": (5,), "c": (64, 16), "d": (1,), "e": (17,)}
    tensors = [(name, torch.Size(shape), dtype, CPU) for name, shape in shapes.items()]
    walked = {}
    for seed in (534895718, 3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            walked[seed] = {n: torch.normal(mean=0, std=1, size=shape, dtype=dtype) for n, shape in shapes.items()}
    source = TorchSequentialNoise(tensors)
    for seed, order in [(534895718, "abcde"), (3, "edcba"), (534895718, "cccaeb"), (3, "d")]:
        for name in order:
            z = source.draw(Direction(seed, 0), name, 0, walked[seed][name].numel(), CPU, dtype)
            assert z.dtype == dtype
            assert torch.equal(z, walked[seed][name].view(-1)), (seed, name)
    piece = source.draw(Direction(3, 0), "c", 101, 505, CPU, dtype)
    assert torch.equal(piece, walked[3]["c"].view(-1)[101:505])


@pytest.mark.parametrize("keep", [0, 150, 1 << 26])
def test_torch_sequential_draws_a_tensor_asked_for_in_pieces_once(keep, monkeypatch):
    monkeypatch.setattr(mezo, "_KEEP_IN_PIECES", keep)
    tensors = [("a", torch.Size([10, 5]), F32, CPU), ("b", torch.Size([7]), F32, CPU)]
    directions = [Direction(3 + i, 0, i) for i in range(4)]
    whole = {d: TorchSequentialNoise(tensors).draw(d, "a", 0, 50, CPU, F32) for d in directions}
    source = TorchSequentialNoise(tensors)
    for direction in directions:
        source.draw(direction, "b", 0, 7, CPU, F32)  # walks once: what follows counts draws of one tensor
    normals, real = [], torch.normal
    monkeypatch.setattr(mezo.torch, "normal", lambda *args, **kwargs: normals.append(1) or real(*args, **kwargs))
    for start in range(0, 50, 10):
        for direction in directions:
            piece = source.draw(direction, "a", start, start + 10, CPU, F32)
            assert torch.equal(piece, whole[direction][start : start + 10])
            piece.zero_()  # the caller may
    num_kept = max(1, min(4, keep // 50))
    assert len(normals) == num_kept + 5 * (4 - num_kept)
    assert not source._in_pieces  # the last piece lets go
    for direction in (directions[0], Direction(9, 1)):
        source.draw(direction, "a", 0, 10, CPU, F32)
    assert list(source._in_pieces) == [Direction(9, 1)]  # not beyond the step
    source.draw(Direction(9, 1), "b", 0, 3, CPU, F32)
    assert [z.numel() for z in source._in_pieces.values()] == [7]  # nor beyond the tensor


def test_torch_sequential_uses_the_dtype_of_each_tensor():
    tensors = [("a", torch.Size([40]), torch.bfloat16, CPU), ("b", torch.Size([40]), torch.float32, CPU)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        wanted = [torch.normal(mean=0, std=1, size=shape, dtype=dtype) for _, shape, dtype, _ in tensors]
    source = TorchSequentialNoise(tensors)
    assert torch.equal(source.draw(Direction(11, 0), "b", 0, 40, CPU, torch.float32), wanted[1])
    assert torch.equal(source.draw(Direction(11, 0), "a", 0, 40, CPU, torch.bfloat16), wanted[0])


# -------------------------------------------------------------------------------------------------------------- global


def test_no_global_generator_is_touched():
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    source = CounterNoise("sphere", {"a": 100})
    source.draw(Direction(0, 0), "a", 0, 100, CPU, F32)
    sample("rademacher", 1, 0, 100)
    step_seed(0, 5)
    TorchSequentialNoise([("a", torch.Size([100]), F32, CPU)]).draw(Direction(0, 0), "a", 0, 100, CPU, F32)
    assert random.getstate() == before[0]
    assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])


def test_global_generators_do_not_reach_the_noise():
    torch.manual_seed(1)
    first = sample("gaussian", 5, 0, 50)
    sequential = TorchSequentialNoise([("a", torch.Size([100]), F32, CPU)])
    one = sequential.draw(Direction(0, 0), "a", 0, 100, CPU, F32)
    torch.manual_seed(2)
    assert torch.equal(sample("gaussian", 5, 0, 50), first)
    assert torch.equal(sequential.draw(Direction(0, 0), "a", 0, 100, CPU, F32), one)


def test_step_seeds_are_31_bit_and_differ():
    seeds = {step_seed(seed, step) for seed in range(5) for step in range(200)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 1 << 31 for seed in seeds)
