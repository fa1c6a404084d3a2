"""Sources to a pretrained folder: every tensor is checked first, then they go through memory one by one."""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mllm_act.errors import UserError, expect_new
from mllm_act.models.mllm import MLLMConfig
from mllm_act.weights import configs, folder, names, safetensors, shapes
from mllm_act.weights.tensors import Source, Tensor


def convert(
    config: MLLMConfig, sources: Sequence[Source], out: Path, dtype: str | None = None
) -> None:
    """Writes the folder ``out``; it appears when it is whole.

    Args:
      config: the sizes that the sources must have.
      sources: they hold all of vision encoder and language model between them. LLaVA's projector is taken where one of
        them has it.
      out: where to.
      dtype: of the arrays written; by default each keeps its own.

    Raises:
      UserError: if a source is of another model; if tensors are missing, extra or of another shape (all of them are
        listed); or if ``out`` exists.
    """
    expect_new(out)
    for source in sources:
        configs.check(source.config, config, source.where)
    found = _match(config, sources)
    tokenizers = [source.tokenizer for source in sources if source.tokenizer is not None]
    if len(tokenizers) != 1:
        raise UserError(
            f"--source: expected one tokenizer.json among {_wheres(sources)}, found {len(tokenizers)}; "
            "save it beside the language model's weights (tokenizer.save_pretrained of transformers does it)"
        )
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write(partial / folder.WEIGHTS, found, dtype)
        (partial / folder.TOKENIZER).write_text(tokenizers[0], encoding="utf-8")
        meta = {
            "config": dataclasses.asdict(config),
            "sources": [{"source": s.where, "revision": s.revision} for s in sources],
        }
        (partial / folder.META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Array:
    """One of our arrays: the tensors that it is made of, in the order of its layers."""

    shape: tuple[int, ...]  # of one layer
    tensors: list[Tensor]
    stacked: bool


def _match(config: MLLMConfig, sources: Sequence[Source]) -> dict[str, _Array]:
    """Finds the tensors of every array, by path in the order they are written."""
    given: dict[str, Tensor] = {}
    extra = []
    for source in sources:
        for name, tensor in source.tensors.items():
            if names.short(name) in given:
                extra.append(f"{name} (in two sources)")
            given[names.short(name)] = tensor
    projector = any(name in given for name in names.PROJECTOR.values())
    wanted = shapes.imported(config, projector)
    places = names.places(config, projector)
    assert {place.path for place in places.values()} == wanted.keys()

    missing = sorted(places.keys() - given.keys())
    extra += [n for n in given if n not in places and not names.unused(n, config)]
    misshapen = []
    found: dict[str, _Array] = {}
    for name, place in places.items():
        stacked = place.layer is not None
        shape = wanted[place.path][1:] if stacked else wanted[place.path]
        theirs = names.their_shape(place.path, shape, config.vision.family)
        if name in given:
            if given[name].shape != theirs:
                misshapen.append(
                    f"{name}: expected {list(theirs)}, found {list(given[name].shape)}"
                )
            array = found.setdefault(place.path, _Array(shape, [], stacked))
            array.tensors.append(given[name])
    if missing or extra or misshapen:
        raise UserError(
            f"{_wheres(sources)}: the tensors are not the preset's; missing: {', '.join(missing) or 'none'}; "
            f"extra: {', '.join(sorted(extra)) or 'none'}; of another shape: {'; '.join(misshapen) or 'none'}; "
            "pass the sources that the preset is made for (a --source for each part)"
        )
    return found


def _write(path: Path, found: dict[str, _Array], dtype: str | None) -> None:
    dtypes = {
        name: jnp.dtype(dtype)
        if dtype is not None
        else functools.reduce(jnp.promote_types, (t.dtype for t in array.tensors))
        for name, array in found.items()
    }

    def parts() -> Iterator[tuple[str, np.ndarray]]:
        total = sum(tensor.bytes for array in found.values() for tensor in array.tensors)
        with tqdm(total=total, desc="import", unit="B", unit_scale=True) as progress:
            for name, array in found.items():
                for tensor in array.tensors:
                    yield name, _converted(name, array, tensor, dtypes[name])
                    progress.update(tensor.bytes)

    def nothing() -> np.ndarray:
        raise AssertionError("these stand for shapes alone")

    header = {
        name: Tensor(
            (len(array.tensors), *array.shape) if array.stacked else array.shape,
            dtypes[name],
            nothing,
        )
        for name, array in found.items()
    }
    safetensors.write(path, header, parts())


def _converted(name: str, array: _Array, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    return names.to_ours(name, tensor.read(), array.shape).astype(dtype, order="C", copy=False)


def _wheres(sources: Sequence[Source]) -> str:
    return " and ".join(source.where for source in sources)
