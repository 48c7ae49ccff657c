"""Loading a model: the class that its config names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import models
from zoft.errors import UserError
from zoft.models.load import load_model, require_causal_lm


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
