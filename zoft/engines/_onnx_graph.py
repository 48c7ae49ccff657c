"""A language model as an ONNX graph: its adapter's tensors are inputs, its frozen weights constants."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from zoft.errors import UserError
from zoft.utils.lazy import Tensor, nn, torch

_ROWS, _LENGTH, _PLACES, _TOKENS = 3, 7, 5, 2
"""Sizes of the traced example: all different, and none of them 1, which a trace would take for a constant."""

_BLOCK = 32  # numbers of a row that share a scale of few bits


class OnnxGraph:
    """Log-probabilities of some tokens at some positions, computed by ONNX Runtime.

    Args:
        model: with its adapter, float32 on the CPU.
        names: of the adapter's tensors.
        inputs: names of the model's arguments, each [B, T] int64.
        bits: 0 keeps the frozen matrices in float32; 8 or 4 stores them in that many.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], inputs: Sequence[str], bits: int = 0) -> None:
        self.names, self.inputs = list(names), list(inputs)
        self.reference = _module()(model)
        with tempfile.TemporaryDirectory() as folder:  # the session has read the file when it is made
            path = Path(folder) / "model.onnx"
            _export(self.reference, dict(model.named_parameters()), self.names, self.inputs, path)
            self._session = _session(_with_few_bits(path, bits) if bits else path)
        self._order = [value.name for value in self._session.get_inputs()]

    def __call__(
        self, adapter: Mapping[str, Tensor], inputs: Mapping[str, Tensor], places: Tensor, tokens: Tensor
    ) -> Any:
        """Float32 [N, C].

        Args:
            adapter: the tensors by name.
            inputs: the model's arguments, [B, T] each.
            places: [N] int64, positions counted through the rows of the batch.
            tokens: [N, C] int64.
        """
        values = [*(inputs[name] for name in self.inputs), places, tokens, *(adapter[name] for name in self.names)]
        feed = {name: _array(tensor) for name, tensor in zip(self._order, values, strict=True)}
        return torch.from_numpy(self._session.run(None, feed)[0])

    def plainly(
        self, adapter: Mapping[str, Tensor], inputs: Mapping[str, Tensor], places: Tensor, tokens: Tensor
    ) -> Tensor:
        """The log-probabilities computed in torch, to compare with."""
        with torch.no_grad():
            log_probs: Tensor = self.reference(
                {name: inputs[name] for name in self.inputs}, places, tokens, dict(adapter)
            )
            return log_probs


def _base(model: Any) -> Any:
    """The transformers model inside an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()


@lru_cache(maxsize=1)
def _module() -> Any:
    class LogProbs(torch.nn.Module):
        """The model with its head at the wanted positions, and a log-softmax behind it."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.eval()  # as in every query: no dropout

        def forward(
            self, inputs: dict[str, Tensor], places: Tensor, tokens: Tensor, adapter: dict[str, Tensor]
        ) -> Tensor:
            head: Any = _base(self.model).get_output_embeddings()
            before = vars(head).get("forward")
            forward = head.forward
            # [B, T, H] -> [1, N, H]
            head.forward = lambda hidden: forward(hidden.flatten(0, 1).index_select(0, places).unsqueeze(0))
            try:
                output = torch.func.functional_call(self.model, adapter, (), {**inputs, "use_cache": False})
            finally:
                if before is None:
                    del head.forward
                else:
                    head.forward = before
            return output.logits[0].float().log_softmax(-1).gather(1, tokens)  # [N, C]

    return LogProbs


def _export(
    reference: Any, parameters: Mapping[str, Tensor], names: Sequence[str], inputs: Sequence[str], path: Path
) -> None:
    """Trace the model once, with dynamic rows, length, positions and tokens."""
    rows, length, places, tokens = (torch.export.Dim(n) for n in ("rows", "length", "num_places", "num_tokens"))
    example = {
        "inputs": {name: torch.ones(_ROWS, _LENGTH, dtype=torch.int64) for name in inputs},
        "places": torch.arange(_PLACES),
        "tokens": torch.zeros(_PLACES, _TOKENS, dtype=torch.int64),
        "adapter": {name: parameters[name].detach() for name in names},
    }
    shapes = {
        "inputs": {name: {0: rows, 1: length} for name in inputs},
        "places": {0: places},
        "tokens": {0: places, 1: tokens},
        "adapter": {name: {} for name in names},
    }
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                reference, (), kwargs=example, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            assert program is not None
            program.save(str(path), external_data=True)
    except Exception as error:  # whatever a model's code does that cannot be traced
        first = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise UserError(
            f"engine=onnx cannot export {type(_base(reference.model)).__name__}: {first:.300}; use engine=auto"
        ) from error


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _with_few_bits(path: Path, bits: int) -> Path:
    """The graph with its constant matrices in blocks of few bits; adapters are inputs and stay what they are."""
    import onnx

    with _quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        model = onnx.load(str(path))
        _as_products(model.graph)
        quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=_BLOCK, is_symmetric=True, accuracy_level=0)
        quantizer.process()
        target = path.with_name("quantized.onnx")
        quantizer.model.save_model_to_file(str(target), use_external_data_format=True)
    return target


def _as_products(graph: Any) -> None:
    """Layers that come as Gemm (x W^T + b of a flattened batch), as the product and the sum that are quantised."""
    from onnx import helper, numpy_helper

    constants = {constant.name: constant for constant in graph.initializer}
    for place, node in reversed(list(enumerate(graph.node))):
        settings = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        plain = settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0 and not settings.get("transA", 0)
        if node.op_type != "Gemm" or not plain or node.input[1] not in constants:
            continue
        x, w, *bias = node.input
        if settings.get("transB", 0):
            turned = numpy_helper.to_array(constants[w]).T.copy()
            w = f"{w}_transposed"
            if w not in constants:
                constants[w] = numpy_helper.from_array(turned, w)
                graph.initializer.append(constants[w])
        product = f"{node.output[0]}_product" if bias else node.output[0]
        nodes = [helper.make_node("MatMul", [x, w], [product], name=f"{node.name}_product")]
        if bias:
            nodes.append(helper.make_node("Add", [product, *bias], [node.output[0]], name=f"{node.name}_sum"))
        graph.node.remove(node)
        for one in reversed(nodes):
            graph.node.insert(place, one)
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for constant in [constant for constant in graph.initializer if constant.name not in used]:
        graph.initializer.remove(constant)


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporter and quantiser talk of every node, and one of them sets the root logger up for it."""
    root, names = (
        logging.getLogger(),
        ("torch.onnx", "torch.export", "torch.__trace", "onnxruntime", "onnxscript", "onnx_ir"),
    )
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
