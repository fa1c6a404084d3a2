"""How precise a tokenizer is on unseen actions: errors in physical units, and how its codes are used."""

import csv
import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mllm_act.action_tokenizer import training
from mllm_act.action_tokenizer.fast import FastTokenizer
from mllm_act.action_tokenizer.kinds import Tokenizer
from mllm_act.action_tokenizer.quantizer import usage
from mllm_act.normalization import Statistics


@dataclasses.dataclass(frozen=True)
class Precision:
    """Reconstruction of n chunks of H actions. ``rows`` and ``codebooks`` are what the tables show.

    FAST counts as one codebook, of the tokens that were a choice: what fills up behind the end is none.
    """

    mse: float  # of normalised actions, over all dimensions and steps
    variance: float  # of the normalised actions: the error of always answering their mean
    rows: list[dict[str, Any]]  # a dimension: name, unit, rmse, mean_abs, p95, max (physical units)
    codebooks: list[dict[str, float]]  # a codebook: use (fraction of its codes), perplexity
    tokens: float  # of a chunk, on average
    chunk: int  # H
    action: Float[np.ndarray, "nH A"]  # physical units
    decoded: Float[np.ndarray, "nH A"]  # physical units, clipped to the legal box as when acting
    codes: list[Int[np.ndarray, " m"]]  # of each codebook, those written
    num_codes: int


def precision(
    model: Tokenizer,
    statistics: Statistics,
    metadata: Mapping[str, Any],
    actions: Float[np.ndarray, "n HA"],
) -> Precision:
    """Passes chunks of actions (the environment's own numbers) through the tokenizer.

    Decoded actions are clipped to the demonstrations' range, as the policy's are. ``statistics`` are those of single
    actions, ``metadata`` the dataset's: action_names, action_units and action_scale.
    """
    chunk, dims = model.config.chunk, model.config.action_dim
    stacked = statistics.chunked(chunk).normalize_action(actions)
    restored, codes = training.reconstruct(model, np.asarray(stacked, np.float32))
    written = _written(model, codes)
    # From here on a chunk is so many single actions.
    actions, normalized, restored = (x.reshape(-1, dims) for x in (actions, stacked, restored))
    scale = np.array(metadata["action_scale"], np.float32)
    decoded = np.asarray(statistics.unnormalize_action(np.clip(restored, -1, 1))) * scale
    error = np.abs(decoded - actions * scale)
    rows = [
        {
            "name": name,
            "unit": unit,
            "rmse": float(np.sqrt(np.mean(e**2))),
            "mean_abs": float(e.mean()),
            "p95": float(np.quantile(e, 0.95)),
            "max": float(e.max()),
        }
        for name, unit, e in zip(
            metadata["action_names"], metadata["action_units"], error.T, strict=True
        )
    ]
    used = [jax.device_get(usage(jnp.asarray(one)[:, None], model.config.codes)) for one in written]
    return Precision(
        mse=float(np.mean((restored - normalized) ** 2)),
        variance=float(np.mean(normalized.var(axis=0))),
        rows=rows,
        codebooks=[
            {"use": float(use[0]), "perplexity": float(perplexity[0])} for use, perplexity in used
        ],
        tokens=sum(map(len, written)) / len(codes),
        chunk=chunk,
        action=actions * scale,
        decoded=decoded,
        codes=written,
        num_codes=model.config.codes,
    )


def _written(model: Tokenizer, codes: Int[np.ndarray, "n M"]) -> list[Int[np.ndarray, " m"]]:
    """Returns the codes written with each codebook."""
    if isinstance(model, FastTokenizer):
        return [codes[np.asarray(model.room(jnp.asarray(codes)))[:, :-1] > 0]]
    return list(codes.T)


def score(
    model: Tokenizer,
    statistics: Statistics,
    metadata: Mapping[str, Any],
    actions: Float[np.ndarray, "n HA"],
) -> dict[str, float]:
    """The scalars of ``precision``, named for a log: ``mse``, ``rmse_dx_m``, ``use_0``, ..."""
    found = precision(model, statistics, metadata, actions)
    scalars = {"mse": found.mse}
    scalars |= {f"rmse_{row['name']}_{row['unit']}": row["rmse"] for row in found.rows}
    for q, book in enumerate(found.codebooks):
        scalars |= {f"{name}_{q}": value for name, value in book.items()}
    return scalars


def as_table(found: Precision) -> str:
    """The table as text."""
    lines = [f"{'action':<12}{'unit':<8}{'rmse':>10}{'mean abs':>10}{'p95':>10}{'max':>10}"]
    for row in found.rows:
        numbers = "".join(f"{row[key]:>10.2g}" for key in ("rmse", "mean_abs", "p95", "max"))
        lines.append(f"{row['name']:<12}{row['unit']:<8}{numbers}")
    lines.append(f"MSE {found.mse:.2g} of normalised actions (variance {found.variance:.2g}); ")
    lines[-1] += "; ".join(
        f"codebook {q}: {book['use']:.0%} of the codes used, perplexity {book['perplexity']:.0f}"
        for q, book in enumerate(found.codebooks)
    )
    if found.chunk > 1:
        lines[-1] += f"; {found.tokens:.1f} tokens for {found.chunk} actions"
    return "\n".join(lines)


def write_precision(found: Precision, out: Path) -> None:
    """Writes precision.csv, precision.json and precision.png; each appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        partial = Path(scratch)
        write_csv(partial / "precision.csv", found.rows)
        summary = {
            "mse": found.mse,
            "variance": found.variance,
            "actions": len(found.action),  # each counted in every chunk that it is part of
            "chunk": found.chunk,
            "tokens": found.tokens,
            "dimensions": found.rows,
            "codebooks": found.codebooks,
        }
        (partial / "precision.json").write_text(json.dumps(summary, indent=1))
        _plot(found, partial / "precision.png")
        for file in partial.iterdir():
            os.replace(file, out / file.name)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _plot(found: Precision, path: Path) -> None:
    """Per dimension: decoded against original, and the errors; below, how often each code is used."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dims, books = len(found.rows), len(found.codes)
    columns = max(dims, books)
    figure, axes = plt.subplots(3, columns, figsize=(3.2 * columns, 8.4), squeeze=False)
    shown = np.random.default_rng(0).permutation(len(found.action))[:4000]
    for d, row in enumerate(found.rows):
        x, y = found.action[:, d], found.decoded[:, d]
        label = f"{row['name']} ({row['unit']})"
        axes[0, d].plot([x.min(), x.max()], [x.min(), x.max()], color="0.7", lw=1)
        axes[0, d].scatter(x[shown], y[shown], s=3, alpha=0.3, lw=0, color="tab:blue")
        axes[0, d].set(title=label, xlabel="expert's action", ylabel="decoded" if d == 0 else "")
        axes[0, d].locator_params(axis="x", nbins=3)
        axes[1, d].hist(y - x, bins=101, color="tab:blue")
        axes[1, d].axvline(row["p95"], color="tab:orange", lw=1, label="95 % within")
        axes[1, d].axvline(-row["p95"], color="tab:orange", lw=1)
        axes[1, d].set(yscale="log", xlabel="error", ylabel="actions" if d == 0 else "")
        axes[1, d].set_title(f"RMSE {row['rmse']:.2g} {row['unit']}", fontsize=10)
        axes[1, d].ticklabel_format(axis="x", scilimits=(-3, 3))
    axes[1, 0].legend(fontsize=8)
    for q, book in enumerate(found.codebooks):
        counts = np.sort(np.bincount(found.codes[q], minlength=found.num_codes))[::-1]
        axes[2, q].bar(
            np.arange(found.num_codes), counts / counts.sum(), width=1, color="tab:green"
        )
        title = f"codebook {q + 1}: {book['use']:.0%} used, perplexity {book['perplexity']:.0f}"
        axes[2, q].set_title(title, fontsize=10)
        axes[2, q].set(xlabel="codes, by use", ylabel="share of tokens" if q == 0 else "")
        axes[2, q].set_yscale("log")
    for row_axes, used in zip(axes, (dims, dims, books), strict=True):
        for axis in row_axes[used:]:
            axis.axis("off")
    figure.suptitle(
        f"Action tokenizer, {books} x {found.num_codes} codes: MSE {found.mse:.2g} of normalised "
        f"actions (variance {found.variance:.2g}) over {len(found.action)} unseen actions",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
