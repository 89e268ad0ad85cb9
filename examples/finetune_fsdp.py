"""Continues a nanoGPT run in several processes with FSDP2, which splits every tensor and every moment between them.

The loop is plain, as in train.py, with Transformers' model. The data come from shakespeare_sample.py.

Run: sh examples/finetune_fsdp.sh, or torchrun --nproc-per-node 2 examples/finetune_fsdp.py DATA_FOLDER CKPT_TO_WRITE
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hugging_nano_gpt import NanoGPTLMHeadModel, read_checkpoint
from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.training import (
    NanoGPTSchedule,
    RandomOffsetSampler,
    TokenDataset,
    collate_windows,
    make_optimizer,
    read_optimizer,
)


def main(data_dir: Path, path: Path, n_updates: int = 10) -> None:
    """Trains together with the other processes, and writes a checkpoint."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH).train()
    state = read_checkpoint(CKPT_PATH).training_state
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # After sharding, because the moments are split like the tensors.
    optimizer = make_optimizer(model, state=state.optimizer)
    schedule = NanoGPTSchedule(optimizer, state.config, iter_num=state.iter_num)
    dataset = TokenDataset(data_dir / "train.bin", model.config.block_size)
    losses = []
    for offsets in RandomOffsetSampler(dataset, batch_size=8, n_batches=n_updates, rank=dist.get_rank()):
        loss = model(**collate_windows([dataset[offset] for offset in offsets])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), state.config["grad_clip"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())

    iter_num = state.iter_num + n_updates
    moments = read_optimizer(optimizer, model)  # every process gathers, process 0 writes
    model.to_nanogpt_ckpt(path, optimizer=moments, iter_num=iter_num, overwrite=True)
    if dist.get_rank() == 0:
        written = read_checkpoint(path).training_state
        assert {int(kept["step"]) for kept in written.optimizer.moments.values()} == {written.iter_num} == {iter_num}
        assert losses[-1] < losses[0]
        print(f"Split in {dist.get_world_size()}: iteration {iter_num}, loss {losses[0]:.4f} to {losses[-1]:.4f}.")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
