"""The report: by the command line, as data, and as a browser shows it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
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


def artifact_with_load(tmp_path: Path, **changes: object) -> Path:
    """The report of an artifact folder with a run and a load test."""
    home = tmp_path / "net"
    for name in ("benchmarks", "loads"):
        (home / name).mkdir(parents=True)
    (home / "manifest.json").write_text("{}")
    saved(home / "benchmarks", runs.run())
    (home / "loads/damaged.json").write_text("{}")
    (home / "loads/1.json").write_text(json.dumps(asdict(runs.load(**changes))))
    assert run("report", home) == 0
    return home / "report"


def test_what_serving_adds_to_the_engines_time(tmp_path: Path) -> None:
    folder = artifact_with_load(tmp_path)
    served = json.loads((folder / "report.json").read_bytes())["runs"][0]["served"]
    alone = served["levels"][0]
    assert alone["rungs_ms"] == {"queue": 5.0, "compute input": 0.6, "compute": 12.0, "compute output": 0.4,
                                 "the way there and back": 2.5}
    assert alone["p50_ms"] == pytest.approx(sum(alone["rungs_ms"].values()))
    said = re.search(r"a lone client gets an answer in 20\.5 ms over grpc, the engine in process 16\.\d+ ms \(ONNX "
                     r"Runtime fp32", served["summary"])
    assert said, served["summary"]
    for name in ("index.html", "report.md"):
        text = unescape((folder / name).read_text("utf-8"))
        assert said[0] in text and "The way there and back" in text
    assert "A request to the server, http" in (folder / "index.html").read_text("utf-8")


def test_a_served_engine_that_was_not_measured_in_process_is_compared_with_none(tmp_path: Path) -> None:
    folder = artifact_with_load(tmp_path, engine_sha256="ef" * 32)
    served = json.loads((folder / "report.json").read_bytes())["runs"][0]["served"]
    assert "over grpc. Means in ms" in served["summary"]


def test_a_load_test_of_another_model_is_left_out(tmp_path: Path) -> None:
    folder = artifact_with_load(tmp_path, model_sha256="ef" * 32)
    assert json.loads((folder / "report.json").read_bytes())["runs"][0]["served"] is None
    assert "A request to the server" not in (folder / "index.html").read_text("utf-8")


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


def unusual() -> tuple[record.Series, ...]:
    """What record.read takes, and no benchmark of a day measures."""
    return (runs.series(rounds_ns=((7,),), wall_ns=(), load=(), burn_in_ns=(), relative_l2=0.0),  # one sample
            runs.series("tensorflow", rounds_ns=((), (9, 9)), wall_ns=(9, 18), relative_l2=None),  # stopped
            runs.series("openvino", "int4", rounds_ns=((10**15, 1), (3,)), relative_l2=1e30, flops=0),
            runs.series("unheard of", "int8", rounds_ns=((5,), (5,)), relative_l2=-1.0, min_bytes=0),
            runs.series("tensorrt", rounds_ns=((5, 5),) * 3, device_ns={"compute": ((),)},
                        gpu=({"throttle_reasons": 1},)),
            runs.series("openvino", rounds_ns=((5, 5),) * 3, concurrency=3, wall_ns=()))


@pytest.mark.parametrize("found", [unusual(), *((one,) for one in unusual()), unusual()[:2], unusual()[1:4]])
def test_an_unusual_run_is_reported(found: tuple[record.Series, ...], tmp_path: Path) -> None:
    one = runs.run(found, limits=(), bandwidth_bytes_per_second=0.0)
    folder = reported(tmp_path, one, options=("--baseline", saved(tmp_path, one)))
    text = (folder / "report.json").read_text("utf-8")
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", text))
    assert len(json.loads(text)["runs"][0]["configurations"]) == len(found)


def test_the_page_names_no_other_place(tmp_path: Path) -> None:
    page = (reported(tmp_path, runs.run(), options=("--published",)) / "index.html").read_text("utf-8")
    own = re.sub(r"<script>/\*\*\n\* plotly.js.*?</script>", "", page, flags=re.DOTALL)
    assert len(own) < len(page) / 10
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|src=|<link|<a ", own)
    assert page.count("plotly.js v") == 1  # the library is in it once


# --- in a browser ------------------------------------------------------------------------------------------------

PROBE = """<script>
const broken = [];
addEventListener("error", event => broken.push(event.message));
addEventListener("securitypolicyviolation", event => broken.push(event.blockedURI));
addEventListener("load", () => setTimeout(() => parent.postMessage(JSON.stringify({
    broken, width: innerWidth, loaded: performance.getEntriesByType("resource").length, title: document.title,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    figures: document.querySelectorAll("figure").length, scripts: document.querySelectorAll("script").length,
    drawn: [...document.querySelectorAll("figure")]
        .filter(figure => figure.querySelector(".main-svg :is(.box, .point, .js-line)")).length,
    background: getComputedStyle(document.body).backgroundColor,
    tick: getComputedStyle(document.querySelector(".xtick text") ?? document.body).fill,
    headings: [...document.querySelectorAll("h1, h2")].map(h => h.textContent)}), "*"), 1500));
</script>"""
FRAME = """<iframe style="border: 0; width: {}px; height: 900px" src="probed.html"></iframe>
<script>addEventListener("message", event => document.body.replaceChildren(event.data));</script>"""


def shown(page: Path, width: int = 1400, dark: bool = False) -> dict[str, Any]:
    """What the probe saw in a frame of this width, once the page's scripts ran, with no network."""
    page.with_name("probed.html").write_text(page.read_text("utf-8").replace("<style>", PROBE + "<style>", 1), "utf-8")
    page.with_name("frame.html").write_text(FRAME.format(width), "utf-8")
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1500,1000",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
         "--virtual-time-budget=10000", f"--user-data-dir={page.parent / 'profile'}", "--dump-dom",
         page.with_name("frame.html").as_uri()],
        capture_output=True, text=True, check=True, timeout=120)
    seen = re.search(r"<body>(\{.*\})</body>", done.stdout, re.DOTALL)
    assert seen is not None, done.stdout
    found: dict[str, Any] = json.loads(unescape(seen[1]))
    assert found["broken"] == []
    return found


def brightness(colour: str) -> int:
    return sum(int(n) for n in re.findall(r"\d+", colour)[:3])


@browser
@pytest.mark.parametrize("width", [390, 1400])
def test_every_figure_is_drawn_and_nothing_overflows(width: int, tmp_path: Path) -> None:
    many = runs.run(runs.every_engine(batches=(1, 8), concurrency=(1, 2)))
    seen = shown(reported(tmp_path, many, runs.on_gpu(), options=("--published",)) / "index.html", width)
    # of the first: a front, samples and burn-in of four, batches, two of processes; of the second: 1 + 2 and a ladder
    assert seen["drawn"] == seen["figures"] == 12 + 4
    assert seen["width"] == width
    assert seen["overflow"] <= 0
    assert seen["loaded"] == 0  # not one further file


@browser
def test_the_figures_of_a_load_test_are_drawn(tmp_path: Path) -> None:
    seen = shown(artifact_with_load(tmp_path) / "index.html", 390)
    assert seen["drawn"] == seen["figures"] == 3 + 2  # a front, samples and burn-in; a request by gRPC and by HTTP
    assert seen["overflow"] <= 0


@browser
def test_dark_and_light(tmp_path: Path) -> None:
    """The page, and the text inside of its figures."""
    page = reported(tmp_path, runs.run()) / "index.html"
    light, dark = (shown(page, dark=dark) for dark in (False, True))
    assert brightness(light["background"]) > 600 > 200 > brightness(dark["background"])
    assert brightness(light["tick"]) < 200 < 600 < brightness(dark["tick"])


@browser
def test_text_of_a_run_is_text(tmp_path: Path) -> None:
    plain = shown(reported(tmp_path, runs.run([runs.series()])) / "index.html")
    one = runs.series(runtime=EVIL, precision=EVIL, engine=EVIL, status="failed", reason=EVIL)
    measured = runs.series(runtime=EVIL, precision=EVIL, engine=EVIL)
    run = runs.run([measured, one], model=EVIL, command=EVIL,
                   environment=runs.environment(host=EVIL, cpu=EVIL, versions={EVIL: EVIL}, gpu={EVIL: EVIL}))
    seen = shown(reported(tmp_path, run) / "index.html")
    assert seen["scripts"] == plain["scripts"]
    assert seen["title"] == seen["headings"][0] == f"Benchmark of {EVIL}"
    assert "<script" not in (tmp_path / "report" / "report.md").read_text("utf-8")
