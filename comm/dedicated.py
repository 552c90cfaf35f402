"""Dedicated parameter servers, seen from a worker: an optimizer whose update happens elsewhere.

    mpirun -n 4 python worker.py : -n 2 python -m tenko.comm.dedicated

and in worker.py, in place of torch.optim.AdamW, and without DDP:

    optimizer = DedicatedServer(model.named_parameters(), lr=1e-3, bits=3, weight_bits=4)
    ...
    loss.backward()
    optimizer.step()

Workers push their clipped, quantized gradients, each server its shard's; servers average, update the full-precision
weights and quantize them; workers pull those. Synchronous: all workers hold the same bits after every update. See
docs/parameter_server.md.

Source: Hou, Zhang & Kwok, "Analysis of Quantized Models", ICLR 2019.
"""

from __future__ import annotations

import atexit
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import mpi_link as wire
from . import server_state
from .dedicated_worker import WorkerEnd
from .server_config import ServerConfig, Tensors

FORMAT = "tenko-worker-1"


class DedicatedServer(torch.optim.Optimizer):
    """AdamW on dedicated servers.

    Made on all workers together; their models become equal then: worker 0's weights, as quantized.

    Args:
        named_parameters: of the model; those that need no gradient come from worker 0 once, and stay as they are.
        comm: an mpi4py communicator of all workers and servers; default COMM_WORLD. Or the `Link` of a program that
            has met them already, and lets the servers go itself.
        lr: learning rate; `param_groups[0]["lr"]` goes along with every update, so torch's schedulers work.
        settings: fields of `ServerConfig`.

    Raises:
        ValueError: a setting is wrong, there are no servers, or no mpi4py.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Tensor]], *, comm: Any = None, lr: float = 1e-3, **settings: Any
    ) -> None:
        self._own_link = not isinstance(comm, wire.Link)
        self._undo = wire.abort_on_exceptions(comm) if self._own_link else lambda: None
        known = ServerConfig.__dataclass_fields__
        for key in sorted(settings.keys() - known.keys()):
            raise ValueError(f"{key}: no such setting; there are lr, {', '.join(known)}")
        config = ServerConfig(**settings)
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr: must be finite and at least 0, is {lr}")
        named = list(named_parameters)
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        for name, parameter in trained:
            if parameter.is_complex():
                raise ValueError(f"named_parameters: {name} is complex; servers take real numbers only")
        if not trained:
            raise ValueError("named_parameters: none of them needs a gradient")
        super().__init__([parameter for _, parameter in named], {"lr": lr})
        self._parameters = [parameter for _, parameter in trained]
        tensors = Tensors(
            tuple(name for name, _ in trained),
            tuple(parameter.numel() for parameter in self._parameters),
            tuple(p.shape[-1] if p.dim() > 1 else 0 for p in self._parameters),
        )
        link = comm if isinstance(comm, wire.Link) else wire.join(wire.WORKER, comm)
        self.updates = 0
        """Calls of `step`, the skipped ones too; part of the rounding's key."""
        self.skipped = False
        """Whether the last update was not made, as a gradient was not finite."""
        self._end: WorkerEnd | None = WorkerEnd(link, config, tensors)
        self._end.hello(self._parameters, [parameter for _, parameter in named if not parameter.requires_grad])
        self._end.pull(self._parameters, wire.JOIN_TIMEOUT)
        self.meter = self._end.meter
        """Up: bytes that this worker pushed. Down: bytes of weights that it pulled (the servers sent those)."""
        atexit.register(self.close)

    @property
    def _open(self) -> WorkerEnd:
        if self._end is None:
            raise ValueError("optimizer: closed; the servers have gone")
        return self._end

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, weight: float = 1.0) -> Any:
        """Pushes the gradients, waits for the servers, and puts the weights they send into the model.

        Args:
            closure: as torch's optimizers take it.
            weight: of this worker's gradient in the mean over the workers; its number of tokens, where the loss is a
                mean over its own tokens. Asynchronous: not used.

        Returns:
            What the closure returned; without one, whether the update was made. It is not where a worker's gradient was
            not finite, on all workers alike (asynchronous: on that worker).

        Raises:
            Silence: a server is not there any more; the message names it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not 0 < weight < math.inf:
            raise ValueError(f"weight: must be finite and above 0, is {weight}")
        end = self._open
        gradients = [parameter.grad for parameter in self._parameters]
        end.push(gradients, update=self.updates, lr=float(self.param_groups[0]["lr"]), weight=weight)
        self.updates += 1
        self.skipped = not end.receive(self._parameters, end.config.timeout)
        if self.skipped and end.feedback is not None:
            end.feedback.clear()
        return loss if closure is not None else not self.skipped

    def save(self, folder: str | Path) -> None:
        """Saves what servers and workers need to go on; all workers call it after the same number of updates.

        The two latest are kept. The model's buffers and the position in the data are the program's own to save.

        Args:
            folder: all workers and servers must see it.

        Raises:
            OSError: it cannot be written; earlier ones are intact, and training can go on.
        """
        end, folder = self._open, Path(folder).absolute()
        here = server_state.folder_of(folder, self.updates)
        state = self.state_dict()
        residuals = {f"feedback.{index}": tensor for index, tensor in (state.pop("feedback") or {}).items()}
        problem = None
        try:
            facts = {"format": FORMAT, "state": json.dumps(state)}
            server_state.write(here / f"worker-{end.index}.safetensors", residuals, facts)
        except OSError as error:
            problem = error  # raised later: the other workers are on their way to the servers
        failure = end.ask(wire.SAVE, str(here) if problem is None else "")
        if problem is not None or failure:
            raise problem or OSError(failure)
        if end.index == 0:
            server_state.complete(folder, self.updates, workers=len(end.link.workers), servers=len(end.link.servers))

    def load(self, folder: str | Path) -> int:
        """Goes on from the latest update that was saved; all workers call it, before the first update.

        Returns:
            The number of updates made; 0 where nothing was saved yet.

        Raises:
            ValueError: what was saved is damaged, or of another model, or of other numbers of workers or servers.
        """
        end, folder = self._open, Path(folder).absolute()
        found = server_state.updates(folder)
        if not found:
            return 0
        server_state.check(folder, found[-1], workers=len(end.link.workers), servers=len(end.link.servers))
        here = server_state.folder_of(folder, found[-1])
        tensors, facts = server_state.read(here / f"worker-{end.index}.safetensors")
        try:
            state = json.loads(facts["state"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{here}: worker-{end.index}.safetensors: damaged ({error})") from None
        failure = end.ask(wire.LOAD, str(here))
        if failure:
            raise ValueError(failure)
        self.load_state_dict({**state, "feedback": {name.split(".")[1]: tensor for name, tensor in tensors.items()}})
        end.pull(self._parameters, end.config.timeout)
        return self.updates

    @property
    def norm(self) -> float:
        """Of the mean gradient of all workers in the last update that was made, before it was clipped."""
        return self._open.norm

    @torch.no_grad()
    def pull(self) -> None:
        """Takes the weights as the servers have them now; asynchronous workers hold older ones."""
        self._open.pull(self._parameters, self._open.config.timeout)

    def fetch(self) -> dict[str, Any]:
        """`state_dict`, and the states of the servers that this worker keeps; all workers call it after as many
        updates, and each saves what it gets."""
        return {
            **DedicatedServer.state_dict(self),
            "servers": {str(index): state for index, state in self._open.fetch().items()},
        }

    @torch.no_grad()
    def put(self, state: dict[str, Any]) -> None:
        """Goes on where `fetch` was called; all workers together, before the first update.

        Raises:
            ValueError: something is missing, or of another model or number of servers.
        """
        end = self._open
        kept = state.get("servers") or {}
        if failure := end.put({int(index): saved for index, saved in kept.items()}):
            raise ValueError(f"server: {failure}")
        self.pull()  # first, so that the meter counts what an uncut run would have sent
        DedicatedServer.load_state_dict(self, {key: value for key, value in state.items() if key != "servers"})

    def state_dict(self) -> dict[str, Any]:
        """This worker's part: counts, learning rate, meter, error feedback. The weights are the servers'."""
        end = self._open
        feedback = None if end.feedback is None else end.feedback.state_dict()
        lr = float(self.param_groups[0]["lr"])
        return {"updates": self.updates, "lr": lr, "meter": end.meter.state_dict(), "feedback": feedback}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Raises ValueError when something is missing or does not fit."""
        end = self._open
        for key in ("updates", "lr", "meter", "feedback"):
            if key not in state_dict:
                raise ValueError(f"server.{key}: missing in the saved state; it has {', '.join(sorted(state_dict))}")
        residuals = state_dict["feedback"] or {}
        for index, tensor in residuals.items():
            numel = dict(enumerate(end.tensors.numels)).get(int(index))
            if tensor.shape != (numel,):
                raise ValueError(f"server.feedback.{index}: must be [{numel}], is {list(tensor.shape)}")
        end.meter.load_state_dict(state_dict["meter"])
        self.updates = int(state_dict["updates"])
        self.param_groups[0]["lr"] = float(state_dict["lr"])
        if end.feedback is not None:
            end.feedback.load_state_dict(residuals)

    def close(self) -> None:
        """Lets the servers go; they end when all workers have closed. The interpreter calls it at its end."""
        end, self._end = self._end, None
        if end is not None:
            self._undo()
            atexit.unregister(self.close)
            end.bye(last=self._own_link)


if __name__ == "__main__":
    from tenko.comm.dedicated_server import main

    sys.exit(main())
