"""Reads a DINOv2 vision encoder from an ONNX graph that PyTorch exported; the graph may contain other modules too.

The exporter keeps the names of most parameters. It drops those of Linear layers' matrices (they are folded and
transposed) and of the two halves of the position embedding; these are identified by the nodes that read them.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from mllm_act.errors import UserError
from mllm_act.weights.tensors import Source, Tensor, not_installed, sha256

_BACKBONE = "backbone"  # the encoder's module; everything else is ignored


def read(path: Path) -> Source:
    """Opens a file.

    Raises:
      UserError: if the file cannot be read or contains no such encoder.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise not_installed("onnx", str(path)) from error
    try:
        graph = onnx.load(str(path)).graph
    except (DecodeError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: expected an ONNX file, found one that cannot be read ({error}); download it again"
        ) from error
    stored = {parameter.name: parameter for parameter in graph.initializer}
    tensors = {
        name.removeprefix(f"{_BACKBONE}."): _tensor(parameter)
        for name, parameter in stored.items()
        if name.startswith(f"{_BACKBONE}.")
    }
    position: dict[str, Any] = {}
    for node in graph.node:
        module, _, operation = node.name.removeprefix(f"/{_BACKBONE}/").rpartition("/")
        if not node.name.startswith(f"/{_BACKBONE}/"):
            continue
        for name in set(node.input) & stored.keys():
            if name.startswith(f"{_BACKBONE}."):
                continue
            if operation == "MatMul":
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
    return Source(str(path), tensors, _config(tensors, path), None, sha256(path))


def _tensor(stored: Any, transposed: bool = False) -> Tensor:
    shape = tuple(stored.dims)
    read = functools.partial(_values, stored, transposed)
    return Tensor(shape[::-1] if transposed else shape, np.dtype(np.float32), read)


def _values(stored: Any, transposed: bool) -> np.ndarray:
    from onnx import numpy_helper

    values = numpy_helper.to_array(stored).astype(np.float32, copy=False)
    return values.T if transposed else values


def _concatenated(class_token: Any, grid: Any) -> Tensor:
    """The position embedding float32[1, 1 + patches, D]: the class token's, then the patches'."""
    shape = (1, 1 + grid.dims[1], grid.dims[2])
    return Tensor(
        shape,
        np.dtype(np.float32),
        lambda: np.concatenate([_values(class_token, False), _values(grid, False)], axis=1),
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
