"""Reads a DINOv2 vision encoder from an ONNX graph that PyTorch exported; the graph may contain other modules too.

The exporter keeps the names of most parameters. It drops those of Linear layers' matrices (they are folded and
transposed) and of the two halves of the position embedding; these are identified by the nodes that read them.
"""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from mllm_act.errors import UserError
from mllm_act.weights.tensors import Source, Tensor, not_installed, parsing, sha256

_BACKBONE = "backbone"  # the encoder's module; everything else is ignored


def read(path: Path) -> Source:
    """Opens a file.

    Raises:
      UserError: if the file cannot be read or contains no such encoder.
    """
    try:
        import onnx
    except ImportError as error:
        raise not_installed("onnx", str(path)) from error
    with parsing(path, "an ONNX file"):
        graph = onnx.load(str(path), load_external_data=False).graph
        stored = {parameter.name: parameter for parameter in graph.initializer}
        if len(stored) != len(graph.initializer):
            raise ValueError("two initializers of the same name")
        outside = [name for name, parameter in stored.items() if parameter.data_location]
        if outside:
            raise UserError(
                f"{path}: expected the weights in the file, found {len(outside)} of them in other files (external "
                f"data), such as {outside[0]}; save it again with onnx.save_model(..., save_as_external_data=False)"
            )
        tensors = _encoder(graph, stored, path)
        return Source(str(path), tensors, _config(tensors, path), None, sha256(path))


def _encoder(graph: Any, stored: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The encoder's tensors by Hugging Face's names."""
    tensors = {
        name.removeprefix(f"{_BACKBONE}."): _tensor(parameter)
        for name, parameter in stored.items()
        if name.startswith(f"{_BACKBONE}.")
    }
    position: dict[str, Any] = {}
    readers: dict[str, str] = {}
    for node in graph.node:
        module, _, operation = node.name.removeprefix(f"/{_BACKBONE}/").rpartition("/")
        if not node.name.startswith(f"/{_BACKBONE}/"):
            continue
        for name in set(node.input) & stored.keys():
            if name.startswith(f"{_BACKBONE}."):
                continue
            if name in readers:
                raise ValueError(f"{node.name} and {readers[name]} read the same tensor {name}")
            if operation == "MatMul":
                readers[name] = node.name
                weight = module.replace("/", ".") + ".weight"
                tensors[weight] = _tensor(stored[name], transposed=True)
            elif module == "embeddings" and node.op_type in ("Concat", "Reshape"):
                position[node.op_type] = stored[name]
    if len(position) != 2 or not tensors:
        raise UserError(
            f"{path}: expected the module {_BACKBONE!r} with a DINOv2 vision transformer in it, found "
            f"{len(tensors)} of its parameters; pass a Hugging Face folder of the encoder instead"
        )
    tensors["embeddings.position_embeddings"] = _concatenated(
        position["Concat"], position["Reshape"]
    )
    return tensors


def _tensor(stored: Any, transposed: bool = False) -> Tensor:
    """A tensor of the graph, whose dtype and size are checked against the bytes stored for it."""
    from onnx import TensorProto, helper

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    shape = tuple(stored.dims)
    if stored.data_type not in floats or min(shape, default=0) < 0:
        raise ValueError(f"{stored.name} of type {stored.data_type}, shape {list(shape)}")
    if stored.HasField("raw_data"):
        size = helper.tensor_dtype_to_np_dtype(stored.data_type).itemsize
        count, rest = divmod(len(stored.raw_data), size)
    else:
        field = helper.tensor_dtype_to_field(stored.data_type)
        count, rest = len(getattr(stored, field)), 0
    if rest or count != math.prod(shape):
        raise ValueError(f"{stored.name} of shape {list(shape)} with {count:,} values")
    read = functools.partial(_values, stored, transposed)
    return Tensor(shape[::-1] if transposed else shape, np.dtype(np.float32), read)


def _values(stored: Any, transposed: bool) -> np.ndarray:
    from onnx import numpy_helper

    values = numpy_helper.to_array(stored).astype(np.float32, copy=False)
    return values.T if transposed else values


def _concatenated(class_token: Any, grid: Any) -> Tensor:
    """The position embedding float32[1, 1 + patches, D]: the class token's, then the patches'."""
    parts = [_tensor(class_token), _tensor(grid)]
    width = grid.dims[2]
    if [part.shape for part in parts] != [(1, 1, width), (1, grid.dims[1], width)]:
        raise ValueError(f"position embeddings of shapes {[part.shape for part in parts]}")
    return Tensor(
        (1, 1 + grid.dims[1], width),
        np.dtype(np.float32),
        lambda: np.concatenate([part.read() for part in parts], axis=1),
    )


def _config(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The sizes that follow from the shapes; the number of heads does not."""
    try:
        width, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
        mlp = tensors["encoder.layer.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path}: expected DINOv2's patch embedding and blocks, found no {error}; pass a Hugging Face folder of "
            "the encoder instead"
        ) from error
    side = round((tensors["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    blocks = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}
    return {
        "model_type": "dinov2",
        "hidden_size": width,
        "mlp_ratio": mlp / width,
        "num_hidden_layers": len(blocks),
        "image_size": side * patch,
        "patch_size": patch,
    }
