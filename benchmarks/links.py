"""The exchange of gradients over shaped links, every contestant in the same run: time against the floor, bytes, error.

    python benchmarks/links.py --quick                           # 4 hosts at 1 Gbit/s, two turns: some minutes
    python benchmarks/links.py                                   # 2, 4, 8 hosts at 1, 0.1, 10 Gbit/s: see --estimate
    python benchmarks/links.py --hosts 4 --rate 1gbit --peers "DDP fp32" "tenko 3/4"
    python benchmarks/links.py --extra "1-bit Adam=/path/python:benchmarks/onebit_adam.py"

Root and iproute2 (lab.py). Hosts are network namespaces; the gradients are those of Transformer-base (link_model.py).
Contestants take turns in the same processes (A B C, C B A, ...): each is put on the model and warmed up over unshaped
links, then over shaped ones, then measured. A step's time is that of the slowest rank; figures are medians over all
turns. The floor is what a rank sent, by the kernel's counter, over the shaped rate. Results go to `--out` (with what
they were measured on) and, as a table, beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parent))
import option_types as types
from lab import UNSHAPED, Lab, bits_per_second, missing
from link_crew import Crew, Failed, commit, machine
from link_model import MODELS
from link_peers import PEERS
from link_table import markdown, ring_bytes

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SETUP_SECONDS = 0.9
"""Of one host's processor, to set a contestant up and take it off, 60M parameters; for estimates."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is measured."""

    hosts: list[int]
    rates: list[str]
    peers: list[str]
    model: str = "base"
    extra: dict[str, str] = field(default_factory=dict)
    """PYTHON:SCRIPT of contestants of other environments, by name."""
    repeat: int = 3
    """Turns of every contestant."""
    count: int = 2
    """Measured steps of each kind a turn."""
    compute: tuple[float, ...] = (0.3, 1.0)
    """Seconds of a step's computation; exchanges without any are always measured."""
    signal: float = 0.0
    """Share of the gradients' energy that all ranks have in common."""
    congestion: str = "cubic"

    def at(self, rate: str) -> Sweep:
        """At 100 Mbit/s and less every step takes many seconds, beside which noise is nothing: one of each kind."""
        if bits_per_second(rate) > 1e8 or self.model == "small":
            return self
        return replace(self, repeat=1, count=1, compute=self.compute[-1:])

    def seconds(self) -> float:
        """How long it will take, roughly."""
        total = 0.0
        for hosts in self.hosts:
            for rate in self.rates:
                here = self.at(rate)
                step = max(1.3 * ring_bytes(hosts, self.model) * 8 / bits_per_second(rate), 0.3 * hosts)
                for name in [*self.peers, *self.extra]:
                    cost = PEERS[name].cost if name in PEERS else 0.3
                    seconds = (1 + here.count) * step * cost
                    seconds += here.count * sum(max(c, 0.8 * step * cost) + 0.2 for c in here.compute)
                    total += here.repeat * (seconds + SETUP_SECONDS * hosts * (1 + cost))
            total += 6 * hosts
        return total


def measure(lab: Lab, crew: Crew, peer: str, rate: str, sweep: Sweep, into: dict[str, Any]) -> None:
    """One turn of one contestant, added to its result.

    Raises:
        Failed: it does not run.
    """
    slowest = ring_bytes(lab.hosts, sweep.model) * 8 / bits_per_second(rate)
    patience = 300 + 30 * slowest * (PEERS[peer].cost if peer in PEERS else 1)
    lab.shape(UNSHAPED)
    crew.start()
    answers = crew.ask({"do": "setup", "peer": peer}, timeout=300)
    into["agree"] = into.get("agree", True) and len({answer["agree"] for answer in answers}) == 1
    into["error"], into["once"] = answers[0].get("error"), answers[0].get("once")
    lab.shape(rate)
    crew.ask({"do": "measure", "count": 1, "compute": 0.0}, timeout=patience)
    for compute in (0.0, *sweep.compute):
        command = {"do": "measure", "count": sweep.count, "compute": compute}
        answers = crew.ask(command, timeout=patience * sweep.count)
        for step in range(sweep.count):
            seconds = max(answer["seconds"][step] for answer in answers)
            if compute:
                into.setdefault("steps", {}).setdefault(f"{compute:g}", []).append(seconds)
                continue
            into.setdefault("exchange", []).append(seconds)
            for key in ("sent", "metered"):
                values = [answer[key][step] for answer in answers]
                mean = None if None in values else sum(values) / len(values)
                into.setdefault(key, []).append(mean)
            into.setdefault("sent_most", []).append(max(answer["sent"][step] for answer in answers))
            into.setdefault("cpu", []).append(sum(answer["cpu"][step] for answer in answers) / len(answers))
    crew.ask({"do": "close"}, timeout=120)


def run(sweep: Sweep, out: Path, log: IO[str]) -> dict[str, Any]:
    """Measures everything; `out` is written as results come in.

    Returns:
        What was written: commit, command, date, machine, and a list of results.
    """
    document: dict[str, Any] = {
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine(),
        "results": [],
    }
    begin = time.monotonic()
    hello = {"model": sweep.model, "signal": sweep.signal}
    for hosts in sweep.hosts:
        with Lab(hosts, congestion=sweep.congestion) as lab:
            crews = dict.fromkeys(sweep.peers, Crew(lab, hello, log))
            for number, (name, where) in enumerate(sweep.extra.items(), start=1):
                python, script = where.split(":", 1)
                crews[name] = Crew(lab, hello, log, python=python, script=script, number=number)
            for rate in sweep.rates:
                results: dict[str, dict[str, Any]] = {
                    name: {"peer": name, "hosts": hosts, "rate": rate, "model": sweep.model} for name in crews
                }
                document["results"] += results.values()
                for turn in range(sweep.at(rate).repeat):
                    for name in list(crews) if turn % 2 == 0 else reversed(list(crews)):
                        result = results[name]
                        if "failed" in result:
                            continue
                        try:
                            measure(lab, crews[name], name, rate, sweep.at(rate), result)
                            said = f"{result['exchange'][-1]:.3f} s"
                        except Failed as error:
                            result["failed"] = said = str(error)
                        past = (time.monotonic() - begin) / 60
                        line = f"{past:5.1f} min: {hosts} hosts, {rate}, turn {turn + 1}: {name}: {said}"
                        print(line, file=sys.stderr, flush=True)
                    out.write_text(json.dumps(document, indent=1) + "\n")
    return document


def origin(document: dict[str, Any]) -> str:
    """Where a document's figures come from, in a line of Markdown."""
    on = document["machine"]
    return (
        f"`{document['command']}`, commit {document['commit']}, {document['date']}, {on['cores']} cores of {on['cpu']}."
    )


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=types.hosts, nargs="+", default=[2, 4, 8])
    parser.add_argument(
        "--rate", type=types.rate, nargs="+", default=["1gbit", "100mbit", "10gbit"], help="1gbit ..., or none"
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="base")
    known = f"of: {'; '.join(PEERS)}. All but the slow ones by default"
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), metavar="PEER", help=known)
    form = "NAME=PYTHON:SCRIPT"
    parser.add_argument("--extra", type=types.contestant, nargs="+", default=[], metavar=form, help="see link_rank.py")
    parser.add_argument("--repeat", type=types.integer(1), default=3, help="turns of every contestant; at 100mbit, one")
    parser.add_argument("--count", type=types.integer(1), default=2, help="measured exchanges a turn")
    computed = "seconds of a step's computation"
    parser.add_argument("--compute", type=types.seconds, nargs="*", default=[0.3, 1.0], help=computed)
    common = "share of the gradients' energy common to all ranks"
    parser.add_argument("--signal", type=types.share, default=0.0, help=common)
    parser.add_argument("--congestion", default="cubic", help="TCP's congestion control")
    parser.add_argument("--out", type=types.new_file, default=RESULTS / "links.json")
    parser.add_argument("--quick", action="store_true", help="4 hosts, 1gbit, 2 turns of 1 exchange; not to --out")
    parser.add_argument("--estimate", action="store_true", help="only say how long the run would take")
    options = parser.parse_args()
    if options.quick:
        options.hosts, options.rate, options.repeat, options.count = [4], ["1gbit"], 2, 1
        options.out = Path(tempfile.gettempdir()) / "links-quick.json"
    options.extra = dict(options.extra)
    options.peers = options.peers or [name for name, peer in PEERS.items() if not peer.slow]
    return options


def main() -> int:
    """The whole run."""
    options = arguments()
    if (why := missing()) is not None:
        print(f"links: {why}", file=sys.stderr)
        return 2
    sweep = Sweep(
        hosts=options.hosts,
        rates=options.rate,
        peers=options.peers,
        model=options.model,
        extra=options.extra,
        repeat=options.repeat,
        count=options.count,
        compute=tuple(options.compute),
        signal=options.signal,
        congestion=options.congestion,
    )
    print(f"about {sweep.seconds() / 60:.0f} minutes", file=sys.stderr)
    if options.estimate:
        return 0
    with tempfile.NamedTemporaryFile("w", prefix="links-", suffix=".log", delete=False) as log:
        print(f"what the ranks say goes to {log.name}", file=sys.stderr)
        document = run(sweep, options.out, log)
    table = markdown(document)
    text = f"# The exchange of gradients over shaped links\n\n{origin(document)}\n\n{table}"
    options.out.with_suffix(".md").write_text(text)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
