"""The hook in real DistributedDataParallel trainings over Gloo, compared with DDP's own averages."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import evenkeel
from evenkeel.errors import ConfigurationError, ReducerError
from evenkeel.reducers.ranks.local_ranks import local_ranks

FEATURES, CLASSES = 24, 5


class Network(nn.Module):
    """An embedding, a convolution, a norm with buffers, and a branch that is not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, FEATURES)
        self.convolve = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * FEATURES, 40)
        self.often = nn.Linear(40, CLASSES)
        self.seldom = nn.Linear(40, CLASSES)

    def forward(self, words: Tensor, seldom: bool = False) -> Tensor:
        maps = self.embed(words).view(-1, 1, 4, FEATURES // 4)
        hidden = torch.relu(self.head(torch.relu(self.norm(self.convolve(maps))).flatten(1)))
        return (self.seldom if seldom else self.often)(hidden)


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    words = torch.randint(0, 11, [size], generator=generator)
    return words, words % CLASSES


def parallel(state: Any = None, **options: Any) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = Network()
    if options.pop("channels_last", False):
        model = model.to(memory_format=torch.channels_last)
    if options.pop("frozen", True):
        model.seldom.requires_grad_(False)
    ddp = DistributedDataParallel(model, **{"bucket_cap_mb": 0.01, **options})
    if state is not None:
        ddp.register_comm_hook(state, evenkeel.comm_hook)
    return ddp, torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)


def train(
    ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer, steps: Sequence[int], **call: Any
) -> list[float]:
    losses = []
    for step in steps:
        words, labels = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ddp(words, **call), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameters(ddp: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in ddp.parameters()])


def check_alike_on_all_ranks(ddp: nn.Module) -> None:
    mine = parameters(ddp)
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    assert torch.equal(mine, theirs)


def check_like_ddp(train_some: Callable[..., None], atol: float = 1e-5, **options: Any) -> None:
    """A training with exact averages through the hook ends where one without the hook ends."""
    ends = []
    for state in (None, evenkeel.HookState(None), evenkeel.HookState(evenkeel.FixedPoint(bits=16), skip=None)):
        ddp, optimizer = parallel(state, **options)
        train_some(ddp, optimizer)
        check_alike_on_all_ranks(ddp)
        ends.append(parameters(ddp))
        if state is not None:
            state.close()
    assert torch.allclose(ends[0], ends[1], atol=atol)
    assert torch.allclose(ends[0], ends[2], atol=max(atol, 1e-3))
    assert not torch.equal(ends[0], ends[2])


def ways_of_training() -> None:
    def plainly(ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
        train(ddp, optimizer, range(5))

    check_like_ddp(plainly)
    check_like_ddp(plainly, static_graph=True)
    check_like_ddp(plainly, gradient_as_bucket_view=True, channels_last=True)
    check_like_ddp(plainly, bucket_cap_mb=25)

    def accumulating(ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
        for step in range(0, 10, 2):
            optimizer.zero_grad()
            with ddp.no_sync():
                nn.functional.cross_entropy(ddp(batch(step)[0]), batch(step)[1]).backward()
            nn.functional.cross_entropy(ddp(batch(step + 1)[0]), batch(step + 1)[1]).backward()
            optimizer.step()

    check_like_ddp(accumulating)

    def with_unused_parameters(ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
        for step in range(8):
            train(ddp, optimizer, [step], seldom=(step + dist.get_rank()) % 3 == 0)

    check_like_ddp(with_unused_parameters, find_unused_parameters=True, frozen=False)


def mixed_precision() -> None:
    """GradScaler skips the step on every rank when one rank overflows, and nothing of it is remembered."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    state = evenkeel.HookState(evenkeel.THC(bits=4), loss_scale=scaler.get_scale)
    ddp, optimizer = parallel(state)
    scales, skipped = [], []
    for step in range(10):
        words, labels = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(ddp(words), labels)
        if step == 6 and dist.get_rank() == 1:
            loss = loss * torch.inf
        before = parameters(ddp)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        skipped.append(torch.equal(before, parameters(ddp)))
    assert skipped == [step == 6 for step in range(10)]
    assert scales[2] > scales[0]
    assert scales[6] < scales[5]
    assert bool(parameters(ddp).isfinite().all())
    assert all(bool(memory.isfinite().all()) for memory in state.state_dict()["code"]["memory"].values())
    check_alike_on_all_ranks(ddp)
    state.close()


def two_lines() -> None:
    """The user's two lines: all ranks alike, learning as fast as without."""
    ddp, optimizer = parallel()
    without = train(ddp, optimizer, range(60))
    state = evenkeel.HookState(evenkeel.THC(bits=4), skip=evenkeel.named(ddp.module, "embed*", "*.bias", "norm*"))
    state.close()
    ddp, optimizer = parallel()
    state = evenkeel.HookState(evenkeel.THC(bits=4), skip=[ddp.module.embed], group=dist.new_group())
    ddp.register_comm_hook(state, evenkeel.comm_hook)
    losses = train(ddp, optimizer, range(60))
    check_alike_on_all_ranks(ddp)
    assert without[-1] < 0.2
    assert losses[-1] < 0.2
    stats = state.stats()
    assert stats.compressed_steps == 58
    assert 0 < stats.sent_bytes < stats.uncompressed_bytes / 2
    state.close()


def saved_and_loaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stop_and_resume() -> None:
    def make(pipelined: bool) -> Any:
        state = evenkeel.HookState(evenkeel.THC(bits=3))
        return evenkeel.PipeSGD(state, warmup_steps=2) if pipelined else state

    for pipelined in (False, True):
        state = make(pipelined)
        ddp, optimizer = parallel(state)
        train(ddp, optimizer, range(6))
        saved = saved_and_loaded(
            {"hook": state.state_dict(), "model": ddp.module.state_dict(), "sgd": optimizer.state_dict()}
        )
        train(ddp, optimizer, range(6, 12))
        resumed = make(pipelined)
        resumed.load_state_dict(saved["hook"])
        again, optimizer_again = parallel(resumed)
        again.module.load_state_dict(saved["model"])
        optimizer_again.load_state_dict(saved["sgd"])
        train(again, optimizer_again, range(6, 12))
        assert torch.equal(parameters(ddp), parameters(again))


def pipelined_like_a_delayed_loop() -> None:
    """PipeSGD ends where a plain loop ends that applies the average of the step before."""
    steps, warmup, ends = 12, 3, []
    for bucket_view in (False, True):
        pipe = evenkeel.PipeSGD(warmup_steps=warmup)
        ddp, optimizer = parallel(pipe, broadcast_buffers=False, gradient_as_bucket_view=bucket_view)
        pipe.attach(optimizer)
        train(ddp, optimizer, range(steps))
        assert pipe.flush()
        optimizer.step()
        check_alike_on_all_ranks(ddp)
        ends.append(parameters(ddp))

    torch.manual_seed(1)
    model = Network()
    model.seldom.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    waiting: list[list[Tensor]] = []
    for step in range(steps):
        words, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(words), labels).backward()
        averages = []
        for parameter in trained:
            average = parameter.grad.clone()
            dist.all_reduce(average)
            averages.append(average / dist.get_world_size())
        waiting.append(averages)
        if step == warmup:
            continue
        for parameter, average in zip(trained, waiting.pop(0), strict=True):
            parameter.grad = average
        optimizer.step()
    assert len(waiting) == 1
    for parameter, average in zip(trained, waiting.pop(0), strict=True):
        parameter.grad = average
    optimizer.step()
    for end in ends:
        assert torch.allclose(end, parameters(model), atol=1e-6)


def refusals() -> None:
    rank = dist.get_rank()

    def refused(state: Any, message: str, **options: Any) -> None:
        ddp, optimizer = parallel(state, **options)
        with pytest.raises(ConfigurationError, match=message):
            train(ddp, optimizer, range(4))

    refused(evenkeel.HookState(evenkeel.THC(bits=4 - rank)), "differ in code: .*bits=4.* on rank .*bits=3.* on rank")
    refused(
        evenkeel.HookState(evenkeel.THC(bits=4), start_step=2 + rank), "differ in start_step: 2 on", static_graph=True
    )
    narrow = evenkeel.FixedPoint(bits=4)
    narrow.max_workers = 1
    refused(evenkeel.PipeSGD(evenkeel.HookState(narrow)), "at most 1 ranks")

    plain = evenkeel.HookState(evenkeel.THC(bits=4))
    refused(evenkeel.PipeSGD(plain, warmup_steps=3) if rank else plain, "differ in schedule: .*warmup_steps=3")
    with pytest.raises(ConfigurationError, match="new_group"):
        evenkeel.HookState(evenkeel.THC(bits=4), group=dist.group.WORLD)

    state = evenkeel.HookState(None)
    train(*parallel(state), range(1))
    refused(state, "two models")
    ddp, _ = parallel(state)
    with pytest.raises(RuntimeError, match="once"):
        ddp.register_comm_hook(state, evenkeel.comm_hook)

    torch.manual_seed(1)
    words = nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Linear(4, CLASSES))
    for state in (evenkeel.HookState(None), evenkeel.PipeSGD()):
        ddp = DistributedDataParallel(words)
        ddp.register_comm_hook(state, evenkeel.comm_hook)
        with pytest.raises(ConfigurationError, match="sparse=False"):
            train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), range(1))


def fsdp_is_refused() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for how in (ShardingStrategy.NO_SHARD, ShardingStrategy.FULL_SHARD, "fully_shard"):
        state, model = evenkeel.HookState(evenkeel.THC(bits=4)), nn.Linear(8, 8)
        if how == "fully_shard":
            fully_shard(model, mesh=mesh)
            model.set_all_reduce_hook(lambda gradient, state=state: evenkeel.comm_hook(state, gradient))
        else:
            model = FullyShardedDataParallel(model, sharding_strategy=how, device_id=torch.device("cpu"))
            model.register_comm_hook(state, evenkeel.comm_hook)
        with pytest.raises(ConfigurationError, match=r"\(FSDP1\) and fully_shard \(FSDP2\) are not supported"):
            model(torch.ones(2, 8)).sum().backward()


def uneven_inputs() -> None:
    """Ranks that have run out of inputs add nothing, and keep the others company."""
    ddp, optimizer = parallel(evenkeel.HookState(evenkeel.THC(bits=4)), broadcast_buffers=False)
    with ddp.join():
        train(ddp, optimizer, range(3 + 2 * dist.get_rank()))
    check_alike_on_all_ranks(ddp)


class OfManyTypes(nn.Module):
    """Parameters of every type that can have a gradient: dense, strided, of one number, of none, complex."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        real = lambda *shape, dtype=torch.float32: nn.Parameter(torch.randn(shape, dtype=dtype))
        self.narrow_type = real(6, 5)
        self.wide_type = real(4, 3, dtype=torch.float64)
        self.half_type = real(4, 3, dtype=torch.bfloat16)
        self.empty = real(0, 3)
        self.waves = real(5, 4, dtype=torch.complex64)
        self.kernels = nn.Parameter(
            torch.randn(3, 2, 2, 2, dtype=torch.complex64).to(memory_format=torch.channels_last)
        )
        self.phase = nn.Parameter(torch.randn((), dtype=torch.complex64))
        self.long_waves = real(3, 7, dtype=torch.complex128)

    def forward(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        loss = torch.zeros((), dtype=torch.float64)
        for parameter in self.parameters():
            kind = torch.complex128 if parameter.is_complex() else torch.float64
            target = torch.randn(parameter.shape, dtype=kind, generator=generator).to(parameter.dtype)
            loss = loss + (parameter - target).abs().square().sum() / 100
        return loss


def numbers_of(model: nn.Module) -> Tensor:
    return torch.cat([torch.view_as_real(each.detach().to(torch.complex128)).flatten() for each in model.parameters()])


def every_type_of_parameter() -> None:
    """Each number is averaged, whatever its parameter's type: the ranks end alike, and where plain DDP ends."""
    ends = {}
    for name, make, options in (
        ("plain", lambda: None, {}),
        ("hook", lambda: evenkeel.HookState(None), {}),
        ("hook with views", lambda: evenkeel.HookState(None), {"gradient_as_bucket_view": True}),
        ("fixed point", lambda: evenkeel.HookState(evenkeel.FixedPoint(bits=16), skip=None), {}),
        ("thc", lambda: evenkeel.HookState(evenkeel.THC(bits=8)), {}),
        ("low rank", lambda: evenkeel.HookState(evenkeel.LowRank(1), skip=None), {}),
        ("gradiveq", lambda: evenkeel.HookState(evenkeel.GradiVeQ(sample_steps=4), skip=None), {}),
        ("pipe", evenkeel.PipeSGD, {}),
        ("ahead", lambda: evenkeel.PipeSGD(evenkeel.HookState(evenkeel.THC(bits=8))), {}),
    ):
        state = make()
        ddp = DistributedDataParallel(OfManyTypes(), **options)
        if state is not None:
            ddp.register_comm_hook(state, evenkeel.comm_hook)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=1.0, momentum=0.5)
        if name in ("pipe", "ahead"):
            state.attach(optimizer, look_ahead=ddp if name == "ahead" else None)
        for step in range(10):
            optimizer.zero_grad()
            ddp(2 * step + dist.get_rank()).backward()
            optimizer.step()
        if isinstance(state, evenkeel.PipeSGD):
            assert state.flush()
            assert all(each.grad.dtype == each.dtype and each.grad.shape == each.shape for each in ddp.parameters())
            optimizer.step()
        ends[name] = mine = numbers_of(ddp)
        theirs = mine.clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(mine, theirs), name
        assert bool(mine.isfinite().all()), name
    for name in ("hook", "hook with views"):
        assert torch.allclose(ends["plain"], ends[name], rtol=1e-6, atol=1e-6), name
    for name in ("fixed point", "thc"):
        assert torch.allclose(ends["plain"], ends[name], atol=0.05), name


def everything_for_two() -> list[str]:
    done = []
    for work in (
        ways_of_training,
        mixed_precision,
        two_lines,
        stop_and_resume,
        pipelined_like_a_delayed_loop,
        refusals,
        uneven_inputs,
        every_type_of_parameter,
        fsdp_is_refused,
    ):
        work()
        done.append(work.__name__)
    return done


def test_two_ranks() -> None:
    done = local_ranks(2, everything_for_two, timeout_s=100)
    assert done[0] == done[1]
    assert len(done[0]) == 9


def four_and_then_three() -> str:
    """Four ranks stay alike; when one dies, the others are told by the backward pass, long before the timeout."""
    state = evenkeel.HookState(evenkeel.THC(bits=4), timeout_s=60)
    pipe = evenkeel.PipeSGD(evenkeel.HookState(evenkeel.THC(bits=4), timeout_s=60))
    piped, piped_optimizer = parallel(pipe, broadcast_buffers=False)
    train(piped, piped_optimizer, range(4))
    check_alike_on_all_ranks(piped)
    ddp, optimizer = parallel(state, broadcast_buffers=False)
    train(ddp, optimizer, range(4))
    check_alike_on_all_ranks(ddp)
    begin = time.monotonic()
    if dist.get_rank() == 2:
        os._exit(1)
    with pytest.raises(ReducerError, match="lost a peer"):
        train(ddp, optimizer, range(4, 6))
    with pytest.raises(ReducerError):
        train(piped, piped_optimizer, range(4, 7))
    return "in time" if time.monotonic() - begin < 30 else "too late"


def test_four_ranks_of_which_one_dies() -> None:
    assert local_ranks(4, four_and_then_three, timeout_s=100) == ["in time", "in time", None, "in time"]


MADE_BEFORE_A_FORK = """
import os
import sys
import torch
import torch.distributed as dist
import evenkeel

state = evenkeel.PipeSGD(evenkeel.HookState(evenkeel.THC(bits=4), timeout_s=20))
child = os.fork()
rank = 1 if child else 0
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=rank, world_size=2)
ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
ddp.register_comm_hook(state, evenkeel.comm_hook)
for _ in range(4):
    ddp(torch.ones(4, 8)).sum().backward()
state.close()
os.write(1, f"{rank} has trained\\n".encode())  # at once, as both write
if not child:
    os._exit(0)
os.waitpid(child, 0)
os._exit(0)
"""


def test_a_state_made_before_a_fork_works_in_both_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MADE_BEFORE_A_FORK, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert sorted(ended.stdout.splitlines()) == ["0 has trained", "1 has trained"]
