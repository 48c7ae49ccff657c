"""Where a classifier reads a row, as its class does, whatever the padding."""

from __future__ import annotations

import pytest
import torch
import transformers

from zoft.errors import UserError
from zoft.lm.objectives.classes import Classes, read_by_head
from zoft.trainer.readout import last_tokens, refuse_unread

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MORE = {"max_position_embeddings": 64, "num_labels": 3}


def classifier(kind, **fields):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SMALL | MORE | fields))
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ends", [True, False])
def test_a_text_that_ends_with_the_paddings_token_is_read_where_its_class_reads_it(side, ends):
    """The padding's id is often the end token's: the class reads the last token that is another, and so do we."""
    model = classifier("Llama", pad_token_id=2)
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 2, 2], [5, 6, 2, 2, 2]])
    lengths = [5, 4, 3] if ends else [5, 3, 2]  # that the mask has
    mask = torch.tensor([[1] * length + [0] * (5 - length) for length in lengths])
    if side == "left":
        ids, mask = ((torch.stack([r.roll(5 - n) for r, n in zip(one, lengths, strict=True)])) for one in (ids, mask))
    at = read_by_head(model, {"input_ids": ids, "attention_mask": mask})
    h = []
    with model.model.register_forward_hook(lambda _m, _a, out: h.append(out.last_hidden_state)), torch.no_grad():
        read = model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(model.score(at.of(h[0])), read)


def test_a_classifier_without_a_paddings_token_is_read_at_the_end():
    model = classifier("Llama", pad_token_id=None)
    at = read_by_head(model, {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 0]])})
    assert at.column.tolist() == [-1]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("ModernBert", {"classifier_pooling": "mean"}),
        ("ModernBert", {"classifier_pooling": "mean", "num_hidden_layers": 1}),
        ("Canine", {"local_transformer_stride": 16, "downsampling_rate": 2, "upsampling_kernel_size": 2}),
    ],
)
@pytest.mark.parametrize("objective", [None, Classes()])
def test_a_classifier_that_reads_otherwise_is_refused(kind, fields, objective):
    with pytest.raises(UserError, match=f"the classifier of {kind}ForSequenceClassification reads other positions"):
        refuse_unread(classifier(kind, **(fields | {"pad_token_id": 0})), objective)


@pytest.mark.parametrize("kind", ["Albert", "Bert", "Llama", "OpenAIGPT"])
def test_a_classifier_that_reads_one_position_is_served(kind):
    fields = {"embedding_size": 8} if kind == "Albert" else {}
    refuse_unread(classifier(kind, pad_token_id=0, **fields), None)


def test_a_config_without_a_paddings_token_is_no_traceback():
    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
    config = transformers.RwkvConfig(**small, intermediate_size=24)
    assert not hasattr(config, "pad_token_id")
    refuse_unread(transformers.AutoModelForCausalLM.from_config(config).eval(), None)


def test_as_many_options_as_tokens_are_not_cut_with_the_tokens():
    ids, options = torch.tensor([[5, 6, 7], [5, 6, 8]]), torch.tensor([[4, 9, 11], [4, 9, 11]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2])}
    assert last_tokens({**batch, "option_tokens": options}, 1) is None
    tail = last_tokens({**batch, "option_tokens": options[:, :2]}, 1)
    assert tail["input_ids"].tolist() == [[7], [8]]
    assert torch.equal(tail["option_tokens"], options[:, :2])
