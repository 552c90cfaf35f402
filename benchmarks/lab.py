"""A network lab: hosts that are network namespaces, joined by a bridge, each behind a link shaped both ways.

    python benchmarks/lab.py up 4 --rate 1gbit
    python benchmarks/lab.py run -- python rank.py     # on every host, with torch's rank variables set
    python benchmarks/lab.py rate 100mbit
    python benchmarks/lab.py down                      # also what a killed run left behind

Programs use `with Lab(4, "1gbit") as lab`. A host's interface is e0, its address 10.77.0.(rank + 1). Shaping is tbf on
the host's side (what it sends) and on the bridge's (what it receives). The rate counts every frame's headers, so a
TCP stream carries at most 0.956 of it at an MTU of 1500. Needs Linux, root, and iproute2's `ip` and `tc`.

All hosts share this machine's cores: above some rate the cores are the limit and not the link.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

PREFIX = "tenkolab"
OF_CLI = "cli"
"""Owner in the names of the lab that `up` leaves standing; a program's lab has its process's id there."""
UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
UNSHAPED = "none"
PORT = 29577


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended on one host."""

    host: int
    code: int | None
    """Exit status; None: it was ended here, at the time limit."""
    output: str
    """stdout and stderr together."""


def missing() -> str | None:
    """What keeps the lab from working here, in one line; None where it works."""
    if not sys.platform.startswith("linux"):
        return "the network lab needs Linux's network namespaces"
    if os.geteuid() != 0:
        return "the network lab needs root (it makes network namespaces)"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if absent:
        return f"the network lab needs {' and '.join(absent)} (Debian: apt-get install iproute2)"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"the network lab may not make network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return None


def bits_per_second(rate: str) -> float:
    """`1gbit` in bit/s, infinite for `none`. Raises ValueError for what is no rate."""
    if rate == UNSHAPED:
        return float("inf")
    for unit, factor in UNITS.items():
        number = rate.removesuffix(unit)
        if number != rate:
            try:
                value = float(number) * factor
            except ValueError:
                break
            if value > 0:
                return value
    raise ValueError(f"rate: must be a number with {', '.join(UNITS)}, or none, is {rate!r}")


def _tbf(rate: str) -> str:
    """tbf's settings: a burst below a few milliseconds of the rate starves it, a larger one hides the rate."""
    bits = bits_per_second(rate)
    burst, limit = ("5mb", "16mb") if bits > 3e9 else ("256kb", "4mb") if bits > 3e8 else ("128kb", "2mb")
    return f"root tbf rate {int(bits)}bit burst {burst} limit {limit}"


def _namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"{PREFIX}-")]


def _remove(namespaces: Sequence[str]) -> None:
    """End whatever runs in them, then delete them; interfaces and shaping go with a namespace."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        found = [subprocess.run(["ip", "netns", "pids", n], capture_output=True, text=True) for n in namespaces]
        pids = [int(pid) for one in found for pid in one.stdout.split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        if not pids:
            break
        time.sleep(0.2)
    for namespace in namespaces:
        subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def remove_leftovers(*, also_cli: bool = False) -> list[str]:
    """Removes the labs of programs that are gone, and the CLI's if asked; returns the namespaces' names."""
    gone = []
    for namespace in _namespaces():
        owner = namespace.split("-")[1]
        if (also_cli and owner == OF_CLI) or (owner.isdigit() and not os.path.exists(f"/proc/{owner}")):
            gone.append(namespace)
    _remove(gone)
    return gone


class Lab:
    """n hosts on one switch, for a `with` block.

    Args:
        hosts: how many.
        rate: of every host's link, both ways: `1gbit`, `100mbit`, or `none` for unshaped.
        congestion: TCP's congestion control between hosts, `cubic` (Linux's own default) or what the kernel has.
        mtu: of every interface, bytes.
        owner: part of the namespaces' names; this process's id by default.

    Raises:
        ValueError: a setting is not possible.
        RuntimeError: `ip` or `tc` failed, or the lab does not work here (`missing` says why).
    """

    def __init__(
        self, hosts: int, rate: str = UNSHAPED, *, congestion: str = "cubic", mtu: int = 1500, owner: str = ""
    ) -> None:
        if not 1 <= hosts <= 64:
            raise ValueError(f"hosts: must be 1 to 64, is {hosts}")
        bits_per_second(rate)
        self.hosts, self.rate, self.congestion, self.mtu = hosts, rate, congestion, mtu
        self._base = f"{PREFIX}-{owner or os.getpid()}"
        self._switch = f"{self._base}-sw"
        self._running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Lab:
        if (why := missing()) is not None:
            raise RuntimeError(why)
        remove_leftovers()
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _leave)  # a polite kill tidies up, as Ctrl-C does
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def name(self, host: int) -> str:
        """Name of a host's network namespace."""
        return f"{self._base}-{host}"

    def address(self, host: int) -> str:
        """A host's address on the lab's network."""
        return f"10.77.0.{host + 1}"

    def up(self) -> None:
        """Makes the hosts and shapes their links."""
        _ip(f"netns add {self._switch}", *(f"netns add {self.name(i)}" for i in range(self.hosts)))
        _ip("link set lo up", "link add sw type bridge", "link set sw up", namespace=self._switch)
        for i in range(self.hosts):
            here = self.name(i)
            _ip(f"link add e0 netns {here} mtu {self.mtu} type veth peer name p{i} netns {self._switch}")
            _ip(f"link set p{i} mtu {self.mtu} master sw up", namespace=self._switch)
            network = f"10.77.0.0/24 dev e0 src {self.address(i)}"
            _ip(
                "link set lo up",
                f"addr add {self.address(i)}/24 dev e0",
                "link set e0 up",
                f"route change {network} congctl {self.congestion}",
                namespace=here,
            )
        self.shape(self.rate)

    def down(self) -> None:
        """Ends what runs on the hosts and removes them."""
        for process in self._running:  # `ip netns exec` may be on its way into a host, where nobody finds it yet
            process.terminate()
        _remove([n for n in _namespaces() if n.startswith(f"{self._base}-")])
        for process in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            process.kill()
            process.wait()
        self._running.clear()

    def shape(self, rate: str, host: int | None = None) -> None:
        """Gives all links another rate, or a host's alone, while programs run."""
        bits_per_second(rate)
        for i in range(self.hosts) if host is None else (host,):
            for namespace, device in ((self.name(i), "e0"), (self._switch, f"p{i}")):
                tc = ["tc", "-n", namespace, "qdisc"]
                subprocess.run([*tc, "delete", "dev", device, "root"], capture_output=True, check=False)
                if rate != UNSHAPED:
                    _check([*tc, "add", "dev", device, *_tbf(rate).split()])
        if host is None:
            self.rate = rate

    def cut(self, host: int) -> None:
        """Pulls a host's cable: its packets and those to it are lost, nobody is told."""
        _ip(f"link set p{host} nomaster", namespace=self._switch)

    def mend(self, host: int) -> None:
        """Plugs the cable in again."""
        _ip(f"link set p{host} master sw", namespace=self._switch)

    def counters(self, host: int) -> dict[str, int]:
        """The kernel's counters of a host's interface: tx_bytes, rx_bytes, tx_packets, rx_packets."""
        shown = _check(["ip", "-n", self.name(host), "-s", "-j", "link", "show", "e0"])
        stats: dict[str, Any] = json.loads(shown)[0]["stats64"]
        return {f"{way}_{unit}": int(stats[way][unit]) for way in ("tx", "rx") for unit in ("bytes", "packets")}

    def environment(self, host: int) -> dict[str, str]:
        """What a rank on a host finds in its environment: one rank a host, one thread a rank."""
        return {
            "RANK": str(host),
            "WORLD_SIZE": str(self.hosts),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "GROUP_RANK": str(host),
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": "e0",
            "TP_SOCKET_IFNAME": "e0",
            "OMP_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def start(
        self,
        host: int,
        command: Sequence[str],
        *,
        environment: dict[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | IO[str] | None = None,
        stderr: int | IO[str] | None = None,
    ) -> subprocess.Popen[str]:
        """Starts a command on a host. `environment` is added to that of a rank. It ends with the lab at the latest."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name(host), *command],
            env={**os.environ, **self.environment(host), **(environment or {})},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )
        self._running.append(process)
        return process

    def run(
        self, command: Sequence[str], *, environment: dict[str, str] | None = None, timeout: float = 120.0
    ) -> list[Ended]:
        """Runs a command on every host and waits for all; `timeout` in seconds ends those that still run."""
        pipe, out = subprocess.PIPE, subprocess.STDOUT
        started = [self.start(i, command, environment=environment, stdout=pipe, stderr=out) for i in range(self.hosts)]
        until = time.monotonic() + timeout
        ended = []
        for i, process in enumerate(started):
            code: int | None
            try:
                output, _ = process.communicate(timeout=max(0.1, until - time.monotonic()))
                code = process.returncode
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
                code = None
            ended.append(Ended(host=i, code=code, output=output))
        return ended


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _ip(*commands: str, namespace: str = "") -> None:
    """`ip` commands, in one process."""
    inside = ["-n", namespace] if namespace else []
    _check(["ip", *inside, "-batch", "-"], "\n".join(commands))


def _check(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}{f' ({text})' if text else ''}")
    return done.stdout


def _standing(congestion: str = "cubic") -> Lab:
    """The lab that `up` left."""
    names = [n for n in _namespaces() if n.startswith(f"{PREFIX}-{OF_CLI}-")]
    if not names:
        raise ValueError("no lab stands; make one with `up`")
    return Lab(len(names) - 1, congestion=congestion, owner=OF_CLI)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="make the hosts")
    up.add_argument("hosts", type=int)
    up.add_argument("--rate", default=UNSHAPED, help="1gbit, 100mbit, ... or none")
    up.add_argument("--congestion", default="cubic", help="TCP's congestion control")
    up.add_argument("--mtu", type=int, default=1500)
    rate = commands.add_parser("rate", help="shape all links anew")
    rate.add_argument("rate")
    run = commands.add_parser("run", help="run a command on every host; exits as the worst of them")
    run.add_argument("--timeout", type=float, default=3600.0, help="seconds")
    run.add_argument("words", nargs="+", metavar="command", help="after `--`")
    commands.add_parser("show", help="the kernel's counters of every host")
    commands.add_parser("down", help="remove this lab and what killed programs left")
    options = parser.parse_args()
    if (why := missing()) is not None:
        print(f"lab: {why}", file=sys.stderr)
        return 2
    try:
        if options.command == "up":
            lab = Lab(options.hosts, options.rate, congestion=options.congestion, mtu=options.mtu, owner=OF_CLI)
            remove_leftovers(also_cli=True)
            lab.up()
        elif options.command == "down":
            print(" ".join(remove_leftovers(also_cli=True)) or "nothing to remove")
        elif options.command == "rate":
            _standing().shape(options.rate)
        elif options.command == "show":
            lab = _standing()
            for i in range(lab.hosts):
                print(lab.name(i), lab.address(i), lab.counters(i))
        else:
            ended = _standing().run(options.words, timeout=options.timeout)
            for one in ended:
                print(f"--- host {one.host}: {'time limit' if one.code is None else f'exit {one.code}'}\n{one.output}")
            return max(124 if one.code is None else abs(one.code) for one in ended)
    except (ValueError, RuntimeError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
