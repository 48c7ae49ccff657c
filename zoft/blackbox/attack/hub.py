"""Image classifiers of transformers and image files, put through the model's own preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from zoft.blackbox.attack.classifier import Classifier
from zoft.blackbox.attack.data import Setting
from zoft.errors import UserError
from zoft.lm.hub import has_cached, not_here, not_waited_for, out_of_reach
from zoft.utils.lazy import torch

_BATCH = 32


def hub(model: str, image: str, label: str | None = None) -> Setting:
    """One image file and a pretrained classifier.

    The attack is on what the model sees: the image after the processor's resizing and cropping, before its
    normalisation, which becomes part of the classifier.

    Args:
        model: a hub name or a local folder.
        image: path of an image file.
        label: the right class, by name or number; the model's own answer if left out.

    Raises:
        UserError: no such model, a model that is no image classifier, a file that is no image, or an image that the
            classifier labels otherwise than ``label``.
    """
    picture = read_image(image)
    network, processor = _load(model)
    pixels = _seen(processor, picture)
    names = [str(network.config.id2label[number]) for number in range(network.config.num_labels)]
    classifier = Classifier(_normalised(network, processor), names, batch=_BATCH)
    said = classifier(pixels)[0]
    classifier.num_queries = 0  # the attack asks for it itself
    right = int(said.argmax()) if label is None else classifier.index_of(label)
    if said.argmax() != right:
        raise UserError(
            f"the classifier already has {image} wrong: it says {names[said.argmax()]!r} with probability "
            f"{np.exp(said.max()):.2f} and not {names[right]!r}, so there is nothing to attack: give another image, "
            "or leave label out"
        )
    return Setting(classifier, pixels, np.array([right]), f"{model}: {len(names):,} classes, asked about {image}")


def read_image(path: str) -> Any:
    """An image file in RGB.

    Raises:
        UserError: there is no such file, or it is no image.
    """
    from PIL import Image

    if not Path(path).is_file():
        raise UserError(f"there is no image file {path}")
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(
            f"{path} is no image that can be read: give a PNG, JPEG or another format of Pillow's"
        ) from None


def _load(model: str) -> tuple[Any, Any]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not Path(model).is_dir() and not has_cached(model) and out_of_reach():
        raise not_here(f"model={model}", "a folder with an image classifier of transformers")
    try:
        with not_waited_for():
            config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"model={model} cannot be loaded: {reason}") from None
    if type(config) not in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise UserError(f"model={model} is a {config.model_type} model, which is no image classifier of transformers")
    try:
        with not_waited_for():
            network = transformers.AutoModelForImageClassification.from_pretrained(model, dtype=torch.float32)
            processor = transformers.AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"model={model} cannot be loaded as an image classifier: {reason}") from None
    return network.eval().requires_grad_(False), processor


def _seen(processor: Any, picture: Any) -> np.ndarray:
    """float32 [1, 3, h, w] in [0, 1]; bicubic resizing may overshoot a little, which is cut off."""
    processed = processor(picture, do_normalize=False, do_rescale=True, rescale_factor=1 / 255, return_tensors="np")
    return np.clip(np.asarray(processed["pixel_values"], dtype=np.float32), 0, 1)


def _normalised(network: Any, processor: Any) -> Any:
    def per_channel(name: str, otherwise: float) -> torch.Tensor:
        value = getattr(processor, name, None) if getattr(processor, "do_normalize", False) else None
        return torch.tensor([otherwise] if value is None else value, dtype=torch.float32).view(-1, 1, 1)

    mean, std = per_channel("image_mean", 0.0), per_channel("image_std", 1.0)

    def scores(images: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            return network(pixel_values=(torch.from_numpy(images) - mean) / std).logits

    return scores
