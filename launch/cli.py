"""The `tenko` command line, with those of `model_cli.py`, `bench_cli.py` and `slurm_cli.py`. What a command does is in
`run_command.py`, `commands.py` and others, imported only when it runs: `--help` is quick."""

from __future__ import annotations

# ruff: noqa: E402
import signal
from contextlib import suppress

_OURS = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _OURS:  # until `main` can tell it in a line Ctrl-C ends the process at once, not with a traceback out of an import
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from . import model_cli
from .bench_cli import app as bench_app
from .bundled import bundled
from .errors import BAD_INPUT, INTERNAL, INTERRUPTED, Halted, RunFailed, Terminated, internal, is_users, one_line
from .slurm_cli import app as launch_app
from .streams import forget_stdout, open_closed

app = typer.Typer(
    name="tenko",
    help="English-Czech translation: trained over a thin wire, shipped thin on disk.\n\n"
    "Start with `tenko translate en-cs`, which translates with a model that ships, or with `tenko run demo`: it makes "
    "that model smaller with two workers, takes some minutes on two cores, and leaves a run directory, runs/demo, that "
    "the other commands read. `tenko run scratch` trains a small model from nothing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

app.add_typer(launch_app, name="launch")
app.add_typer(bench_app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"tenko {version('tenko')}")
        except PackageNotFoundError:
            typer.echo("tenko (not installed: runs from a checkout)")
        raise typer.Exit


@app.callback()
def _main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors (or set TENKO_DEBUG=1).")] = False,
) -> None:
    if debug:
        os.environ["TENKO_DEBUG"] = "1"


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help=f"YAML file, or a bundled recipe: {', '.join(bundled())}.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings over the recipe's; those of a stage by its name.",
            show_default=False,
        ),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run directory.", show_default="runs/NAME, of the recipe's name")
    ] = None,
    nodes: Annotated[
        str | None,
        typer.Option(metavar="N|MIN:MAX", help="Nodes; the same command runs on each.", show_default="1"),
    ] = None,
    rendezvous: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where nodes meet: one of them, and a free port.", show_default=False),
    ] = None,
    interface: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="This node's network interface.", show_default="the one that leads to HOST"),
    ] = None,
    join_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=1, help="How long to wait for other nodes.", show_default="300"),
    ] = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=0,
            help="How often lost workers are started anew.",
            show_default="3 on several nodes, 0 on one",
        ),
    ] = None,
) -> None:
    """Run a recipe, or go on with it where it stopped.

    Stages that are finished are left alone; one that was cut off (Ctrl-C, a kill, a full disk) resumes from its last
    checkpoint, and ends as if it had never stopped. With `workers: n` in the recipe this starts n torchrun processes.

    \b
    tenko run demo
    tenko run demo quant_noise.train.max_update=50 seed=2 --run-dir runs/short
    tenko run scratch data.train=corpus.tsv.gz --run-dir runs/mine

    On several machines the same command runs on each, `workers` processes a machine, all with the run directory on a
    disk that they share. SIGUSR1 and SIGTERM end the update and save; exit code 75, or 143 after SIGTERM.

    \b
    tenko run scratch --run-dir /shared/runs/scratch --nodes 2 --rendezvous node1:29500
    """
    from . import run_command
    from .nodes import Nodes

    where = Nodes.parse(nodes, rendezvous, interface, join_timeout)
    run_command.run(recipe, overrides or [], run_dir, where, max_restarts=max_restarts)


app.command()(model_cli.translate)
app.command(short_help="BLEU and chrF on a test set.")(model_cli.evaluate)
app.command(short_help="Write a model for CTranslate2 or fairseq.")(model_cli.export)
app.command(short_help="What a model file holds, in bytes.")(model_cli.inspect)


@app.command(short_help="Write report.html anew.")
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Run directory, finished or not.")],
) -> None:
    """Write report.html anew and print its path and the table of stages."""
    from . import commands

    commands.report(run_dir)


@app.command(short_help="Look at a run while it goes on.")
def watch(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, of a run here or elsewhere.")],
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame and exit, as where stdout is no terminal.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between frames.")] = 1.0,
) -> None:
    """Show a run as it goes on: stages, figures, curves, ranks, warnings. Ctrl-C stops watching, not the run.

    Only the run directory is read: it may be a run of another machine on a shared disk.

    \b
    tenko watch runs/demo
    tenko watch runs/demo --once
    """
    from .watch import watch as show

    show(run_dir, once=once, interval=interval)


def main(argv: list[str] | None = None) -> None:
    """Entry point. Errors are one line on stderr; exit codes are those of `errors.py`."""
    try:
        open_closed()
        code = _run_app(argv)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        # click and rich make a SystemExit of it.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        forget_stdout()
        code = 128 + 13  # as if SIGPIPE had ended it, which is what a reader that goes away means
    except KeyboardInterrupt:
        code = _interrupted()
    except Terminated as error:
        code = error.code
        _say(str(error))
    except RunFailed as error:
        code = error.code
        _say(str(error) if isinstance(error, Halted) else f"error: {error}")
    except Exception as error:
        code = BAD_INPUT if is_users(error) else INTERNAL
        if os.environ.get("TENKO_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        _say(f"error: {one_line(error) if code == BAD_INPUT else internal(error, None)}")
    sys.exit(code)


def _run_app(argv: list[str] | None) -> int:
    command: Any = typer.main.get_command(app)
    try:
        result = command.main(args=argv, prog_name="tenko", standalone_mode=False)
    except Exception as error:
        # typer carries click inside or beside it, by version: go by what the exception can do.
        if type(error).__name__ == "Abort":
            return _interrupted()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())  # type: ignore[attr-defined]
            return BAD_INPUT
        if not hasattr(error, "format_message"):
            raise
        path = getattr(getattr(error, "ctx", None), "command_path", None) or _path(command, argv or sys.argv[1:])
        said = " ".join(error.format_message().split()).replace(": Value error, ", ": ")  # pydantic's, by version
        _say(f"error: {said} (see {path} --help)")
        return BAD_INPUT
    if result == INTERRUPTED:
        return _interrupted()
    return result if isinstance(result, int) else 0


def _path(command: Any, argv: list[str]) -> str:
    """The command that arguments name, `tenko bench scaling`; click leaves it out of some errors."""
    path = "tenko"
    for word in argv:
        if word in getattr(command, "commands", {}):
            command, path = command.commands[word], f"{path} {word}"
    return path


def _interrupted() -> int:
    _say("interrupted; the same command goes on from here" if "run" in sys.argv[1:2] else "interrupted")
    return INTERRUPTED


def _say(line: str) -> None:
    with suppress(OSError):  # stderr is gone: the exit code still tells
        print(f"tenko: {line}", file=sys.stderr, flush=True)


if _OURS:
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    main()
