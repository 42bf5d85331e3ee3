"""Runs one worker of `evenkeel bench gradients`: trains a plan's cells in turn, each in a new process.

    RANK=0 WORLD_SIZE=4 python -m evenkeel.bench.gradients.worker PLAN.json

A plan holds `folder`, `timeout_s` and `cells`: each with its number, task, method, seed, classes and the numbers of
`Training`. What rank r measured of cell n is `<folder>/cell-<n>-rank-<r>.json`. Nothing is measured on other work: a
new process for each cell, since memory, threads and connections of one would stay for the next.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evenkeel.bench.gradients.cells import PIPE_WARM_SHARE, PROGRESS, read_slow
from evenkeel.bench.gradients.methods import Averaging, average_nothing
from evenkeel.bench.gradients.socket_bytes import socket_bytes
from evenkeel.bench.gradients.tasks import TrainingTask, open_task
from evenkeel.processes import end_with_parent

__all__ = ["main"]

_TELL_S = 0.5
_WARM_STEPS = 4  # buckets are rebuilt after one, compression begins after two
_COMPUTE_STEPS, _FIRST_STEPS = 23, 3
_SILENCE_S = 120.0  # of a peer


def main(plan_path: str) -> int:
    """Trains every cell of the plan; gives the exit code."""
    plan = json.loads(Path(plan_path).read_bytes())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for cell in plan["cells"]:
        worker, child = os.getpid(), os.fork()
        if not child:
            end_with_parent(worker)
            _leave_after(partial(_run, plan, cell, rank, world))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == -signal.SIGALRM:
            name = f"{cell['task']} with {cell['method']}"
            print(
                f"{name} took more than {plan['timeout_s']} s; allow more with --timeout", file=sys.stderr, flush=True
            )
        if status:
            return 1
    return 0


def _leave_after(work: Callable[[], None]) -> None:
    """Runs it, and ends this process at once: a group whose peer is gone can keep an orderly end waiting."""
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(plan: dict[str, Any], cell: dict[str, Any], rank: int, world: int) -> None:
    signal.alarm(plan["timeout_s"])
    torch.set_num_threads(1)
    folder, number = Path(plan["folder"]), cell["number"]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group-{number}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=_SILENCE_S),
    )
    task = open_task(cell["task"], folder / cell["task"], cell["classes"])
    trainee = _Trainee(task, cell, rank, world)
    compute_s = trainee.compute_s()
    trainee.warm_up()
    trainee.slow_down(compute_s)
    figures = trainee.train(folder / f"cell-{number}")
    figures |= {"compute_s": compute_s}
    half = folder / f"cell-{number}-rank-{rank}.part"
    half.write_text(json.dumps(figures))
    half.rename(half.with_suffix(".json"))  # whole, once it has its name


class _Trainee:
    """Does one rank's part of one training."""

    def __init__(self, task: TrainingTask, cell: dict[str, Any], rank: int, world: int) -> None:
        self._task, self._cell, self._rank, self._world = task, cell, rank, world
        self._late_s = np.zeros(0)

    def compute_s(self) -> float:
        """Measures the mean time of a step without communication, while the other ranks compute as well."""
        ddp, optimizer = self._new()
        ddp.register_comm_hook(None, average_nothing)
        dist.barrier()
        for step in range(_COMPUTE_STEPS):
            if step == _FIRST_STEPS:
                begin = time.perf_counter()
            self._step(ddp, optimizer, step)
        return (time.perf_counter() - begin) / (_COMPUTE_STEPS - _FIRST_STEPS)

    def slow_down(self, compute_s: float) -> None:
        """Makes this worker late in some steps of the training, as the cell says."""
        factor, share, everyone = read_slow(self._cell["slow"])
        if everyone or self._rank == self._world - 1:
            chosen = np.random.default_rng((self._cell["seed"], self._rank, 5)).random(self._cell["steps"]) < share
            self._late_s = np.where(chosen, (factor - 1) * compute_s, 0.0)

    def warm_up(self) -> None:
        """Takes a few steps with the method, so that nothing is loaded or compiled on the clock."""
        ddp, optimizer = self._new()
        averaging = Averaging(self._cell["method"], ddp, optimizer, switch=self._cell["switch"])
        for step in range(_WARM_STEPS):
            self._step(ddp, optimizer, step)
        averaging.flush()
        averaging.close()
        dist.barrier()

    def train(self, stem: Path) -> dict[str, Any]:
        """Trains; gives losses, times and bytes by step, and the test accuracy at some of them.

        The clock does not stop for evaluations: ranks take turns to write the weights down, and answer the test
        examples at the end. Were it stopped, sums in flight would travel meanwhile for nothing.
        """
        steps, rank = self._cell["steps"], self._rank
        ddp, optimizer = self._new()
        unpiped = round(steps * PIPE_WARM_SHARE)
        averaging = Averaging(self._cell["method"], ddp, optimizer, unpiped, self._cell["switch"])
        evaluations = min(steps, self._cell["evaluations"])
        kept = {round(steps * turn / evaluations): turn for turn in range(1, 1 + evaluations)}
        losses, times_s, sent = [], [], []
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._task.rate_factor(step, steps))
        reported_s = 0.0
        dist.barrier()
        before, begin = socket_bytes(), time.perf_counter()
        for step in range(1, steps + 1):
            loss = self._step(ddp, optimizer, step - 1)
            if step == steps and averaging.flush():
                optimizer.step()
            times_s.append(time.perf_counter())
            losses.append(float(loss))
            sent.append(socket_bytes().sent - before.sent + averaging.datagram_bytes())
            scheduler.step()
            if step in kept and kept[step] % self._world == rank:
                _weights(ddp.module).tofile(f"{stem}-{step}")
            if rank == 0 and (times_s[-1] - reported_s > _TELL_S or step == steps):
                reported_s = times_s[-1]
                print(PROGRESS, self._cell["number"], step, flush=True)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        resent_bytes = socket_bytes().resent - before.resent
        costs = averaging.costs() | averaging.switch_costs()
        dist.barrier()  # before connections are closed
        averaging.close()
        return {
            "losses": losses,
            "begin": begin,  # of a clock that all processes of a machine share
            "times": times_s,
            "sent_bytes": sent,
            "resent_bytes": resent_bytes,
            "evaluations": self._evaluate(
                ddp.module, stem, [step for step in kept if kept[step] % self._world == rank]
            ),
            "peak_bytes": peak_bytes,
            "weights": crc32(_weights(ddp.module)),
            "parameters": sum(parameter.numel() for parameter in ddp.module.parameters()),
            **costs,
        }

    def _new(self) -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(self._cell["seed"])
        model = self._task.model()
        optimizer = self._task.optimizer(model)
        return DistributedDataParallel(model), optimizer

    def _step(self, ddp: Any, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
        cell = self._cell
        optimizer.zero_grad()
        loss = self._task.loss(ddp, cell["seed"], step, self._rank, self._world, cell["batch"])
        if step < len(self._late_s) and self._late_s[step]:
            time.sleep(self._late_s[step])
        torch.autograd.backward(loss)
        optimizer.step()
        return loss.detach()

    def _evaluate(self, model: nn.Module, stem: Path, steps: list[int]) -> list[tuple[int, float]]:
        """Measures accuracy after each of these steps; the model has its last weights again afterwards."""
        last = _weights(model)
        found = []
        for step in steps:
            _set_weights(model, np.fromfile(f"{stem}-{step}", np.float32))
            found.append((step, self._task.accuracy(model)))
            with suppress(FileNotFoundError):
                os.unlink(f"{stem}-{step}")
        _set_weights(model, last)
        return found


def _weights(model: nn.Module) -> Any:
    with torch.no_grad():
        return torch.cat([parameter.reshape(-1) for parameter in model.parameters()]).numpy()


def _set_weights(model: nn.Module, weights: Any) -> None:
    parts = torch.split(torch.from_numpy(weights), [parameter.numel() for parameter in model.parameters()])
    with torch.no_grad():
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.copy_(part.view_as(parameter))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
