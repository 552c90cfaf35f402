"""Nodes of a run on hosts of the network lab, each with a host name of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from elastic_run import Run
from lab import Lab, missing

__all__ = ["PORT", "Lab", "missing", "start"]

PORT = 29620
_NAMED = 'hostname "$0" && exec "$@"'


def start(lab: Lab, run: Run, host: int, *options: str, fault: str = "", **settings: object) -> subprocess.Popen[str]:
    """`tenko run` on a host; upper-case settings are environment variables."""
    variables = {key: str(value) for key, value in settings.items() if key.isupper()}
    overrides = {key.replace("__", "."): value for key, value in settings.items() if not key.isupper()}
    command = run.command("--rendezvous", f"{lab.address(0)}:{PORT}", *options, **overrides)
    environment = run.environment(fault, **variables)
    inside = ["nsenter", f"--net=/run/netns/{lab.name(host)}", "unshare", "--uts", "sh", "-c", _NAMED, f"host{host}"]
    assert os.geteuid() == 0
    return subprocess.Popen(
        [*inside, *command],
        cwd=run.folder,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
