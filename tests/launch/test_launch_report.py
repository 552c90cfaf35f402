"""report.html: complete, escaped, and whole without a network."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tenko.launch.files import write_json_atomic
from tenko.launch.lottery_report import Series, png, tickets_figure
from tenko.launch.metrics import MetricsLog
from tenko.launch.plots import MAX_POINTS, curve, stage_plots
from tenko.launch.progress import Reporter, format_figures
from tenko.launch.recipe import load
from tenko.launch.report import write_report
from tenko.launch.rundir import RESULT, RunDirectory, RunLock
from tenko.launch.summary import stage_table

RESULT_TRAIN = {
    "stage": "train",
    "bleu": 14.25,
    "chrf": 40.5,
    "bleu_signature": "nrefs:1|tok:13a",
    "sentences": 1000,
    "tokens_per_second": 1234.5,
    "artefact_bytes": 7_400_000,
    "seconds": 361.2,
    "wire": {"bytes_sent": 8e8, "fp32_bytes": 72e8},
    "samples": [{"source": "a <script>x</script> & b", "reference": "č", "hypothesis": "d"}],
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run whose first stage has metrics and no result yet."""
    with RunLock(tmp_path / "r"):
        run = RunDirectory.create(tmp_path / "r", load("tiny"))
    log = MetricsLog(run.context(0, Reporter(enabled=False), writer=True, resume=False).metrics_path)
    for update in (2, 4):
        wire = {"wire_bytes": update * 100, "wire_fp32_bytes": update * 900}
        shares = {"share_compute": 0.7, "share_exchange": 0.25, "share_data": 0.05}
        line = {"update": update, "kind": "train", "loss": 5.0, "nll": 4.0, "tokens_per_second": 9.0}
        log.append({**line, **wire, **shares})
    log.append({"update": 4, "kind": "valid", "nll": 4.1, "bleu": 1.5})
    log.close()
    return run


class Outside(HTMLParser):
    """Collects what a browser would fetch, and the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]


def test_a_partial_run_has_curves_and_says_what_is_missing(run: RunDirectory) -> None:
    page = write_report(run).read_text()
    for text in (
        "No stage is finished yet",
        "the last line of metrics is of update 4",
        "Not begun",
        "vocab_size: 1000",
    ):
        assert text in page
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == [
        "Loss",
        "BLEU on validation sentences",
        "Bytes on the wire, cumulative, one worker",
        "Training speed",
        "Where the time of updates goes",
    ]
    assert all(f">{name}</text>" in page for name in ("compute", "exchange", "data", "% of the time"))
    assert (run.path / "1-train" / "report.html").exists()
    assert not (run.path / "2-quantize").exists()


def test_a_finished_stage_is_in_the_table_and_nothing_is_fetched(run: RunDirectory) -> None:
    write_json_atomic(run.path / "1-train" / RESULT, RESULT_TRAIN)
    page = write_report(run).read_text()
    for text in ("14.25", "40.50", "7.40 MB", "800 MB", "7,200 MB", "9.0x", "nrefs:1|tok:13a", "1,000 test sentences"):
        assert text in page
    assert "a &lt;script&gt;x&lt;/script&gt; &amp; b" in page
    parser = Outside()
    parser.feed(page)
    assert parser.fetched == []
    assert not {"script", "link", "img", "iframe"} & parser.tags
    assert "url(http" not in page
    assert "@import" not in page


def test_a_lottery_shows_the_rounds_that_are_finished(tmp_path: Path) -> None:
    with RunLock(tmp_path / "r"):
        run = RunDirectory.create(tmp_path / "r", load("lottery"))
    page = write_report(run).read_text()
    assert "BLEU against the weights left" not in page
    for name in ("1-train", "2-lottery/round-01", "2-lottery/round-02", "2-lottery/round-03"):
        (run.path / name).mkdir(parents=True)
    write_json_atomic(run.path / "1-train" / RESULT, RESULT_TRAIN)
    for number, bleu in ((1, 14.75), (2, 15.5)):
        row = {"round": number, "fraction_remaining": 0.8**number, "artefact_bytes": 3_700_000}
        write_json_atomic(run.path / f"2-lottery/round-0{number}" / RESULT, {**RESULT_TRAIN, **row, "bleu": bleu})
    page = write_report(run).read_text()
    assert "Not finished; 2 of 7 rounds are." in page
    cells = ("dense", "100.0%", "14.25", "80.0%", "14.75", "64.0%", "15.50", "x2.00")
    assert all(f"<td>{cell}</td>" in page for cell in cells)
    assert page.count("BLEU against the weights left") == 1
    assert page.count("<tr>") == 2 + 4 + 2, "the stages' table, the rounds', one sample"
    (run.path / "2-lottery/round-02" / RESULT).write_text("{")
    with pytest.raises(ValueError, match=r"round-02/result\.json:1: damaged"):
        write_report(run)


def test_reports_are_deterministic(run: RunDirectory) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_a_damaged_result_is_named(run: RunDirectory) -> None:
    (run.path / "1-train" / RESULT).write_text("{\n oops")
    with pytest.raises(ValueError, match=r"1-train/result\.json:2: damaged"):
        write_report(run)


def test_curves_skip_gaps_and_keep_both_ends() -> None:
    entries = [{"update": u, "loss": None if u == 3 else float(u)} for u in range(1, 5000)]
    thinned = curve(entries, "loss", "x")
    assert len(thinned.x) <= MAX_POINTS + 1
    assert (thinned.x[0], thinned.x[-1]) == (1, 4999)
    assert 3 not in curve(entries[:5], "loss", "x").x
    assert stage_plots([]) == []


def test_the_summary_table_is_aligned() -> None:
    recipe = load("tiny")
    results = [(recipe.stages[0], RESULT_TRAIN), (recipe.stages[1], {"bleu": 14.0, "artefact_bytes": 2_000_000})]
    lines = stage_table(results).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[3].split() == ["quantize", "14.00", "-", "2.00", "MB", "-", "-", "-", "-", "-"]


def test_progress_lines_and_silent_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    for enabled in (True, False):
        with Reporter(enabled=enabled, terminal=False) as reporter:
            reporter.start("train", 10)
            reporter.advance(3)
            reporter.advance(5, loss=4.25, ppl=None, wire_bytes=3.1e6, fp32_bytes=29e6, tokens_per_second=8100.4)
            reporter.log("validation")
    assert capsys.readouterr().out == ("train 5/10  loss 4.250  wire 3.1 MB (fp32 29.0 MB)  8,100 tok/s\nvalidation\n")
    assert format_figures({"lr": 5e-3, "bleu": 1.0}) == "lr 5.00e-03  BLEU 1.00"


def test_a_plot_of_tickets_takes_any_fraction() -> None:
    lines = [Series("tickets", {0.512: [20.0], 0.0003: [1.0], 0.0: [0.1]})]
    assert png(lambda: tickets_figure(lines, [21.0])).startswith(b"\x89PNG")
