"""A complete DistributedDataParallel training whose gradients travel in 4 bits: two lines more than without.

    torchrun --nproc-per-node 4 examples/ddp_with_thc.py            # or --no-compression

Data: ten classes of random images, made up on the spot; --data FILE.npz with arrays `images` and `labels` for your own.
"""

import argparse
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import evenkeel


def dataset(path: str | None) -> TensorDataset:
    if path is not None:
        with np.load(path) as arrays:
            return TensorDataset(
                torch.tensor(arrays["images"]).float().flatten(1), torch.tensor(arrays["labels"]).long()
            )
    chance = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, [8192], generator=chance)
    centres = torch.randn(10, 784, generator=chance)
    return TensorDataset(centres[labels] + 4 * torch.randn(8192, 784, generator=chance), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="npz file with images [n, ...] and labels [n]")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--no-compression", action="store_true", help="train without the two lines")
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    samples = dataset(arguments.data)
    sampler = DistributedSampler(samples)
    batches = DataLoader(samples, batch_size=64, sampler=sampler)
    features, classes = samples.tensors[0].shape[1], int(samples.tensors[1].max()) + 1
    model = nn.Sequential(nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, classes))

    ddp_model = DistributedDataParallel(model)
    if not arguments.no_compression:
        state = evenkeel.HookState(evenkeel.THC(bits=4))
        ddp_model.register_comm_hook(state, evenkeel.comm_hook)

    optimizer = torch.optim.SGD(ddp_model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        begin, right = time.perf_counter(), 0
        for images, labels in batches:
            scores = ddp_model(images)
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, labels).backward()
            optimizer.step()
            right += int((scores.argmax(1) == labels).sum())
        if dist.get_rank() == 0:
            accuracy = right / len(sampler)
            print(f"epoch {epoch}: {accuracy:.1%} right while training, {time.perf_counter() - begin:.1f} s")
    if dist.get_rank() == 0 and not arguments.no_compression:
        stats = state.stats()
        print(f"sent {stats.sent_bytes / 1e6:.1f} MB per rank instead of {stats.uncompressed_bytes / 1e6:.1f} MB")
        print(f"pays on links below {stats.break_even_bps / 1e6:.0f} Mbit/s per rank")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
