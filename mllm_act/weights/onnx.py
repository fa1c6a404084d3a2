"""A DINOv2 vision encoder out of an ONNX graph that PyTorch exported, perhaps with other modules around it.

The exporter keeps the names of most parameters. Those of the matrices of Linear layers are lost (they are folded and
transposed), and so are the two halves of the position embedding; the names of the nodes that read them tell.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from mllm_act.errors import UserError
from mllm_act.weights.tensors import Source, Tensor, need, sha256

_BACKBONE = "backbone"  # the module that is the encoder; what stands beside it is not read


def read(path: Path) -> Source:
    """Opens a file.

    Raises:
      UserError: if the file is not whole, or holds no such encoder.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise need("onnx", str(path)) from error
    try:
        graph = onnx.load(str(path)).graph
    except (DecodeError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: expected an ONNX file, found none that can be read ({error}); "
            "if the download is not whole, do it again"
        ) from error
    stored = {one.name: one for one in graph.initializer}
    found = {
        name.removeprefix(f"{_BACKBONE}."): _tensor(one)
        for name, one in stored.items()
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
                found[module.replace("/", ".") + ".weight"] = _tensor(stored[name], turned=True)
            elif module == "embeddings" and node.op_type in ("Concat", "Reshape"):
                position[node.op_type] = stored[name]
    if len(position) != 2 or not found:
        raise UserError(
            f"{path}: expected the module {_BACKBONE!r} with a DINOv2 vision transformer in it, found "
            f"{len(found)} of its parameters; pass a Hugging Face folder of the encoder instead"
        )
    found["embeddings.position_embeddings"] = _joined(position["Concat"], position["Reshape"])
    return Source(str(path), found, _config(found, path), None, sha256(path))


def _tensor(stored: Any, turned: bool = False) -> Tensor:
    shape = tuple(stored.dims)
    read = functools.partial(_values, stored, turned)
    return Tensor(shape[::-1] if turned else shape, np.dtype(np.float32), read)


def _values(stored: Any, turned: bool) -> np.ndarray:
    from onnx import numpy_helper

    values = numpy_helper.to_array(stored).astype(np.float32, copy=False)
    return values.T if turned else values


def _joined(first: Any, grid: Any) -> Tensor:
    """The position embedding: that of the class token, then those of the patches, [1, 1 + patches, D]."""
    shape = (1, 1 + grid.dims[1], grid.dims[2])
    return Tensor(
        shape,
        np.dtype(np.float32),
        lambda: np.concatenate([_values(first, False), _values(grid, False)], axis=1),
    )


def _config(found: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The sizes that shapes tell; the number of heads is not among them."""
    try:
        width, _, patch, _ = found["embeddings.patch_embeddings.projection.weight"].shape
        mlp = found["encoder.layer.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path}: expected DINOv2's patch embedding and blocks, found no {error}"
        ) from error
    side = round((found["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    blocks = {name.split(".")[2] for name in found if name.startswith("encoder.layer.")}
    return {
        "model_type": "dinov2",
        "hidden_size": width,
        "mlp_ratio": mlp / width,
        "num_hidden_layers": len(blocks),
        "image_size": side * patch,
        "patch_size": patch,
    }
