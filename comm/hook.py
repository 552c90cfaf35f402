"""The routes: quantized all-reduce, and plain fp32 all-reduce to compare it with.

Randomness is keyed by (seed, step, tensor, rank) and a tensor's blocks, never by bucket: DDP rebuilds its
buckets after the first update, and a resumed run, whose buckets are the first ones again, must still round as
the uncut run did.
"""

# No `from __future__ import annotations`: see route.py.

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .collectives import BucketPlan, mean_in_place
from .config import CommConfig, default_block
from .feedback import ErrorFeedback
from .quantizer import Quantizer
from .route import Route
from .worker import Worker


class QuantizedAllReduce(Route):
    """Quantized gradients up to the owners of shards, quantized means down: tells DDP the mean over all ranks.

    On a CPU (gloo) buckets are exchanged by one thread, over a process group of the hook's own, while backward goes on.
    On CUDA (NCCL) the same algorithm runs on the current stream, in torch operations. The arithmetic of those is
    tested; the exchange over NCCL has not been run on several GPUs, as there were none at hand.

    Args:
        bits: bits an element on the way up, 2, 3, 4 or 8.
        bits_down: bits an element on the way down. More than up costs little: the second rounding hits the mean.
        clip: clip to so many standard deviations of a block, on both legs; 0 does not clip.
        block: elements that share a scale and a sigma, a multiple of 8; 0 takes 128, or 256 where a leg has 2 bits.
        error_feedback: add to a gradient what quantization left out of the one before (4 bytes a parameter, saved by
            `state_dict`). It is dropped when a gradient is not finite.
        seed: of the stochastic rounding; must be the same on all ranks.

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
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._feedback = ErrorFeedback() if error_feedback else None
        self._finite = True
        block = block or default_block(bits, bits_down)
        self.up = Quantizer(bits=bits, clip=clip, block=block)
        try:
            self.down = Quantizer(bits=bits_down, clip=clip, block=block)
        except ValueError as error:
            raise ValueError(str(error).replace("bits:", "bits_down:")) from None
        self.seed = seed
        self._plans: dict[tuple[int, ...], BucketPlan] = {}
        self._worker: Worker | None = None
        self._own_group: dist.ProcessGroup | None = None

    def bind(self, model: DistributedDataParallel) -> None:
        super().bind(model)
        if self.world_size > 1 and model.device.type == "cpu":
            from . import kernels  # noqa: F401  (compiled or loaded here, before the first exchange)

            # The hook's thread and the caller's must not mix their collectives in one group.
            ranks = dist.get_process_group_ranks(self.group)
            everybody = len(ranks) == dist.get_world_size()
            self._own_group = dist.new_group(ranks, backend="gloo", use_local_synchronization=not everybody)
            self._worker = Worker("tenko-exchange")

    def _exchange(self, buffer: Tensor, bucket: dist.GradBucket, step: int) -> torch.futures.Future[Tensor]:
        plan, last = self._plan(bucket, buffer), bucket.is_last()
        if self._worker is not None:

            def job() -> Tensor:
                self._mean(buffer, plan, step, self._own_group)
                self._forget_after_overflow(buffer, last)
                return buffer

            return self._worker.submit(job)
        residual = self._mean(buffer, plan, step, self.group)
        if residual is not None:  # no look at the values here: it would wait for the device
            residual.masked_fill_(~torch.isfinite(buffer.sum()), 0)
        done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device])
        done.set_result(buffer)
        return done

    def _mean(self, buffer: Tensor, plan: BucketPlan, step: int, group: dist.ProcessGroup | None) -> Tensor | None:
        residual = None
        if self._feedback is not None:
            residual = self._feedback.flat(plan.tensors, plan.numels, buffer.device)
        mean_in_place(buffer, plan, seed=self.seed, step=step, group=group, meter=self.meter, residual=residual)
        return residual

    def _forget_after_overflow(self, buffer: Tensor, last: bool) -> None:
        """Drop all residuals if any bucket of this gradient was not finite: its update will be skipped."""
        if self._feedback is None:
            return
        self._finite = self._finite and bool(torch.isfinite(buffer.sum()))
        if last:
            if not self._finite:
                self._feedback.clear()
            self._finite = True

    def _plan(self, bucket: dist.GradBucket, buffer: Tensor) -> BucketPlan:
        parameters = bucket.parameters()
        tensors = tuple(self._index[id(parameter)] for parameter in parameters)
        if tensors not in self._plans:
            numels = tuple(parameter.numel() for parameter in parameters)
            assert sum(numels) == buffer.numel(), (numels, buffer.shape)
            self._plans[tensors] = BucketPlan(
                tensors, numels, self.rank, self.world_size, self.up, self.down, buffer.device
            )
        return self._plans[tensors]

    def state_dict(self) -> dict[str, Any]:
        feedback = None if self._feedback is None else self._feedback.state_dict()
        return {**super().state_dict(), "seed": self.seed, "feedback": feedback}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "seed" not in state:
            raise ValueError(f"comm.seed: missing in the saved state; it has {', '.join(sorted(state))}")
        super().load_state_dict(state)
        self.seed = int(state["seed"])
        if self._feedback is not None and state.get("feedback") is not None:
            self._feedback.load_state_dict(state["feedback"])

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._own_group is not None and dist.is_initialized():
            dist.destroy_process_group(self._own_group)
        self._own_group = None


class AllReduce(Route):
    """Plain all-reduce in the gradients' own type, metered: what DDP does without a hook."""

    def _exchange(self, buffer: Tensor, bucket: dist.GradBucket, step: int) -> torch.futures.Future[Tensor]:
        n = self.world_size
        leg = buffer.numel() * buffer.element_size() * (n - 1) // n  # of a ring; half of it reduces, half gathers
        self.meter.count(up=leg, down=leg, numel=buffer.numel(), world_size=n)
        buffer.div_(n)  # before the sum, as DDP does: fp16 overflows later
        work = dist.all_reduce(buffer, group=self.group, async_op=True)
        return work.get_future().then(lambda finished: finished.value()[0])


def make_route(config: CommConfig, seed: int) -> Route:
    """The route that a recipe's `comm:` asks for."""
    if config.route == "fp32":
        return AllReduce()
    return QuantizedAllReduce(
        config.bits, config.bits_down, config.clip, config.block, error_feedback=config.error_feedback, seed=seed
    )
