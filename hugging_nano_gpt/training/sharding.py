"""A Trainer whose FSDP is FSDP wherever it is asked for, and rounds nothing that train.py's DDP does not."""

import contextlib
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer


class ShardingTrainer(Trainer):
    """Trainer, but for what it does with FSDP."""

    args: Any

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator as Trainer does, but that FSDP is FSDP on a CPU too, where Accelerate makes DDP of it.

        Parameters and gradients stay in float32 under FSDP, where Accelerate would round them to the half precision.
        """
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            for state in (self.accelerator.state, PartialState()):  # one takes it from the other, again and again
                state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """Autocasts as train.py does under FSDP, where Accelerate does not; elsewhere it has done so."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else contextlib.nullcontext()
