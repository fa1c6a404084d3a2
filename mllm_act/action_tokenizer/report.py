"""The precision of a tokenizer on unseen actions: errors in physical units, and the use of its codes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mllm_act.action_tokenizer import Tokenizer, training
from mllm_act.action_tokenizer.fast import FastTokenizer
from mllm_act.action_tokenizer.quantizer import usage
from mllm_act.files import whole_file, write_csv, write_json
from mllm_act.normalization import Statistics


@dataclasses.dataclass(frozen=True)
class Precision:
    """Reconstruction of n chunks of H actions; ``rows`` and ``codebooks`` are the rows of the printed tables.

    FAST counts as one codebook; padding after a chunk's END is not counted.

    Attributes:
      mse: of normalised actions as they are encoded, over all dimensions and steps.
      variance: of the normalised actions: the MSE of always predicting their mean.
      rows: for each dimension: name, unit, and rmse, mean_abs, p95, max in physical units.
      codebooks: for each codebook: use (the fraction of its codes), perplexity.
      tokens: the mean number of tokens per chunk.
      chunk: H.
      action: in physical units.
      decoded: in physical units, as a policy decodes.
      codes: the codes chosen from each codebook.
      num_codes: K.
    """

    mse: float
    variance: float
    rows: list[dict[str, Any]]
    codebooks: list[dict[str, float]]
    tokens: float
    chunk: int
    action: Float[np.ndarray, "nH A"]
    decoded: Float[np.ndarray, "nH A"]
    codes: list[Int[np.ndarray, " m"]]
    num_codes: int


def measure_precision(
    tokenizer: Tokenizer,
    statistics: Statistics,
    metadata: Mapping[str, Any],
    actions: Float[np.ndarray, "n HA"],
) -> Precision:
    """Encodes and decodes chunks of actions as a policy does, and compares.

    Args:
      tokenizer: the tokenizer.
      statistics: of single actions.
      metadata: the dataset's; its action_names, action_units and action_scale are used.
      actions: in the environment's own numbers.
    """
    chunk, dims = tokenizer.config.chunk, tokenizer.config.action_dim
    normalized = statistics.chunked(chunk).normalize_for_codes(actions)
    restored, codes = training.reconstruct(tokenizer, np.asarray(normalized, np.float32))
    used_codes = _used_codes(tokenizer, codes)
    # From here on, single actions.
    actions, normalized, restored = (x.reshape(-1, dims) for x in (actions, normalized, restored))
    scale = np.array(metadata["action_scale"], np.float32)
    decoded = np.asarray(statistics.unnormalize_codes(restored)) * scale
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
    usages = [
        jax.device_get(usage(jnp.asarray(book)[:, None], tokenizer.config.codes))
        for book in used_codes
    ]
    return Precision(
        mse=float(np.mean((restored - normalized) ** 2)),
        variance=float(np.mean(normalized.var(axis=0))),
        rows=rows,
        codebooks=[
            {"use": float(use[0]), "perplexity": float(perplexity[0])} for use, perplexity in usages
        ],
        tokens=sum(map(len, used_codes)) / len(codes),
        chunk=chunk,
        action=actions * scale,
        decoded=decoded,
        codes=used_codes,
        num_codes=tokenizer.config.codes,
    )


def _used_codes(tokenizer: Tokenizer, codes: Int[np.ndarray, "n M"]) -> list[Int[np.ndarray, " m"]]:
    """Returns the codes of each codebook, without padding."""
    if isinstance(tokenizer, FastTokenizer):
        return [codes[np.asarray(tokenizer.room(jnp.asarray(codes)))[:, :-1] > 0]]
    return list(codes.T)


def score(
    tokenizer: Tokenizer,
    statistics: Statistics,
    metadata: Mapping[str, Any],
    actions: Float[np.ndarray, "n HA"],
) -> dict[str, float]:
    """Returns the precision as scalars for a log: ``mse``, ``rmse_dx_m``, ``use_0``, ..."""
    precision = measure_precision(tokenizer, statistics, metadata, actions)
    scalars = {"mse": precision.mse}
    scalars |= {f"rmse_{row['name']}_{row['unit']}": row["rmse"] for row in precision.rows}
    for q, book in enumerate(precision.codebooks):
        scalars |= {f"{name}_{q}": value for name, value in book.items()}
    return scalars


def as_table(precision: Precision) -> str:
    """Returns the precision as a table."""
    lines = [f"{'action':<12}{'unit':<8}{'rmse':>10}{'mean abs':>10}{'p95':>10}{'max':>10}"]
    for row in precision.rows:
        numbers = "".join(f"{row[key]:>10.2g}" for key in ("rmse", "mean_abs", "p95", "max"))
        lines.append(f"{row['name']:<12}{row['unit']:<8}{numbers}")
    lines.append(
        f"MSE {precision.mse:.2g} of normalised actions (variance {precision.variance:.2g}); "
    )
    lines[-1] += "; ".join(
        f"codebook {q}: {book['use']:.0%} of the codes used, perplexity {book['perplexity']:.0f}"
        for q, book in enumerate(precision.codebooks)
    )
    if precision.chunk > 1:
        lines[-1] += f"; {precision.tokens:.1f} tokens for {precision.chunk} actions"
    return "\n".join(lines)


def write_precision(precision: Precision, out: Path) -> None:
    """Writes precision.csv, precision.json and precision.png, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "precision.csv", precision.rows)
    summary = {
        "mse": precision.mse,
        "variance": precision.variance,
        "actions": len(precision.action),  # an action counts once in every chunk that contains it
        "chunk": precision.chunk,
        "tokens": precision.tokens,
        "dimensions": precision.rows,
        "codebooks": precision.codebooks,
    }
    write_json(out / "precision.json", summary)
    with whole_file(out / "precision.png") as partial:
        _plot(precision, partial)


def _plot(precision: Precision, path: Path) -> None:
    """Plots decoded against original actions and the errors of each dimension, and the use of each code."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    dims, books = len(precision.rows), len(precision.codes)
    columns = max(dims, books)
    figure, axes = plt.subplots(3, columns, figsize=(3.2 * columns, 8.4), squeeze=False)
    shown = np.random.default_rng(0).permutation(len(precision.action))[:4000]
    for d, row in enumerate(precision.rows):
        x, y = precision.action[:, d], precision.decoded[:, d]
        label = f"{row['name']} ({row['unit']})"
        axes[0, d].plot([x.min(), x.max()], [x.min(), x.max()], color="0.7", lw=1)
        axes[0, d].scatter(x[shown], y[shown], s=3, alpha=0.3, lw=0, color="tab:blue")
        axes[0, d].set(title=label, xlabel="expert's action", ylabel="decoded" if d == 0 else "")
        axes[0, d].locator_params(axis="x", nbins=3)
        axes[1, d].hist(y - x, bins=101, color="tab:blue")
        axes[1, d].axvline(row["p95"], color="tab:orange", lw=1, label="95 % within")
        axes[1, d].axvline(-row["p95"], color="tab:orange", lw=1)
        axes[1, d].set(yscale="log", xlabel="error", ylabel="actions" if d == 0 else "")
        axes[1, d].set_ylim(bottom=0.5)
        axes[1, d].yaxis.set_minor_formatter(NullFormatter())
        axes[1, d].set_title(f"RMSE {row['rmse']:.2g} {row['unit']}", fontsize=10)
        axes[1, d].ticklabel_format(axis="x", scilimits=(-3, 3))
    axes[1, 0].legend(fontsize=8)
    for q, book in enumerate(precision.codebooks):
        counts = np.sort(np.bincount(precision.codes[q], minlength=precision.num_codes))[::-1]
        axes[2, q].bar(
            np.arange(precision.num_codes), counts / counts.sum(), width=1, color="tab:green"
        )
        title = f"codebook {q + 1}: {book['use']:.0%} used, perplexity {book['perplexity']:.0f}"
        axes[2, q].set_title(title, fontsize=10)
        axes[2, q].set(xlabel="codes, by use", ylabel="share of tokens" if q == 0 else "")
        axes[2, q].set(yscale="log", ylim=(0.5 / counts.sum(), 1))
        axes[2, q].yaxis.set_minor_formatter(NullFormatter())
    for row_axes, count in zip(axes, (dims, dims, books), strict=True):
        for axis in row_axes[count:]:
            axis.axis("off")
    figure.suptitle(
        f"Action tokenizer, {books} x {precision.num_codes} codes: MSE {precision.mse:.2g} of normalised "
        f"actions (variance {precision.variance:.2g}) over {len(precision.action)} unseen actions",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
