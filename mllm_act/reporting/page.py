"""The report page: one HTML file that holds everything, videos included, and loads nothing."""

import base64
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_act import __version__
from mllm_act.checkpoints.checkpoint import find, read_meta
from mllm_act.files import whole_file
from mllm_act.reporting import svg
from mllm_act.reporting.paper import paper_success

VIDEO_BYTES = 24 * 2**20  # of all videos in a page
STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


class RunPage:
    """What the page needs of a run: its checkpoint's JSON document, and all that lies beside it."""

    def __init__(self, name: str, workdir: Path) -> None:
        """Reads the newest checkpoint's JSON document and the metrics.

        Raises:
          UserError: there is no whole checkpoint.
        """
        self.name, (self.workdir, self.step) = name, find(workdir)
        self.meta = read_meta(self.workdir, self.step)
        path = self.workdir / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        self.metrics = [json.loads(line) for line in text.splitlines()]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Returns steps and values of a scalar."""
        found = [line for line in self.metrics if key in line]
        return [line["step"] for line in found], [float(line[key]) for line in found]

    def evaluations(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Returns (environment, split) -> summary."""
        return {
            (path.parent.parent.name, path.parent.name): json.loads(path.read_text())
            for path in sorted(self.workdir.glob("evaluation/*/*/summary.json"))
        }


def write_page(out: Path, runs: Mapping[str, Path]) -> None:
    """Writes the page of several runs.

    Args:
      out: the file.
      runs: name -> folder.

    Raises:
      UserError: one of them has no whole checkpoint.
    """
    pages = [RunPage(name, workdir) for name, workdir in runs.items()]
    sections = {
        "Runs": _overview(pages),
        "Success": _success(pages),
        "Curves": _curves(pages),
        "Action tokenizers": _precision(pages),
        "Speed": _speed(pages),
        "Videos": _videos(pages),
        "Differences between the configs": _differences(pages),
    }
    body, links = [], []
    for title, parts in sections.items():
        content = "".join(parts)
        if content:
            anchor = re.sub(r"\W+", "-", title.lower())
            links.append(f'<a href="#{anchor}">{title}</a>')
            body.append(
                f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{title}</h2>{content}</section>'
            )
    title = "Report: " + ", ".join(runs)
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{_e(title)}</title><style>{STYLE}</style></head>'
        f'<body><a class="skip" href="#main">Skip to the content</a><header><h1>{_e(title)}</h1>'
        f'<nav aria-label="Sections">{"".join(links)}</nav></header><main id="main">{"".join(body)}</main>'
        f"<footer>Made by mllm_act {__version__}.</footer></body></html>\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as partial:
        partial.write_text(page, encoding="utf-8")


def _e(value: Any) -> str:
    return html.escape(str(value))


def _table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table whose cells are HTML; the first of each row is its header."""
    head = "".join(f'<th scope="col">{_e(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{_e(caption)}" tabindex="0"><table><caption>{_e(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _overview(pages: Sequence[RunPage]) -> Iterator[str]:
    def row(page: RunPage) -> list[str]:
        made, network = page.meta.get("provenance", {}), page.meta.get("network", {})
        adapters = {part["adapter"] for part in network.get("embodiments", {}).values()}
        return [
            _e(page.name), _e(page.step), _e(network.get("preset", "")), _e(", ".join(sorted(adapters))),
            _e(", ".join(network.get("embodiments", {}))), _e((made.get("git_commit") or "unknown")[:10]),
            _e(made.get("devices", "")), f"<code>{_e(page.workdir)}</code>",
        ]  # fmt: skip

    header = ("run", "step", "preset", "adapter", "embodiments", "commit", "device", "folder")
    yield _table("The runs and their newest checkpoints", header, map(row, pages))


def _success(pages: Sequence[RunPage]) -> Iterator[str]:
    found = {page.name: page.evaluations() for page in pages}
    for env, split in sorted({key for one in found.values() for key in one}):
        summaries = {name: one[env, split] for name, one in found.items() if (env, split) in one}
        papers = {
            adapter: summary["adapter"]
            for adapter, summary in summaries.items()
            if "adapter" in summary
        }
        tasks = list(
            dict.fromkeys(row["task"] for one in summaries.values() for row in one["tasks"])
        )
        tasks.sort(key=lambda task: task == "mean")
        shown = [
            name
            for name, adapter in papers.items()
            if any(paper_success(env, adapter, task) is not None for task in tasks)
        ]

        def cells(
            task: str, summaries: Any = summaries, shown: Any = shown, env: str = env
        ) -> list[str]:
            row = [_e(task)]
            for name, summary in summaries.items():
                by_task = {one["task"]: one for one in summary["tasks"]}
                row.append(_rate(by_task[task]) if task in by_task else "")
                if name in shown:
                    rate = paper_success(env, summary["adapter"], task)
                    row.append("" if rate is None else f"{rate:.0f} %")
            return row

        header = ["task"]
        for name in summaries:
            header += [name, f"paper's {papers[name]}"] if name in shown else [name]
        caption = f"Success in {env}, split {split}; 95 % intervals"
        yield _table(caption, header, [cells(task) for task in tasks])
        if shown:
            yield (
                "<p>The paper's numbers (arXiv 2406.07904) are of LLaVA-1.5-7B trained on all tasks, ten episodes each "
                "in Meta-World.</p>"
            )


def _rate(row: Mapping[str, Any]) -> str:
    bar = svg.interval(row["low"], row["success"], row["high"])
    return (
        f"{bar}<span>{row['success']:.0%}</span> <small>{row['low']:.0%} to {row['high']:.0%} of "
        f"{row['episodes']}</small>"
    )


def _curves(pages: Sequence[RunPage]) -> Iterator[str]:
    keys = sorted({key for page in pages for line in page.metrics for key in line})
    chosen = [key for key in keys if re.fullmatch(r"(train|val)/(\w+/)?loss", key)]
    chosen += [key for key in keys if re.fullmatch(r"val/(\w+/)?(error_\w+|wrong_actions)", key)]
    chosen += [k for k in keys if re.fullmatch(r"rollout/(success|return)|evaluate/.*/success", k)]
    plots = [
        svg.lines(key, {page.name: page.series(key) for page in pages}, log=key.endswith("loss"))
        for key in chosen
    ]
    if any(plots):
        yield svg.legend([page.name for page in pages])
        yield f'<div class="plots">{"".join(plots)}</div>'


def _precision(pages: Sequence[RunPage]) -> Iterator[str]:
    for page in pages:
        tokenizer = page.meta.get("config", {}).get("tokenizer") or ""
        for folder in (
            page.workdir,
            Path(tokenizer) if isinstance(tokenizer, str) and tokenizer else page.workdir,
        ):
            path = folder / "precision.json"
            if path.is_file():
                yield _precision_table(page.name, json.loads(path.read_text()))
                break


def _precision_table(name: str, found: Mapping[str, Any]) -> str:
    rows = found["dimensions"]
    header = list(rows[0])
    body = [
        [_e(value if not isinstance(value, float) else f"{value:.4g}") for value in row.values()]
        for row in rows
    ]
    caption = f"{name}: error of decoding what was encoded, {found['actions']:,} held-out actions"
    return _table(caption, header, body)


def _speed(pages: Sequence[RunPage]) -> Iterator[str]:
    rows = []
    for page in pages:
        _, milliseconds = page.series("time/step_ms")
        if milliseconds:
            waits, samples = (
                page.series(f"time/{key}")[1] for key in ("data_wait_ms", "samples_per_second")
            )
            middle = sorted(milliseconds)[len(milliseconds) // 2]
            rows.append([
                _e(page.name), f"{middle:.4g}", f"{sum(samples) / len(samples):.4g}",
                f"{1 - sum(waits) / sum(milliseconds):.1%}",
            ])  # fmt: skip
    if rows:
        header = (
            "run",
            "median update, ms",
            "samples per second",
            "time not spent waiting for data",
        )
        yield _table("Training speed", header, rows)


def _videos(pages: Sequence[RunPage]) -> Iterator[str]:
    left = VIDEO_BYTES
    for page in pages:
        for path in sorted(page.workdir.glob("evaluation/*/*/videos/*.mp4")):
            size = path.stat().st_size
            if size > left:
                yield f"<p>{_e(path)} is not in this page, which would be too large.</p>"
                continue
            left -= size
            data = base64.b64encode(path.read_bytes()).decode()
            label = f"{page.name}: {path.stem}, split {path.parent.parent.name}"
            yield (
                f'<figure class="video"><video controls muted loop playsinline preload="metadata" '
                f'aria-label="{_e(label)}" src="data:video/mp4;base64,{data}"></video>'
                f"<figcaption>{_e(label)}</figcaption></figure>"
            )


def _differences(pages: Sequence[RunPage]) -> Iterator[str]:
    configs = [dict(_leaves(page.meta.get("config", {}))) for page in pages]
    keys = sorted({key for config in configs for key in config})
    different = [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]
    if len(pages) > 1 and different:
        rows = [
            [
                f"<code>{_e(key)}</code>",
                *(f"<code>{_e(config.get(key, ''))}</code>" for config in configs),
            ]
            for key in different
        ]
        yield _table("Keys whose values differ", ["key", *(page.name for page in pages)], rows)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
