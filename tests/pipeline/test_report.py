"""The report: by the command line, as data, and as a browser shows it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from pipeline import record
from pipeline.record import Run
from tests.pipeline import runs
from tests.pipeline.test_build_verify import failed, run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
EVIL = '<script>document.title="taken"</script>&"'


def saved(folder: Path, one: Run, name: str = "r.json") -> Path:
    record.write(one, folder / name)
    return folder / name


def reported(tmp_path: Path, *found: Run, options: tuple[object, ...] = (), code: int = 0) -> Path:
    paths = [saved(tmp_path, one, f"{i}.json") for i, one in enumerate(found)]
    assert run("report", *paths, "--out", tmp_path / "report", *options) == code
    return tmp_path / "report"


def test_the_files(tmp_path: Path) -> None:
    folder = reported(tmp_path, runs.run())
    assert {p.name for p in folder.iterdir()} == {"index.html", "report.md", "report.csv", "report.json"}
    rows = list(csv.DictReader((folder / "report.csv").read_text("utf-8").splitlines()))
    assert [(row["runtime"], row["precision"]) for row in rows] == [engine[:2] for engine in runs.ENGINES]
    said = (folder / "report.md").read_text("utf-8")
    assert re.search(r"answers in 7\.\d ms with ONNX Runtime int8, 3\.\d times as fast as TensorFlow", said)
    assert "n/a (needs 662 samples)" in said  # p99 of 100 samples
    assert "Was int8 worth it?" in said


def test_an_artifact_folder_stands_for_its_newest_complete_run(tmp_path: Path) -> None:
    folder = tmp_path / "net" / "benchmarks"
    folder.mkdir(parents=True)
    (tmp_path / "net" / "manifest.json").write_text("{}")
    for day, complete in ((1, True), (2, True), (3, False)):
        date = f"2026-03-0{day}T10:00:00+00:00"
        saved(folder, runs.run(run_id=f"day-{day}", environment=runs.environment(date=date), complete=complete),
              f"{day}.json")
    (folder / "4.json").write_text("damaged")
    assert run("report", tmp_path / "net") == 0
    assert "day-2" in (tmp_path / "net" / "report" / "report.json").read_text("utf-8")


def test_json_on_stdout_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reported(tmp_path, runs.run(), options=("--json",))
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))


@pytest.mark.parametrize(("arguments", "text"), [
    (("nowhere.json",), "benchmark run nowhere.json: No such file or directory"),
    (("{}/bad.json",), "not JSON; expected a file that benchmark wrote"),
    (("{}",), "0 in benchmarks, none complete"),
    (("{}/good.json", "--baseline", "{}/bad.json"), "not JSON"),
    (("{}/good.json", "--baseline", "{}/other.json"), "no configuration in common"),
])
def test_a_users_mistake_is_one_line(arguments: tuple[str, ...], text: str, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, runs.run(), "good.json")
    saved(tmp_path, runs.run(model="another"), "other.json")
    (tmp_path / "bad.json").write_text("{")
    told = [a.format(tmp_path) for a in arguments]
    assert text in failed(capsys, "report", *told, "--out", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_regression_ends_with_3_and_the_report_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = runs.run()
    slower = tuple(replace(s, rounds_ns=tuple(tuple(n * 5 // 4 for n in r) for r in s.rounds_ns))
                   if s.precision == "bf16" else s for s in before.series)
    saved(tmp_path, before, "before.json")
    now = saved(tmp_path, replace(before, series=slower), "now.json")
    options = ("--out", tmp_path / "report", "--baseline", tmp_path / "before.json")
    assert "OpenVINO bf16" in failed(capsys, "report", now, *options, code=3)
    assert "1.25 times as long" in (tmp_path / "report" / "report.md").read_text("utf-8")
    assert run("report", now, *options, "--tolerance", "0.3") == 0
    assert run("report", tmp_path / "before.json", *options) == 0


def test_published_figures_are_marked_as_such(tmp_path: Path) -> None:
    plain = (reported(tmp_path, runs.run()) / "report.md").read_text("utf-8")
    assert "GTX 1080" not in plain
    said = (reported(tmp_path, runs.run(), options=("--published",)) / "report.md").read_text("utf-8")
    assert "GTX 1080" in said
    for figure in ("0.026", "0.078", "0.007", "0.025", "0.152", "0.617", "0.145", "0.203"):
        assert figure in said


# --- in a browser ------------------------------------------------------------------------------------------------

def shown(page: Path, width: int = 1400, dark: bool = False) -> tuple[str, dict[str, Any]]:
    """The document after its scripts ran, with no network, and what the probe at its end saw."""
    probe = """<script>addEventListener("load", () => setTimeout(() => {
        const seen = {overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
                      width: innerWidth, plots: document.querySelectorAll(".js-plotly-plot .main-svg").length,
                      figures: document.querySelectorAll(".js-plotly-plot").length,
                      loaded: performance.getEntriesByType("resource").length, title: document.title,
                      background: getComputedStyle(document.body).backgroundColor};
        document.body.insertAdjacentHTML("beforeend", "<pre id=probe>" + JSON.stringify(seen) + "</pre>");
    }, 1500))</script>"""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text("utf-8").replace("</body>", probe + "</body>"), "utf-8")
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
         "--virtual-time-budget=10000", f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, check=True, timeout=120)
    seen = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert seen is not None
    return done.stdout, json.loads(unescape(seen[1]))


@browser
@pytest.mark.parametrize("width", [500, 1400])
def test_every_figure_is_drawn_and_nothing_overflows(width: int, tmp_path: Path) -> None:
    many = runs.run(runs.every_engine(batches=(1, 8), concurrency=(1, 2)))
    page = reported(tmp_path, many, runs.on_gpu()) / "index.html"
    _, seen = shown(page, width)
    assert seen["figures"] >= 8
    assert seen["plots"] >= seen["figures"]
    assert seen["width"] == width
    assert seen["overflow"] <= 0
    assert seen["loaded"] == 0  # not one further file


@browser
def test_dark_and_light(tmp_path: Path) -> None:
    page = reported(tmp_path, runs.run()) / "index.html"
    colours = {dark: shown(page, dark=dark)[1]["background"] for dark in (False, True)}
    light, dark = (sum(int(n) for n in re.findall(r"\d+", colours[name])[:3]) for name in (False, True))
    assert light > 600 > 200 > dark


@browser
def test_text_of_a_run_is_text(tmp_path: Path) -> None:
    one = runs.series(engine=EVIL, status="failed", reason=EVIL)
    page = reported(tmp_path, runs.run([runs.series(), one], model=EVIL, command=EVIL,
                                       environment=runs.environment(host=EVIL, cpu=EVIL))) / "index.html"
    _, seen = shown(page)
    assert seen["title"] != "taken"
