"""Loading a model: the class that its config names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import models
from zoft.errors import UserError
from zoft.lm.models.load import load_model, load_model_as, require_causal_lm


def test_a_classifier_stays_a_classifier(tmp_path: Path):
    model = models.tiny_bert_classifier()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is type(model)
    assert (loaded.classifier.weight == model.classifier.weight).all()
    with pytest.raises(UserError, match="no causal language model"):
        require_causal_lm(loaded, "x")


def test_a_causal_model_is_one(tmp_path: Path):
    models.tiny_llama().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), attn_implementation="eager")
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.config._attn_implementation == "eager"
    require_causal_lm(loaded, "x")


@pytest.mark.parametrize("architectures", [["LlamaModel"], ["NoSuchModel"], None, ["PreTrainedModel"], ["LlamaConfig"]])
def test_a_class_without_a_loss_is_loaded_as_a_causal_model(architectures: list[str] | None, tmp_path: Path):
    import json

    models.tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    assert type(load_model(str(tmp_path))).__name__ == "LlamaForCausalLM"


def test_a_file_that_lacks_tensors_is_refused_and_a_fresh_head_is_not(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    models.tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole, lost = load_file(file), "model.layers.0.mlp.up_proj.weight"
    load_model_as("classifier", str(tmp_path), num_labels=3)  # its head is new, as asked
    for tensors in (
        {key: value for key, value in whole.items() if key != lost},
        whole | {lost: whole[lost][:3].clone()},
    ):
        save_file(tensors, file, {"format": "pt"})
        for kind, name in (("causal", "LlamaForCausalLM"), ("classifier", "LlamaForSequenceClassification")):
            with pytest.raises(UserError, match=rf"lacks 1 of the tensors of a {name}, .*\({lost}\)"):
                load_model_as(kind, str(tmp_path))
    save_file({key: value for key, value in whole.items() if key != "lm_head.weight"}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        load_model_as("causal", str(tmp_path))
    models.tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)  # has no lm_head of its own
    load_model_as("causal", str(tmp_path))
