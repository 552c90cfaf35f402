"""The routes over lanes: quantized all-reduce, fp16, and the split; and plain fp32 all-reduce to compare them with.

Randomness is keyed by (seed, step, tensor, rank) and a tensor's blocks, never by bucket: DDP rebuilds its buckets after
the first update, and a resumed run, whose buckets are the first ones again, must still round as the uncut run did.
"""

# No `from __future__ import annotations`: see route.py.

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import default_block
from .exchanger import Exchanger, StreamExchanger, ThreadExchanger
from .feedback import ErrorFeedback
from .lanes import Bucket, Context, Lane, PlainLane, Portion, QuantizedLane
from .link import Exchange, GroupLink, Link
from .quantizer import Quantizer
from .route import Route
from .split import plain_name, weight_shapes

TAGS = 8
"""Tags of the link that one exchange may use."""


@dataclass
class _Gradient:
    """The exchange of one whole gradient, bucket by bucket."""

    step: int
    started: int = 0
    ended: int = 0
    finite: list[Tensor] = field(default_factory=list)
    """Of every exchange that has ended: whether its values are finite."""
    calls: list[Callable[[], None]] = field(default_factory=list)
    received: dict[int, Tensor] = field(default_factory=dict)

    # A handle (see link.py) of all exchanges but the one that waits for it: they run on the same thread.

    def wait(self) -> None:
        assert self.ended == self.started, "exchanges that run in order have ended by now"

    def then(self, call: Callable[[], None]) -> None:
        if self.ended == self.started:
            call()
        else:
            self.calls.append(call)

    def check(self) -> None:
        """Never fails by itself."""

    def end(self, finite: Tensor) -> None:
        """One more has ended."""
        self.ended += 1
        self.finite.append(finite)
        if self.ended == self.started:  # final, once somebody waits
            calls, self.calls = self.calls, []
            for call in calls:
                call()


class LaneRoute(Route):
    """A route that gives each tensor of a bucket to a lane.

    On a CPU (gloo) exchanges run on threads of their own, over sockets between all ranks, while backward goes on. On
    CUDA (NCCL) the same algorithms run in torch operations on a stream of their own. The arithmetic of those is tested;
    they have not been run over NCCL on several GPUs, as there were none at hand.

    Args:
        lanes: by the names that `_assign` gives.
        seed: of the stochastic rounding; must be the same on all ranks.
        error_feedback: whether residuals are kept.
        levels: "node": two levels, for lanes that know nodes.
        timeout: seconds to wait for a rank before giving it up.

    Raises:
        ValueError: the timeout is no number of seconds.
    """

    def __init__(
        self,
        lanes: dict[str, Lane],
        *,
        seed: int = 0,
        error_feedback: bool = False,
        levels: Literal["flat", "node"] = "flat",
        timeout: float = 1800.0,
    ) -> None:
        super().__init__()
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
            raise ValueError(f"timeout: must be seconds, finite and above 0, is {timeout!r}")
        self.lanes, self.seed, self.levels, self.timeout = lanes, seed, levels, timeout
        self._feedback = ErrorFeedback() if error_feedback else None
        self._shapes: list[torch.Size] = []
        self._link: Link | None = None
        self._exchanger: Exchanger | None = None
        self._portions: dict[tuple[int, ...], list[tuple[Lane, Portion]]] = {}
        self._gradient: _Gradient | None = None
        self._tag = 0
        self._lender: LaneRoute | None = None
        self._own_group: dist.ProcessGroup | None = None

    # Putting it on a model

    def bind(self, model: DistributedDataParallel) -> None:
        _refuse_foreign(model)
        super().bind(model)
        named = list(model.named_parameters())
        self._names = [plain_name(name) for name, _ in named]
        self._shapes = [parameter.shape for _, parameter in named]
        self._trains = [parameter.requires_grad for _, parameter in named]
        of_weights = weight_shapes(model)
        self._rule_shapes = [of_weights[name] for name in self._names]
        self._lane_of = self._assign()
        if self.world_size == 1:
            return
        device = self.device
        nodes: list[list[int]] = []
        if self.levels == "node":
            from .nodes import find_nodes

            nodes = find_nodes(self.group, device)
        self._connect(device)
        assert self._link is not None
        context = Context(self._link, device, self._shapes, self.seed, self.meter, self._feedback, nodes)
        for lane in self.lanes.values():
            lane.bind(context)

    def share(self, lender: "LaneRoute") -> None:
        """Uses the connections of another route of the same model, which takes turns with this one."""
        self._lender = lender

    def _connect(self, device: torch.device) -> None:
        if self._lender is not None:
            self._link, self._exchanger = self._lender._link, self._lender._exchanger
            return
        if device.type == "cpu":
            from . import kernels  # noqa: F401  (compiled or loaded here, before the first exchange)
            from .mesh import Mesh

            self._link = Mesh(self.group, self.timeout)
            self._exchanger = ThreadExchanger(self.timeout)
        else:
            # NCCL's sends and receives must not mix with DDP's own collectives in one communicator.
            ranks = dist.get_process_group_ranks(self.group)
            everybody = len(ranks) == dist.get_world_size()
            self._own_group = dist.new_group(ranks, use_local_synchronization=not everybody)
            self._link = GroupLink(self._own_group, device)
            self._exchanger = StreamExchanger(device)

    def _assign(self) -> list[str]:
        """The lane of every tensor of the model, by name."""
        (only,) = self.lanes
        return [only] * len(self._names)

    # One bucket

    def _exchange(self, buffer: Tensor, bucket: dist.GradBucket, step: int) -> torch.futures.Future[Tensor]:
        assert self._exchanger is not None
        if self._gradient is None:
            self._gradient = _Gradient(step)
        gradient = self._gradient
        self.meter.instead(buffer.numel(), self.world_size)
        work = buffer if buffer.dtype == torch.float32 else buffer.float()
        exchanges: list[Exchange] = []
        unused = self._unused(work, bucket)
        for lane, portion in self._plan(bucket, buffer):
            gradient.started += 1
            exchanges.append(self._tracked(lane, work, portion, gradient, self._next_tag(), unused))
        if bucket.is_last():
            exchanges.append(self._after(gradient, work))
            self._gradient = None

        def finish() -> Tensor:
            if work is not buffer:
                buffer.copy_(work)
                if work.is_cuda:  # the stream that this runs on still reads it when the one that made it forgets it
                    work.record_stream(torch.cuda.current_stream(work.device))
            return buffer

        return self._exchanger.submit(exchanges, finish)

    def _next_tag(self) -> int:
        self._tag += TAGS
        return self._tag

    def _unused(self, buffer: Tensor, bucket: dist.GradBucket) -> frozenset[int]:
        """Tensors of the bucket that have no gradient on this rank, where DDP looks for such: those that no rank used
        keep `grad` as it was, and DDP drops what their exchange gives."""
        assert isinstance(self._model, DistributedDataParallel)
        if self._feedback is None or not self._model.find_unused_parameters:
            return frozenset()
        parameters = bucket.parameters()
        parts = buffer.split([parameter.numel() for parameter in parameters])
        used = torch.stack([part.any() for part in parts]).tolist()
        return frozenset(self._index[id(p)] for p, is_used in zip(parameters, used, strict=True) if not is_used)

    def _tracked(
        self, lane: Lane, work: Tensor, portion: Portion, gradient: _Gradient, tag: int, unused: frozenset[int]
    ) -> Exchange:
        kept = self._hold_back(portion, unused)
        yield from lane.exchange(work, portion, gradient.step, tag)
        for residual, before in kept:
            residual += before
        gradient.end(lane.finite(work, portion))

    def _hold_back(self, portion: Portion, unused: frozenset[int]) -> list[tuple[Tensor, Tensor]]:
        """Error feedback waits for the next gradient of a tensor: residuals [pieces] that are 0 now, and were."""
        pieces = [(p, at) for p, at in zip(portion.pieces, portion.starts, strict=True) if p.tensor in unused]
        if not pieces or self._feedback is None:
            return []
        bucket = portion.bucket
        whole = self._feedback.flat(bucket.tensors, bucket.numels, self.device)
        residuals = [whole[at + piece.start : at + piece.start + piece.numel] for piece, at in pieces]
        kept = [(residual, residual.clone()) for residual in residuals]
        for residual in residuals:
            residual.zero_()
        return kept

    def _after(self, gradient: _Gradient, last: Tensor) -> Exchange:
        """Runs once the whole gradient has been exchanged; `last` is the buffer of the last bucket."""
        yield gradient
        yield from self._whole(gradient, last)

    def _whole(self, gradient: _Gradient, last: Tensor) -> Exchange:
        """What a route does with a whole gradient: forget the residuals of one that is not finite, and is skipped."""
        if self._feedback is not None and gradient.finite:
            self._feedback.clear_unless(torch.stack(gradient.finite).all())
        return
        yield

    def _plan(self, bucket: dist.GradBucket, buffer: Tensor) -> list[tuple[Lane, Portion]]:
        parameters = bucket.parameters()
        tensors = tuple(self._index[id(parameter)] for parameter in parameters)
        if tensors not in self._portions:
            known = Bucket(tensors, tuple(parameter.numel() for parameter in parameters))
            assert sum(known.numels) == buffer.numel(), (known.numels, buffer.shape)
            lost = [self._names[tensor] for tensor in tensors if self._lane_of[tensor] not in self.lanes]
            assert not lost, f"exchanged by no lane: {lost}"
            plan: list[tuple[Lane, Portion]] = []
            for name, lane in self.lanes.items():
                mine = [tensor for tensor in tensors if self._lane_of[tensor] == name]
                plan += [(lane, portion) for portion in lane.portions(known, mine)]
            self._portions[tensors] = plan
        return self._portions[tensors]

    # State

    def state_dict(self) -> dict[str, Any]:
        feedback = None if self._feedback is None else self._feedback.state_dict()
        return {**super().state_dict(), "seed": self.seed, "feedback": feedback}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "seed" not in state:
            raise ValueError(f"comm.seed: missing in the saved state; it has {', '.join(sorted(state))}")
        super().load_state_dict(state)
        self.seed = int(state["seed"])
        for lane in self.lanes.values():
            if hasattr(lane, "context"):
                lane.context.seed = self.seed
        if self._feedback is not None and state.get("feedback") is not None:
            self._check_residuals(state["feedback"])
            self._feedback.load_state_dict(state["feedback"])

    def _check_residuals(self, saved: dict[str, Tensor]) -> None:
        for index, residual in saved.items() if self._shapes else ():
            place = int(index)
            if not (place < len(self._shapes) and residual.numel() == self._shapes[place].numel()):
                raise ValueError(
                    f"comm.feedback: the saved state is of another model: parameter {place} has {residual.numel()} "
                    "elements there"
                )

    def close(self) -> None:
        super().close()
        if self._lender is not None:
            self._exchanger = self._link = None
        if self._exchanger is not None:
            self._exchanger.close()
            self._exchanger = None
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._own_group is not None and dist.is_initialized():
            dist.destroy_process_group(self._own_group)
        self._own_group = None


def _refuse_foreign(model: nn.Module) -> None:
    """Raises ValueError where a gradient will not be a dense one of real numbers."""
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise ValueError(f"model: {plain_name(name)} is complex; only AllReduce (route: fp32) takes that")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ValueError(f"model: {plain_name(name)} has sparse=True; only AllReduce (route: fp32) takes that")


def quantizers(
    bits: int,
    bits_down: int,
    clip: float,
    block: int,
    sigma: Literal["block", "row", "tensor"],
    rounding: Literal["stochastic", "nearest"],
) -> tuple[Quantizer, Quantizer]:
    """The quantizers of the two legs. Raises ValueError, which names `bits_down` where that is wrong."""
    if bits_down == 1:
        raise ValueError("bits_down: 1 loses what no error feedback gives back on this leg; must be 2 to 8")
    block = block or default_block(bits, bits_down)
    up = Quantizer(bits, clip, block, rounding, sigma)
    try:
        # The mean of a shard is at hand in part only: a row or a tensor would not be whole.
        return up, Quantizer(bits_down, clip, block, rounding)
    except ValueError as error:
        raise ValueError(str(error).replace("bits:", "bits_down:")) from None


class QuantizedAllReduce(LaneRoute):
    """Quantized gradients up to the owners of shards, quantized means down: tells DDP the mean over all ranks.

    Args:
        bits: bits an element on the way up, 1 to 8.
        bits_down: bits an element on the way down, 2 to 8. More than up costs little: this rounding hits the mean.
        clip: clip to so many standard deviations, on both legs; 0 does not clip.
        block: elements that share a scale, a multiple of 8; 0 takes 128, 256 at 2 bits, 512 at 1 bit.
        error_feedback: add to a gradient what quantization left out of the one before (4 bytes a parameter, saved by
            `state_dict`). It is dropped when a gradient is not finite.
        sigma: on the way up, take the standard deviation over a "block", a "row" or a "tensor".
        rounding: "stochastic" is unbiased; "nearest" has the smaller error, and a bias that error feedback mends.
        shared_scale: all ranks round to the same scales, so that the owner's sum is one of integers.
        levels: "flat"; "node" adds up in full precision inside a node, and quantizes between nodes.
        seed: of the stochastic rounding; must be the same on all ranks.
        timeout: seconds to wait for a rank before giving it up.

    Raises:
        ValueError: a setting is none of these.

    Source: Hou, Zhang & Kwok, "Analysis of Quantized Models", ICLR 2019, for the quantizer.
    """

    def __init__(
        self,
        bits: int = 3,
        bits_down: int = 4,
        clip: float = 3.0,
        block: int = 0,
        *,
        error_feedback: bool = True,
        sigma: Literal["block", "row", "tensor"] = "block",
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        shared_scale: bool = False,
        levels: Literal["flat", "node"] = "flat",
        seed: int = 0,
        timeout: float = 1800.0,
    ) -> None:
        if levels not in ("flat", "node"):
            raise ValueError(f"levels: must be flat or node, is {levels}")
        if bits == 1 and not error_feedback:
            raise ValueError("bits: 1 is a sign, whose error must be fed back; set error_feedback=True")
        up, down = quantizers(bits, bits_down, clip, block, sigma, rounding)
        self.up, self.down = up, down
        lane: Lane
        if shared_scale:
            if levels == "node":
                raise ValueError("shared_scale: not together with levels: node")
            from .shared_lane import SharedScaleLane

            lane = SharedScaleLane(up, down)
        elif levels == "node":
            from .nodes import NodesLane

            lane = NodesLane(up, down)
        else:
            lane = QuantizedLane(up, down)
        super().__init__({"all_reduce": lane}, seed=seed, error_feedback=error_feedback, levels=levels, timeout=timeout)


class HalfAllReduce(LaneRoute):
    """fp16 (or bf16) numbers both ways, added up in fp32.

    Raises:
        ValueError: another type, or the timeout is no number of seconds.
    """

    def __init__(self, dtype: torch.dtype = torch.float16, *, timeout: float = 1800.0) -> None:
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"dtype: must be torch.float16 or torch.bfloat16, is {dtype}")
        super().__init__({"fp16": PlainLane(dtype)}, timeout=timeout)


class AllReduce(Route):
    """Plain all-reduce in the gradients' own type, metered: what DDP does without a hook."""

    def _exchange(self, buffer: Tensor, bucket: dist.GradBucket, step: int) -> torch.futures.Future[Tensor]:
        n = self.world_size
        leg = buffer.numel() * buffer.element_size() * (n - 1) // n  # of a ring; half of it reduces, half gathers
        self.meter.add(up=leg, down=leg)
        self.meter.instead(buffer.numel(), n)
        buffer.div_(n)  # before the sum, as DDP does: fp16 overflows later
        work = dist.all_reduce(buffer, group=self.group, async_op=True)
        return work.get_future().then(lambda finished: finished.value()[0])
