"""The report page, and what ``inspect`` shows, of a run with an evaluation and videos."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from mllm_act import inspect, report
from mllm_act.envs import Job
from mllm_act.envs.play import Episode
from mllm_act.envs.results import summarize
from mllm_act.errors import UserError
from mllm_act.evaluate import write_results
from mllm_act.reporting.page import write_page
from mllm_act.reporting.paper import PAPER, paper_success
from mllm_act.reporting.svg import lines
from tests.serving.conftest import workdir  # noqa: F401 (a fixture)


class Outline(HTMLParser):
    """Collects what the page is made of, and checks that every element is closed."""

    VOID = ("meta", "line", "rect", "polyline", "text", "title")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert self.open == []

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def run(workdir: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A copy of the untrained run, with curves and the results of an evaluation."""
    folder = tmp_path / "rvq <run>"
    shutil.copytree(workdir, folder)
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "train/loss": 4 / step, "val/loss": 5 / step, "time/step_ms": 10.0,
                        "time/data_wait_ms": 1.0, "time/samples_per_second": 200.0}) + "\n"
            for step in (10, 20, 30)
        )
    )  # fmt: skip
    out = folder / "evaluation" / "metaworld" / "test"
    (out / "videos").mkdir(parents=True)
    iio.imwrite(
        out / "videos" / "assembly-v3.mp4",
        np.zeros((4, 16, 16, 3), np.uint8),
        fps=10,
        codec="libx264",
    )
    episodes = [Episode(Job("assembly-v3", i, 0), steps=3, success=i > 0) for i in range(4)]
    rows = summarize(episodes)
    write_results(out, episodes, rows, {"adapter": "uniform", "step": 0, "tasks": rows})
    return folder


@pytest.mark.slow
def test_the_page_holds_everything_and_loads_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    out = tmp_path / "report.html"
    monkeypatch.setattr(sys, "argv", ["report", f"--out={out}", str(run), f"again={other}"])
    report.main()
    page = out.read_text()
    outline = Outline(page)
    assert "rvq &lt;run&gt;" in page and "<run>" not in page
    assert (
        "75%" in page and "30% to 95% of 4" in page and ">60 %<" in page
    )  # the paper's, uniform, assembly
    for tag in ("script", "link", "img", "iframe"):
        assert outline.all(tag) == []
    assert "http" not in page
    videos = outline.all("video")
    assert len(videos) == 2
    assert all("controls" in video and video["aria-label"] for video in videos)
    assert all((video["src"] or "").startswith("data:video/mp4;base64,") for video in videos)
    assert outline.all("html")[0]["lang"] == "en" and outline.all("meta")[1]["name"] == "viewport"
    assert len(outline.all("h1")) == 1 and len(outline.all("main")) == 1
    anchors = {heading["id"] for heading in outline.all("h2")}
    assert {(link["href"] or "")[1:] for link in outline.all("a")} == anchors | {"main"}
    assert all(th["scope"] in ("row", "col") for th in outline.all("th"))
    for picture in outline.all("svg"):
        assert picture.get("aria-hidden") == "true" or picture["aria-label"]
    assert "90.0%" in page  # of the time not waiting for data
    monkeypatch.setattr(sys, "argv", ["report", f"--out={out}", str(run), f"{run.name}={other}"])
    with pytest.raises(UserError, match="two that are called rvq <run>; use NAME=RUN"):
        report.main()
    with pytest.raises(UserError, match="checkpoint"):
        write_page(out, {"none": tmp_path})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_a_browser_shows_the_page_on_a_phone(run: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", {"a": run, "b": run})
    picture = tmp_path / "phone.png"
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=390,1200",
    ]
    subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", f"file://{tmp_path}/report.html"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pixels = iio.imread(picture)[..., :3]
    assert pixels.shape == (1200, 390, 3)
    colors = np.unique(pixels.reshape(-1, 3), axis=0)
    assert [255, 255, 255] in colors.tolist() and len(colors) > 100  # text, bars and curves
    filled = np.abs(pixels.astype(int) - [0x5B, 0x8F, 0xD9]).max(axis=2) < 3
    assert filled.sum() > 100, "the bars of success"


def test_contrast_of_the_themes() -> None:
    """Text and curves against the page: at least 4.5 (WCAG 2.1, AA) in both themes."""
    import re

    style = (Path(report.__file__).parent / "reporting" / "style.css").read_text()

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    themes = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colors = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        for name in ("text", "quiet", *(f"line-{i}" for i in range(6))):
            light, dark = sorted((luminance(colors[name]), luminance(colors["page"])))[::-1]
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_the_papers_numbers() -> None:
    """The means are those that the paper prints: 84, 61, 58 and 75."""
    means = {
        adapter: sum(tasks.values()) / len(tasks) for adapter, tasks in PAPER["metaworld"].items()
    }
    assert {k: round(v) for k, v in means.items()} == {
        "rvq": 84,
        "regression": 61,
        "vq": 58,
        "uniform": 75,
    }
    assert paper_success("metaworld", "rvq", "assembly-v3") == 100
    assert paper_success("babyai", "rvq", "goto") is None


def test_curves_leave_out_what_cannot_be_drawn() -> None:
    assert lines("loss", {"a": ([1, 2], [float("nan"), 0.0])}, log=True) == ""
    assert "nan" not in lines("loss", {"a": ([1, 2, 3], [1.0, float("inf"), 2.0])})


@pytest.mark.slow
def test_inspect_shows_a_run(run: Path) -> None:
    text = inspect.describe(run)
    for expected in (
        "step 0; steps kept: 0", "model: preset tiny", "tiny: adapter uniform (bins 16", "context 3, chunk 4",
        "cameras corner4 16 x 16; 3 numbers", "parameters: 1,", "dx                        m     0.01",
        "evaluated at step 0 in metaworld, test: 75% (30% to 95%) of 4 episodes", "train/loss 0.1333",
    ):  # fmt: skip
        assert expected in text, text
    assert len(text.splitlines()) < 40
    with pytest.raises(UserError, match="checkpoint"):
        inspect.describe(run / "evaluation")
