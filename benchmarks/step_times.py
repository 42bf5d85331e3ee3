"""How near do the timing formulas come to what a training step really takes?

evenkeel lab run --hosts 4 --rate 100mbit -- python benchmarks/step_times.py [--json FILE]

Measures the group's link, one worker's own step and the code, predicts from those alone, and then trains: synchronous
(gradients in one piece, after the backward pass), layer-wise (plain DDP; in bf16 by a hook of its own, since torch's
refuses Gloo; with THC), and pipelined by Pipe-SGD, plain and with THC. The model is a perceptron for 28 x 28 images;
what it learns does not matter here.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from output import show, write_json
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

import evenkeel
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.training.plan.code_costs import bf16
from evenkeel.training.plan.measure import group_from_environment, measure_link, measure_step
from evenkeel.training.plan.measure_code import measure_code
from evenkeel.training.plan.timing import CodeCost, Schedule, Step, fp32, step_s

_FIRST_STEPS = 5  # DDP makes its buckets anew after the first, hooks compress from the third on


def model_of(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def halved(state: object, bucket: dist.GradBucket) -> Future[Tensor]:
    values = bucket.buffer()
    sent = values.to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(sent, async_op=True).get_future()
    return future.then(lambda done: values.copy_(done.value()[0]))


def mean_s(step: Callable[[], object], steps: int) -> float:
    """Seconds a step, of many in a row: what one step leaves travelling, the next ones have to wait for."""
    for _ in range(_FIRST_STEPS):
        step()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


def conversion_ns(parameters: int) -> float:
    values = torch.randn(parameters)
    began = time.perf_counter()
    for _ in range(5):
        values.to(torch.bfloat16)
    return (time.perf_counter() - began) / 5 / parameters * 1e9


@click.command()
@click.option("--width", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=256, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(width: int, batch: int, steps: int, json_path: Path | None) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    images, labels = torch.randn(batch, 784), torch.randint(10, (batch,))
    with group_from_environment("gloo") as rank:
        found = measure_link()
        rows = []

        def compare(code: CodeCost, schedule: Schedule, step: Step, train: Callable[[], object]) -> None:
            predicted_s = step_s(found.link, found.workers, step, code, schedule)
            measured_s = mean_s(train, steps)
            rows.append(
                {
                    "code": code.name,
                    "schedule": schedule,
                    "predicted_ms": predicted_s * 1e3,
                    "measured_ms": measured_s * 1e3,
                    "error": measured_s / predicted_s - 1,
                    "compute_ms": step.compute_s * 1e3,
                }
            )

        def trainer(module: nn.Module) -> tuple[Callable[[], Tensor], torch.optim.Optimizer]:
            optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
            return lambda: nn.functional.cross_entropy(module(images), labels), optimizer

        plain = model_of(width)
        loss_of, optimizer = trainer(plain)
        count = sum(parameter.numel() for parameter in plain.parameters())
        dist.barrier()
        own = measure_step(loss_of, lambda loss: loss.backward(), optimizer.step, count)

        def synchronous() -> None:
            optimizer.zero_grad()
            loss_of().backward()
            gradients = [parameter.grad for parameter in plain.parameters() if parameter.grad is not None]
            whole = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(whole)
            pieces = whole.div_(found.workers).split([gradient.numel() for gradient in gradients])
            for gradient, piece in zip(gradients, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))
            optimizer.step()

        compare(fp32(count), "synchronous", own, synchronous)
        half = conversion_ns(count)
        dist.barrier()
        thc = measure_code(ErrorFeedback(evenkeel.THC(bits=4)), count, found.link, name="thc")
        coded: list[tuple[CodeCost, Schedule, Callable[[], tuple[Any, Any] | None]]] = [
            (fp32(count), "layer-wise", lambda: None),
            (bf16(count, half, half), "layer-wise", lambda: (None, halved)),
            (thc, "layer-wise", lambda: (evenkeel.HookState(evenkeel.THC(bits=4)), evenkeel.comm_hook)),
            (fp32(count), "pipelined", lambda: (evenkeel.PipeSGD(), evenkeel.comm_hook)),
            (
                thc,
                "pipelined",
                lambda: (evenkeel.PipeSGD(evenkeel.HookState(evenkeel.THC(bits=4))), evenkeel.comm_hook),
            ),
        ]
        for code, schedule, hooked in coded:
            wrapped = DistributedDataParallel(model_of(width))
            made = hooked()
            if made is not None:
                wrapped.register_comm_hook(*made)
            wrapped_loss, wrapped_optimizer = trainer(wrapped)

            def train(loss_of: Any = wrapped_loss, optimizer: Any = wrapped_optimizer) -> None:
                optimizer.zero_grad()
                loss_of().backward()
                optimizer.step()

            compare(code, schedule, own, train)
    if rank == 0:
        title = (
            f"{found.workers} workers, {found.link.rate_bps / 1e6:.1f} Mbit/s measured, {count / 1e6:.2f} M parameters"
        )
        show(
            title,
            rows,
            {
                "code": ("code", ""),
                "schedule": ("schedule", ""),
                "compute_ms": ("compute ms", ".1f"),
                "predicted_ms": ("predicted ms", ".1f"),
                "measured_ms": ("measured ms", ".1f"),
                "error": ("error", "+.1%"),
            },
        )
        write_json(json_path, {"width": width, "batch": batch, "steps": steps, "workers": found.workers}, rows)


if __name__ == "__main__":
    main()
