"""The examples of docs/any_program.md, started as their first lines say, on two ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
RANK = re.compile(r"rank (\d): sent ([\d,]+) bytes, fp32 ([\d,]+) \(([\d.]+)x\); weights ([0-9a-f]{16})")
LOSS = re.compile(r"update \d+: loss (\d+\.\d+)")
UNTRAINED = 5.545
"""Nats of a byte that could be any of 256."""
pytestmark = pytest.mark.torchrun


def example(name: str, *arguments: str | Path) -> tuple[list[float], dict[int, tuple[int, int, float]], str]:
    """Losses, (bytes sent, fp32 bytes, ratio) by rank, and the weights that both ranks ended with."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / name), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    losses = [float(loss) for loss in LOSS.findall(done.stdout)]
    figures, weights = {}, set()
    for rank, sent, fp32, ratio, digest in RANK.findall(done.stdout):
        figures[int(rank)] = int(sent.replace(",", "")), int(fp32.replace(",", "")), float(ratio)
        weights.add(digest)
    assert sorted(figures) == [0, 1], done.stdout
    assert len(weights) == 1, f"ranks ended with other weights: {done.stdout}"
    return losses, figures, weights.pop()


def learned_over_a_thin_wire(losses: list[float], figures: dict[int, tuple[int, int, float]]) -> None:
    assert losses[0] == pytest.approx(UNTRAINED, abs=0.3)
    assert losses[-1] < 2.8, losses
    for sent, fp32, ratio in figures.values():
        assert ratio == pytest.approx(fp32 / sent, abs=0.06)
        assert ratio > 5
        # 205,312 parameters, 200 updates, n = 2: a ring sends 4 bytes an element
        assert fp32 == pytest.approx(4 * 205_312 * 200, rel=0.01)


def test_plain_ddp_learns_with_thin_gradients() -> None:
    losses, figures, _ = example("ddp.py")
    learned_over_a_thin_wire(losses, figures)


def test_plain_ddp_cut_and_resumed_with_its_state_per_rank_equals_uncut(tmp_path: Path) -> None:
    accumulate = ("--accumulate", "2")
    _, whole, weights = example("ddp.py", "--updates", "40", *accumulate)
    assert whole[0][1] == pytest.approx(4 * 205_312 * 40, rel=0.01), "bytes cross once an update, not once a batch"
    folder = tmp_path / "checkpoint"
    _, _, halfway = example("ddp.py", "--updates", "20", *accumulate, "--checkpoint", folder)
    assert {path.name for path in folder.iterdir()} == {"shared.pt", "route-0.pt", "route-1.pt"}
    losses, figures, resumed = example("ddp.py", "--updates", "40", *accumulate, "--checkpoint", folder)
    assert len(losses) == 1, "the first updates were not done again"
    assert halfway != weights
    assert resumed == weights
    assert figures[0][1] == whole[0][1], "the meter goes on"


def test_accelerate_learns_with_thin_gradients() -> None:
    losses, figures, _ = example("accelerate_ddp.py")
    learned_over_a_thin_wire(losses, figures)


@pytest.mark.skipif(find_spec("pytorch_lightning") is None, reason="needs `pip install pytorch-lightning`")
def test_lightning_learns_with_thin_gradients() -> None:
    losses, figures, _ = example("lightning_ddp.py")
    learned_over_a_thin_wire(losses, figures)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_the_page_shows_the_line_that_the_example_runs(name: str) -> None:
    page = (EXAMPLES.parent / "any_program.md").read_text()
    assert f"(examples/{name})" in page
    source = (EXAMPLES / name).read_text()
    (line,) = (line.partition("  #")[0].strip() for line in source.splitlines() if "# the one line" in line)
    assert line in page
