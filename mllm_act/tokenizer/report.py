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

from mllm_act.normalization import Statistics
from mllm_act.tokenizer import training
from mllm_act.tokenizer.autoencoder import ActionTokenizer
from mllm_act.tokenizer.quantizer import usage


@dataclasses.dataclass(frozen=True)
class Precision:
    """Reconstruction of n actions. ``rows`` and ``codebooks`` are what the tables show."""

    mse: float  # of normalised actions, over all dimensions
    variance: float  # of the normalised actions: the error of always answering their mean
    rows: list[dict[str, Any]]  # a dimension: name, unit, rmse, mean_abs, p95, max (physical units)
    codebooks: list[dict[str, float]]  # a codebook: use (fraction of its codes), perplexity
    action: Float[np.ndarray, "n A"]  # physical units
    decoded: Float[np.ndarray, "n A"]  # physical units, clipped to the legal box as when acting
    codes: Int[np.ndarray, "n Q"]
    num_codes: int


def precision(
    model: ActionTokenizer,
    statistics: Statistics,
    metadata: Mapping[str, Any],
    actions: Float[np.ndarray, "n A"],
) -> Precision:
    """Passes actions (the environment's own numbers) through the tokenizer.

    Decoded actions are clipped to the demonstrations' range, as the policy's are. ``metadata`` is the dataset's:
    action_names, action_units and action_scale.
    """
    normalized = np.asarray(statistics.normalize_action(actions), np.float32)
    restored, codes = training.reconstruct(model, normalized)
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
    use, perplexity = jax.device_get(usage(jnp.asarray(codes), model.config.codes))
    return Precision(
        mse=float(np.mean((restored - normalized) ** 2)),
        variance=float(np.mean(normalized.var(axis=0))),
        rows=rows,
        codebooks=[
            {"use": float(u), "perplexity": float(p)} for u, p in zip(use, perplexity, strict=True)
        ],
        action=actions * scale,
        decoded=decoded,
        codes=codes,
        num_codes=model.config.codes,
    )


def score(
    model: ActionTokenizer,
    statistics: Statistics,
    metadata: Mapping[str, Any],
    actions: Float[np.ndarray, "n A"],
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
            "actions": len(found.action),
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

    dims, books = len(found.rows), found.codes.shape[-1]
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
        counts = np.sort(np.bincount(found.codes[:, q], minlength=found.num_codes))[::-1]
        axes[2, q].bar(
            np.arange(found.num_codes), counts / counts.sum(), width=1, color="tab:green"
        )
        title = f"codebook {q + 1}: {book['use']:.0%} used, perplexity {book['perplexity']:.0f}"
        axes[2, q].set_title(title, fontsize=10)
        axes[2, q].set(xlabel="codes, by use", ylabel="share of actions" if q == 0 else "")
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
