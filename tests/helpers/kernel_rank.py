"""One rank of a training in a network namespace: does what it reads on its input, and prints what came of it."""

import json
import sys
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import evenkeel
from evenkeel.reducers.process_group import ProcessGroup
from evenkeel.reducers.reducer import Reducer
from evenkeel.training.hook.same_weights import digests

CODES = {"thc": lambda: evenkeel.THC(bits=4, block=1024), "fixed": lambda: evenkeel.FixedPoint(bits=8, block=64)}


class Training:
    """A small model that learns from this rank's own numbers."""

    def __init__(self, code: str, switch: dict[str, Any] | None) -> None:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))
        self.ddp = DistributedDataParallel(net)
        self.reducer: Reducer = evenkeel.SwitchReducer(**switch) if switch else ProcessGroup()
        every = None if switch and "deadline" in switch else 50
        self.state = evenkeel.HookState(CODES[code](), reducer=self.reducer, compare_weights_every=every)
        evenkeel.register(self.ddp, self.state)
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=0.1, momentum=0.9)
        self.step = 0

    def go(self, steps: int) -> dict[str, Any]:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(1000 * self.step + dist.get_rank())
            rows = torch.randn(32, 64, generator=generator)
            loss = nn.functional.cross_entropy(self.ddp(rows), rows[:, :10].argmax(1))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
        found = {"loss": float(loss.detach()), "digests": digests(list(self.ddp.parameters())).tolist()}
        if isinstance(self.reducer, evenkeel.SwitchReducer):
            found |= {"switch": asdict(self.reducer.stats()), "fell_back": self.state.stats().fell_back}
        return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    training: Training | None = None
    print("@ null", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "code" in order:
            training = Training(order["code"], order["switch"])
        assert training is not None
        print("@", json.dumps(training.go(order["steps"])), flush=True)
    if training is not None:
        training.reducer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
