"""Hidden states below the lowest trained block: reused only where that changes no loss."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.models import (
    CAUSAL,
    PAD,
    VOCAB,
    batch_for,
    tiny_bert_classifier,
    tiny_llama,
    tiny_opt,
    tiny_roberta_mlm,
    tiny_t5,
)
from zoft.engines._frozen_prefix import FrozenPrefix
from zoft.lm.models.trainable.last_blocks import LastBlocks
from zoft.lm.models.trainable.regex import Regex
from zoft.weights.tensors import Weights


def prefix_of(model, trainable=None, max_mb: int = 64) -> FrozenPrefix | None:
    (trainable or LastBlocks(1)).apply(model)
    return FrozenPrefix.of(model, Weights(model), max_mb)


def padded(lengths: list[int], side: str, seed: int = 0, positions: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(longest - length, None) if side == "left" else slice(0, length)
        ids[row, where] = torch.randint(4, VOCAB, (length,), generator=generator)
        mask[row, where] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | ({"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if positions else {})


class Counter:
    """How many rows were computed by block 0 (its own hooks also fire when it is passed through)."""

    def __init__(self, prefix: FrozenPrefix) -> None:
        self.rows = 0
        layer = next(m for n, m in prefix.blocks[0].named_children() if "att" in n)
        layer.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, _module, args, kwargs) -> None:
        self.rows += len(args[0] if args else kwargs["hidden_states"])


def served(prefix: FrozenPrefix) -> bool:
    return prefix.usable and bool(prefix.rows)


def outputs(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **({} if "Bert" in type(model).__name__ else {"use_cache": False})).logits


def compare(model, batch, prefix) -> None:
    wanted = outputs(model, batch)
    with prefix.reused():
        first, again = outputs(model, batch), outputs(model, batch)
    inside = batch["attention_mask"].bool() if wanted.dim() == 3 else slice(None)
    torch.testing.assert_close(first[inside], wanted[inside], rtol=0, atol=1e-5)
    assert torch.equal(first[inside], again[inside])
    torch.testing.assert_close(outputs(model, batch)[inside], wanted[inside], rtol=0, atol=0)  # nothing stays behind


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 3, 5]], ids=["equal", "left padded"])
def test_decoders_give_the_same_logits(family, lengths):
    model = CAUSAL[family]()
    batch = padded(lengths, "left", positions=True)
    prefix = prefix_of(model)
    assert prefix is not None
    assert prefix.first == 2
    compare(model, batch, prefix)
    assert served(prefix)
    assert len(prefix.rows) == 3


@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 3, 5]], ids=["equal", "right padded"])
@pytest.mark.parametrize("make", [tiny_bert_classifier, tiny_roberta_mlm, tiny_llama, tiny_opt])
def test_right_padded_rows_give_the_same_logits(make, lengths):
    model = make()
    batch = padded(lengths, "right")
    prefix = prefix_of(model)
    compare(model, batch, prefix)
    assert served(prefix)


def test_token_types_are_part_of_a_row():
    model = tiny_bert_classifier()
    batch = padded([6, 6], "right")
    other = batch | {"token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)}
    prefix = prefix_of(model)
    compare(model, batch, prefix)
    compare(model, other, prefix)
    assert len(prefix.rows) == 4


def test_perturbed_upper_blocks_are_seen_and_lower_blocks_run_once():
    model = tiny_llama()
    batch = batch_for(model)
    prefix = prefix_of(model)
    counter = Counter(prefix)
    with prefix.reused(), torch.no_grad():
        model(**batch)
        seen = counter.rows
        for _ in range(3):
            model.model.layers[2].mlp.up_proj.weight.data.add_(0.05)
            prefixed = model(**batch).loss
    assert counter.rows == seen
    torch.testing.assert_close(prefixed, model(**batch).loss.detach(), rtol=1e-5, atol=0)


def test_rows_are_found_again_in_other_batches_and_orders():
    model = tiny_llama()
    prefix = prefix_of(model)
    counter = Counter(prefix)
    batch = padded([7, 3, 5], "left", positions=True)
    mixed = {key: value[[2, 0]] for key, value in batch.items()}
    with prefix.reused():
        outputs(model, batch)
        seen = counter.rows
        reused = outputs(model, mixed)
    assert counter.rows == seen
    inside = mixed["attention_mask"].bool()
    torch.testing.assert_close(reused[inside], outputs(model, mixed)[inside], rtol=0, atol=1e-5)


def test_another_batch_with_the_same_shape_is_not_confused_with_the_last_one():
    model = tiny_llama()
    prefix = prefix_of(model)
    for seed in range(3):
        compare(model, padded([6, 6], "left", seed=seed, positions=True), prefix)
    assert len(prefix.rows) == 6


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("pattern", ["embed_tokens", r"layers\.0\.", "."])
def test_nothing_is_kept_where_something_low_is_trained(pattern):
    model = tiny_llama()
    batch = batch_for(model)
    prefix = prefix_of(model, Regex(pattern=pattern))
    assert prefix is None or prefix.first == 0 or not usable_after(model, batch, prefix)


def usable_after(model, batch, prefix) -> bool:
    with prefix.reused():
        outputs(model, {k: v for k, v in batch.items() if k != "labels"})
    return prefix.usable


def test_an_embedding_trained_beside_the_last_block_gives_up_and_says_so(caplog):
    model = tiny_llama()
    prefix = prefix_of(model, Regex(pattern=r"embed_tokens|layers\.2\."))
    batch = {k: v for k, v in batch_for(model).items() if k != "labels"}
    with caplog.at_level(logging.WARNING):
        compare(model, batch, prefix)
    assert not prefix.usable
    assert not prefix.rows
    assert "a trained module outside the blocks runs before them" in caplog.text


def test_the_tied_head_of_opt_is_the_embedding():
    model = tiny_opt()
    prefix = prefix_of(model, Regex(pattern=r"embed_tokens|layers\.2\."))
    batch = {k: v for k, v in batch_for(model).items() if k != "labels"}
    compare(model, batch, prefix)
    assert not served(prefix)


def test_t5_gives_the_same_losses_with_or_without():
    model = tiny_t5()
    Regex(pattern=r"decoder\.block\.1\.").apply(model)
    prefix = FrozenPrefix.of(model, Weights(model), 64)
    batch = batch_for(model)
    with torch.no_grad():
        wanted = model(**batch).loss
        if prefix is not None:
            with prefix.reused():
                torch.testing.assert_close(model(**batch).loss, wanted, rtol=1e-6, atol=0)
                torch.testing.assert_close(model(**batch).loss, wanted, rtol=1e-6, atol=0)
            assert not served(prefix)
        torch.testing.assert_close(model(**batch).loss, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("adapter", ["prompt", "prefix"])
def test_virtual_tokens_give_the_same_losses_with_or_without(adapter):
    from zoft.component import create

    model = create("peft", adapter, adapter).wrap(tiny_llama(), 0).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("prompt" in name or "layers.2." in name)
    prefix = FrozenPrefix.of(model, Weights(model), 64)
    batch = {key: value for key, value in batch_for(model).items() if key != "labels"}
    with torch.no_grad():
        wanted = model(**batch).logits
        if prefix is not None:
            with prefix.reused():
                for _ in range(2):
                    torch.testing.assert_close(model(**batch).logits, wanted, rtol=0, atol=1e-6)
            assert not served(prefix)


def test_left_padding_without_positions_is_left_alone():
    model = tiny_llama()
    prefix = prefix_of(model)
    compare(model, padded([7, 3], "left"), prefix)
    assert not prefix.rows


def test_lora_on_the_last_block_is_served():
    from zoft.lm.models.peft.lora import Lora

    model = Lora(layers_to_transform=[2]).wrap(tiny_llama(), 0).eval()
    prefix = FrozenPrefix.of(model, Weights(model), 64)
    assert prefix.first == 2
    batch = {k: v for k, v in batch_for(model).items() if k != "labels"}
    compare(model, batch, prefix)
    assert served(prefix)


# ------------------------------------------------------------------------------------------------------ fill and memory


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt, tiny_bert_classifier])
def test_fill_keeps_what_row_by_row_would(make):
    model = make()
    batch = padded([6] * 5, "right")
    together, alone = prefix_of(model), prefix_of(model)
    counter = Counter(together)
    together.fill(lambda: outputs(model, batch))
    assert counter.rows == 5
    with alone.reused():
        outputs(model, batch)
    assert together.rows.tensors.keys() == alone.rows.tensors.keys()
    for key, states in together.rows.tensors.items():
        torch.testing.assert_close(states, alone.rows.get(key), rtol=0, atol=1e-6)
    seen = counter.rows
    together.fill(lambda: outputs(model, batch))
    assert counter.rows == seen, "rows that are kept already were computed again"
    compare(model, batch, together)


def test_memory_is_bounded_nothing_is_evicted_and_the_rest_is_computed():
    model = tiny_llama()
    prefix = prefix_of(model)
    row_bytes = 6 * 16 * 4
    prefix.max_bytes = 2 * row_bytes
    prefix.clear()
    batch = padded([6] * 4, "right")
    compare(model, batch, prefix)
    assert len(prefix.rows) == 2
    assert prefix.rows.num_bytes == 2 * row_bytes
    compare(model, padded([6] * 4, "right", seed=1), prefix)
    assert len(prefix.rows) == 2
    prefix.clear()
    assert len(prefix.rows) == 0


def test_kept_rows_own_their_memory_when_filled_together():
    model = tiny_llama()
    prefix = prefix_of(model)
    prefix.fill(lambda: outputs(model, padded([6] * 4, "right")))
    assert all(s.untyped_storage().nbytes() == s.numel() * s.element_size() for s in prefix.rows.tensors.values())


def test_nothing_is_left_on_the_model_when_a_forward_raises():
    model = tiny_llama()
    prefix = prefix_of(model)
    batch = {k: v for k, v in batch_for(model).items() if k != "labels"}
    wanted = outputs(model, batch)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    def explode(*_):
        raise RuntimeError("halfway")

    handle = model.lm_head.register_forward_pre_hook(explode)
    with pytest.raises(RuntimeError, match="halfway"), prefix.reused():
        outputs(model, batch)
    handle.remove()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(outputs(model, batch), wanted)


def test_shared_rows_serve_the_same_part_and_are_found_out_by_another():
    """Two models of the same weights: one trains the same block, the other an embedding as well."""
    batch = padded([5, 7], "right")
    first = prefix_of(tiny_llama())
    with first.reused():
        outputs(first.model, batch)
    same = prefix_of(tiny_llama())
    same.share(first)
    counter = Counter(same)
    with same.reused():
        reused = outputs(same.model, batch)
    assert counter.rows == 2  # the check of the first batch, and nothing to find its rows' states
    inside = batch["attention_mask"].bool()
    torch.testing.assert_close(reused[inside], outputs(same.model, batch)[inside])
    again = FrozenPrefix.of(first.model, Weights(first.model), 64)
    again.share(first)  # the very model: nothing is computed below the block, not even to check
    counter = Counter(again)
    with again.reused():
        outputs(again.model, batch)
    assert counter.rows == 0
    other = prefix_of(tiny_llama(), Regex(r"embed_tokens|layers\.2\."))
    other.share(first)
    with torch.no_grad():
        other.model.model.embed_tokens.weight.add_(0.1)
    wanted = outputs(other.model, batch)
    with other.reused():
        assert torch.equal(outputs(other.model, batch), wanted)
    assert not other.usable
    assert served(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 1e-3])
def test_fault_4_states_that_depend_a_little_on_the_batch_are_not_kept(share, dtype, caplog):
    """So little that 16 bits do not tell it from rounding: a mean over the batch, mixed into a block's output."""
    model = tiny_llama().to(dtype)
    prefix = prefix_of(model)
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: out + share * out.mean((0, 1), keepdim=True))
    with prefix.reused():
        outputs(model, padded([5, 8, 3], "right"))
    assert prefix.usable == (not share)
    assert len(caplog.records) == (1 if share else 0)
    assert all(p.dtype == dtype for p in model.parameters())
