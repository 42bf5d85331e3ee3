"""What do real gradients look like? Records those of small trainings for `evenkeel bench codes --gradients`.

python benchmarks/record_gradients.py --task mlp --data train-images-idx3-ubyte.xz --out mlp.npz
python benchmarks/record_gradients.py --task convnet --data cifar10.parquet --out convnet.npz
python benchmarks/record_gradients.py --task transformer --data book.txt --out transformer.npz

The tasks are those of `evenkeel bench gradients`. One process trains for all workers: each has its own part of a step's
examples, and the mean of their gradients moves the weights. Kept are every worker's gradient at an early, a middle and
the last step, and the means of the few steps before each, which codes that learn from the past start with. A file holds
4 bytes * 3 moments * (workers + earlier) * parameters: 250 MB for the MLP, 20 to 70 MB for the others.
"""

import tempfile
from collections import deque
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from evenkeel.bench.codes.recorded import Moment, Recorded, write_gradients
from evenkeel.bench.codes.vectors import correlation_of
from evenkeel.bench.gradients.data import read_data
from evenkeel.bench.gradients.tasks import TrainingTask, open_task


def gradient_of(
    model: nn.Module, task: TrainingTask, seed: int, step: int, rank: int, world: int, batch: int
) -> torch.Tensor:
    model.zero_grad()
    task.loss(model, seed, step, rank, world, batch).backward()
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


def record(task: TrainingTask, name: str, steps: int, workers: int, batch: int, earlier: int, seed: int) -> Recorded:
    torch.manual_seed(seed)
    model = task.model()
    optimizer = task.optimizer(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    kept_at = {max(earlier, steps // 20): "early", max(earlier, steps // 2): "mid", steps - 1: "late"}
    before: deque[NDArray[np.float32]] = deque(maxlen=earlier)
    moments = {}
    with click.progressbar(range(steps), label=name) as all_steps:
        for step in all_steps:
            own = torch.stack([gradient_of(model, task, seed, step, rank, workers, batch) for rank in range(workers)])
            if step in kept_at:
                moments[kept_at[step]] = Moment(own.numpy(), np.array(before, np.float32).reshape(-1, own.shape[1]))
            mean = own.mean(0)
            before.append(mean.numpy())
            parts = mean.split([parameter.numel() for parameter in model.parameters()])
            for parameter, part in zip(model.parameters(), parts, strict=True):
                parameter.grad = part.view_as(parameter).clone()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * task.rate_factor(step, steps)
            optimizer.step()
    named = list(model.named_parameters())
    return Recorded(name, tuple(key for key, _ in named), tuple(tuple(value.shape) for _, value in named), moments)


@click.command()
@click.option("--task", "name", type=click.Choice(["mlp", "convnet", "transformer"]), required=True)
@click.option("--data", type=click.Path(path_type=Path), help="Images (IDX, npz, Parquet, ...) or text; else made up.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--steps", type=click.IntRange(3), default=200, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=8, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Of each worker.")
@click.option("--earlier", type=click.IntRange(0), default=8, show_default=True, help="GradiVeQ needs 4 or more.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(
    name: str, data: Path | None, out: Path, steps: int, workers: int, batch: int, earlier: int, seed: int
) -> None:
    if earlier >= steps:
        raise click.UsageError(f"--earlier {earlier} steps must be fewer than --steps {steps}")
    torch.set_num_threads(1)
    found = read_data(name, {name: data})
    with tempfile.TemporaryDirectory() as folder:
        found.save(Path(folder))
        task = open_task(name, Path(folder), found.classes)
        recorded = record(task, name, steps, workers, batch, earlier, seed)
    write_gradients(out, recorded)
    for moment, kept in recorded.moments.items():
        cosine = correlation_of(torch.from_numpy(kept.workers))
        told = "" if cosine is None else f", correlation {cosine:.3f} between workers"
        click.echo(f"{moment}: {kept.workers.shape[1]:,} coordinates{told}")
    click.echo(f"{out} ({found.source} data)")


if __name__ == "__main__":
    main()
