"""What a run says while it works: a rich progress bar on a terminal, plain lines otherwise; rank 0 only."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .streams import say

PLAIN_INTERVAL = 10.0
"""Seconds between plain lines about work that reports no figures."""


class Reporter:
    """Progress of one task at a time, and lines of text between.

    Use:
        reporter.start("train", total=2000, done=500)
        reporter.advance(510, loss=4.21, ppl=18.5, lr=5e-3, tokens_per_second=8100, wire_bytes=3.1e6, fp32_bytes=2.9e7)
        reporter.log("validation at update 500: BLEU 12.31")
        reporter.finish()

    Args:
        enabled: whether this process speaks (rank 0).
        terminal: draw a bar; None asks whether stdout is a terminal.
    """

    def __init__(self, *, enabled: bool = True, terminal: bool | None = None) -> None:
        self.enabled = enabled
        self.terminal = enabled and (sys.stdout.isatty() if terminal is None else terminal)
        self._console = Console(file=sys.stdout, force_terminal=self.terminal or None, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._title = ""
        self._total = 0
        self._last_line = 0.0

    def log(self, message: str) -> None:
        """Print a line, above the bar when there is one."""
        if not self.enabled:
            return
        if self.terminal:
            self._console.print(message, markup=False, soft_wrap=True)
        else:
            say(message)

    def start(self, title: str, total: int, done: int = 0) -> None:
        """Begin a task of `total` steps, of which `done` are done; ends the one before."""
        self.finish()
        self._title, self._total, self._last_line = title, total, time.monotonic()
        if not self.terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task(escape(title), total=total, completed=done, figures="")
        self._progress.start()

    def advance(self, done: int, **figures: Any) -> None:
        """Note that `done` steps are done in all.

        Args:
            done: steps done since the task began, or for training the update reached.
            figures: shown in the given order; the bar keeps the last ones. Known: loss, nll, ppl, lr,
                tokens_per_second, wire_bytes with fp32_bytes (cumulative), bleu; None is left out. Without figures a
                plain log gets a line only every ten seconds.
        """
        if not self.enabled:
            return
        text = format_figures(figures)
        if self._progress is not None and self._task is not None:
            if text:
                self._progress.update(self._task, completed=done, figures=escape(text))
            else:
                self._progress.update(self._task, completed=done)
        elif not self.terminal and (text or time.monotonic() - self._last_line >= PLAIN_INTERVAL):
            self._last_line = time.monotonic()
            say(f"{self._title} {done}/{self._total}{'  ' if text else ''}{text}")

    def finish(self) -> None:
        """End the task; the bar goes away."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()


class ReporterHandler(logging.Handler):
    """Shows log records of tenko as the reporter's lines."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.INFO)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message; warnings say that they are."""
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self.reporter.log(prefix + record.getMessage())


def format_figures(figures: dict[str, Any]) -> str:
    """Figures of `Reporter.advance` in short, for instance `loss 4.210  8,100 tok/s  wire 3.1 of 29.0 MB`."""
    shown: list[str] = []
    for key, value in figures.items():
        if value is None or key == "fp32_bytes":
            continue
        if key in ("loss", "nll"):
            shown.append(f"{key} {value:.3f}")
        elif key == "ppl":
            shown.append(f"ppl {value:.2f}")
        elif key == "lr":
            shown.append(f"lr {value:.2e}")
        elif key == "tokens_per_second":
            shown.append(f"{value:,.0f} tok/s")
        elif key == "wire_bytes":
            full = figures.get("fp32_bytes")
            shown.append(f"wire {megabytes(value)}" + (f" (fp32 {megabytes(full)})" if full else ""))
        elif key == "bleu":
            shown.append(f"BLEU {value:.2f}")
        else:
            shown.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(shown)


def megabytes(size: float) -> str:
    """A size in MB (10^6 bytes): 0.31 MB, 3.1 MB, 310 MB."""
    value = size / 1e6
    return f"{value:,.0f} MB" if value >= 100 else f"{value:.1f} MB" if value >= 1 else f"{value:.2g} MB"
