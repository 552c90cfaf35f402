"""DeepSpeed's ZeRO stages 1 and 2, made by accelerate, in the place of DDP and AdamW.

What is notable: nothing of a run changes but who holds the optimizer's state. The weights stay fp32 and the forward
pass runs under the same autocast as with DDP, the optimizer is the same AdamW (of each rank's share), and loss,
clipping and skipped updates are what DDP makes of them: curves lie on each other, checkpoints hold the same weights.

DeepSpeed averages gradients over ranks as DDP does; its division by accumulation steps is left out, the trainer's loss
is normalised by the target tokens of the whole update already.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import precision

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

BUCKET = 1 << 24
"""Elements exchanged at a time; DeepSpeed's own 5e8 would take 2 GB of memory for its buffer."""


def plugin(zero_stage: int, clip_norm: float) -> DeepSpeedPlugin:
    """What `Accelerator(deepspeed_plugin=...)` takes, for `train.engine: deepspeed`.

    Args:
        zero_stage: 1 splits the optimizer's state, 2 the gradients as well.
        clip_norm: of the whole gradient; 0 does not clip.

    Raises:
        ValueError: DeepSpeed is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it looks for one, and warns
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # the trainer itself tells of skipped updates
    try:
        deepspeed: Any = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ValueError(f"train.engine: deepspeed is not installed (pip install tenko[deepspeed]): {error}") from None
    # For inference only, and compiled on the spot: a compiler need not be there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from accelerate.utils import DeepSpeedPlugin

    class Plugin(DeepSpeedPlugin):
        def set_deepspeed_weakref(self) -> None:
            """Nothing: this would tell transformers, which need not be installed, of ZeRO-3."""

    return Plugin(
        hf_ds_config={
            "zero_optimization": {
                "stage": zero_stage,
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
            },
            "gradient_clipping": clip_norm,
            "train_micro_batch_size_per_gpu": 1,  # only counted with: batches are cut by tokens
            "gradient_accumulation_steps": 1,  # the engine is told of each batch whether it is the last
            "steps_per_print": None,
        }
    )


class ZeroEngine:
    """The wrapped model together with its optimizer, split among the ranks.

    Args:
        accelerator: made with `plugin`, in a run of at least two ranks.
        module: gives the loss; its fp32 weights are on the accelerator's device.
        optimizer: of the module's parameters; its state must be of their shapes or scalars (Adam's is).
        precision_name: fp32 or bf16, as `precision.resolve` gives it.

    Raises:
        ValueError: the precision needs a loss scaler, which the engine does not have.
    """

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, precision_name: str
    ) -> None:
        if precision_name == "fp16":
            raise ValueError("train.precision: must be fp32 or bf16 with train.engine: deepspeed, is fp16")
        device = next(module.parameters()).device
        inside = _Autocast(module, precision_name, device)
        self._engine, _ = accelerator.prepare(inside, optimizer)
        self._zero = self._engine.optimizer
        # DeepSpeed has put this rank's share of the parameters into its groups; the learning rate is still set there.
        self._optimizer = optimizer

    @property
    def wrapped(self) -> nn.Module:
        """What to call for the loss."""
        return self._engine

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add to the gradients; they are averaged over the ranks in the last backward pass before `step`."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> tuple[Tensor, Tensor]:
        """Clip, update and share the weights, unless a gradient is not finite on any rank.

        Returns:
            Global gradient norm before clipping, and 1.0 if the update was skipped, else 0.0.
        """
        self._engine.step()
        device = self._engine.device
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=device)
        return norm, torch.as_tensor(float(self._zero.overflow), device=device)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state of this rank's share: save it on every rank. The weights are the model's own."""
        return {"optimizer": self._optimizer.state_dict(), "share": self._share()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on where `state_dict` was taken; the model's weights are loaded already.

        Args:
            state: None if nothing was saved for this rank.

        Raises:
            ValueError: it is of another number of ranks, or of DDP.
        """
        share = self._share()
        if state is None or state["share"] != share:
            saved = "not there" if state is None else f"for a share of {sum(state['share'])} elements"
            raise ValueError(
                f"train.engine: this rank's state of the optimizer is {saved}, its share is {sum(share)}; "
                "with deepspeed a run goes on with the engine and the number of workers it was cut with"
            )
        self._optimizer.load_state_dict(state["optimizer"])
        self._zero.refresh_fp32_params()  # its own copy of this rank's share of the weights

    def _share(self) -> list[int]:
        return [p.numel() for p in _parameters(self._optimizer)]


class _Autocast(nn.Module):
    """Autocast begun inside the engine: it ends one that was begun outside."""

    def __init__(self, module: nn.Module, precision_name: str, device: torch.device) -> None:
        super().__init__()
        self.module, self.precision, self.device = module, precision_name, device

    def forward(self, sample: Any) -> Any:
        with precision.autocast(self.precision, self.device):
            return self.module(sample)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
