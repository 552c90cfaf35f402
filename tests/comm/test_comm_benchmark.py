"""benchmarks/kernels.py runs, and the bytes that it reports are within its goal (speeds are for quiet machines)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


def test_kernel_benchmark_reports_every_kernel(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--megabytes",
        "4",
        "--repetitions",
        "2",
        "--json",
        str(tmp_path / "k.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "decode-add: at least 1.3x memcpy demanded" in done.stdout
    result = json.loads((tmp_path / "k.json").read_text())
    assert [row["bits"] for row in result["kernels"]] == list(range(1, 9))
    for row in result["kernels"]:
        assert 1 <= row["wire_over_nominal"] <= 1.03
        for kernel in ("encode", "encode-feedback", "decode-add", "decode"):
            assert row[kernel]["of_memcpy"] > 0
    assert result["threads"]["encode"]["of_memcpy"] > 0
