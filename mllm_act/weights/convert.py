"""Converts sources to a pretrained folder: checks every tensor first, then copies them one by one."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mllm_act.errors import UserError, expect_new
from mllm_act.files import whole_folder, write_json
from mllm_act.models.mllm import MLLMConfig
from mllm_act.weights import configs, folder, names, safetensors
from mllm_act.weights.shapes import pretrained_shapes
from mllm_act.weights.tensors import Source, Tensor
from mllm_act.weights.text_files import TOKENIZER


def convert(
    config: MLLMConfig, sources: Sequence[Source], out: Path, dtype: str | None = None
) -> None:
    """Writes the folder ``out``, whole or not at all.

    Args:
      config: the sizes that the sources must have.
      sources: together they contain the whole vision encoder and language model. LLaVA's projector is imported if one
        of them has it.
      out: the folder to make; must not exist.
      dtype: of the arrays written; by default each keeps its own.

    Raises:
      UserError: if a source is another model; if tensors are missing, unexpected or of another shape (all of them are
        listed); or if ``out`` exists.
    """
    expect_new(out)
    for source in sources:
        configs.check(source.config, config, source.origin)
    arrays = _match(config, sources)
    text_tokenizers = [s.text_tokenizer for s in sources if s.text_tokenizer is not None]
    if len(text_tokenizers) != 1:
        raise UserError(
            f"--source: expected one tokenizer.json among {_origins(sources)}, found {len(text_tokenizers)}; "
            "save it beside the language model's weights (tokenizer.save_pretrained of transformers does it)"
        )
    with whole_folder(out) as partial:
        _write(partial / folder.WEIGHTS, arrays, dtype)
        files = {name: text for source in sources for name, text in source.text_files.items()}
        for name, text in {**files, TOKENIZER: text_tokenizers[0]}.items():
            (partial / name).write_text(text, encoding="utf-8")
        meta = {
            "config": dataclasses.asdict(config),
            "sources": [{"source": s.origin, "revision": s.revision} for s in sources],
        }
        write_json(partial / folder.META, meta)


@dataclasses.dataclass(frozen=True)
class _Array:
    """One of our arrays and the tensors that it is made of, in the order of its layers."""

    shape: tuple[int, ...]  # of one layer
    tensors: list[Tensor]
    stacked: bool


def _match(config: MLLMConfig, sources: Sequence[Source]) -> dict[str, _Array]:
    """Finds the tensors of every array; returns arrays by path in the order they are written."""
    available: dict[str, Tensor] = {}
    extra = []
    for source in sources:
        for name, tensor in source.tensors.items():
            short = names.short_name(name)
            if short in available:
                extra.append(f"{name} (in two sources)")
            available[short] = tensor
    projector = any(name in available for name in names.PROJECTOR.values())
    shapes = pretrained_shapes(config, projector)
    targets = names.targets(config, projector)
    assert {target.path for target in targets.values()} == shapes.keys()

    missing = sorted(targets.keys() - available.keys())
    extra += [n for n in available if n not in targets and not names.unused(n, config)]
    misshapen = []
    arrays: dict[str, _Array] = {}
    for name, target in targets.items():
        if name not in available:
            continue
        tensor = available[name]
        stacked = target.layer is not None
        shape = shapes[target.path][1:] if stacked else shapes[target.path]
        theirs = names.their_shape(target.path, shape, config.vision.family)
        if tensor.shape != theirs:
            misshapen.append(f"{name}: expected {list(theirs)}, found {list(tensor.shape)}")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            misshapen.append(f"{name}: expected numbers in floating point, found {tensor.dtype}")
        arrays.setdefault(target.path, _Array(shape, [], stacked)).tensors.append(tensor)
    if missing or extra or misshapen:
        raise UserError(
            f"{_origins(sources)}: expected the preset's tensors, found others; missing: "
            f"{', '.join(missing) or 'none'}; extra: {', '.join(sorted(extra)) or 'none'}; of another shape: "
            f"{'; '.join(misshapen) or 'none'}; pass the sources that the preset is made for (a --source for each part)"
        )
    return arrays


def _write(path: Path, arrays: dict[str, _Array], dtype: str | None) -> None:
    dtypes = {
        name: jnp.dtype(dtype)
        if dtype is not None
        else functools.reduce(jnp.promote_types, (t.dtype for t in array.tensors))
        for name, array in arrays.items()
    }

    def parts() -> Iterator[tuple[str, np.ndarray]]:
        total = sum(tensor.bytes for array in arrays.values() for tensor in array.tensors)
        with tqdm(total=total, desc="import", unit="B", unit_scale=True) as progress:
            for name, array in arrays.items():
                for tensor in array.tensors:
                    yield name, _converted(name, array, tensor, dtypes[name])
                    progress.update(tensor.bytes)

    def unread() -> np.ndarray:
        raise AssertionError("safetensors.write needs only the shape and dtype of these tensors")

    header = {
        name: Tensor(
            (len(array.tensors), *array.shape) if array.stacked else array.shape,
            dtypes[name],
            unread,
        )
        for name, array in arrays.items()
    }
    safetensors.write(path, header, parts())


def _converted(name: str, array: _Array, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    return names.to_ours(name, tensor.read(), array.shape).astype(dtype, order="C", copy=False)


def _origins(sources: Sequence[Source]) -> str:
    return " and ".join(source.origin for source in sources)
