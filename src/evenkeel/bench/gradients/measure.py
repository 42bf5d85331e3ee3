"""Trains cells with several workers, in hosts of a lab or over loopback, and puts their figures together."""

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evenkeel.bench.gradients.cells import PROGRESS, Cell, Records, Training, read_method
from evenkeel.bench.gradients.data import TaskData
from evenkeel.errors import ConfigurationError, EvenkeelError, MissingExtraError
from evenkeel.lab import shell
from evenkeel.lab.cluster import Lab
from evenkeel.lab.processes import HostExit, Launch, run_all
from evenkeel.lab.topology import Topology
from evenkeel.text_values import read_rate_bps

__all__ = ["UNLIMITED", "Work", "lab_missing", "train_cells"]

UNLIMITED = "unlimited"
_WORKER = "evenkeel.bench.gradients.worker"
_LAST_LINES = 40
_PORT = 9700
_SWITCH = (sys.executable, "-m", "evenkeel", "switch", "run", "--quiet")
_OF_SWITCHES = ("through_switch", "fell_back", "left_out", "resent_packets", "exchange_s", "exchange_bytes")

Work = Sequence[tuple[Cell, Training]]
Write = Callable[[str, str, bool], None]


def lab_missing() -> str:
    """Says why no lab can be made here; empty if one can."""
    try:
        shell.require()
    except ConfigurationError as error:
        return str(error)
    return ""


def train_cells(
    work: Work,
    data: Mapping[str, TaskData],
    records: Records,
    *,
    timeout_s: int = 900,
    progress: Callable[[Cell, int], object] = lambda cell, steps: None,
    tell: Callable[[str], object] = lambda line: None,
) -> None:
    """Trains all of `work`, and keeps each cell's figures as soon as they are there.

    Args:
        work: cells and how they are trained; all with the same number of workers.
        data: of each task.
        records: where figures are kept.
        timeout_s: for one cell.
        progress: called with a cell and the number of its steps that are done.
        tell: called with lines for people: what the links carry.

    Raises:
        MissingExtraError: there is no torch.
        EvenkeelError: a worker failed (what it said is in the message), or the ranks ended with different weights.
        LabError: the lab could not be made or removed.
    """
    _need_torch()
    for rate in dict.fromkeys(cell.rate for cell, _ in work):
        some = [(cell, training) for cell, training in work if cell.rate == rate]
        with tempfile.TemporaryDirectory(prefix="evenkeel-") as folder:
            _RateRun(some, data, records, Path(folder), progress).run(rate, timeout_s, tell)


class _RateRun:
    """Runs all cells at one rate: one set of workers, one lab."""

    def __init__(
        self,
        work: Work,
        data: Mapping[str, TaskData],
        records: Records,
        folder: Path,
        progress: Callable[[Cell, int], object],
    ) -> None:
        self._work, self._records, self._folder, self._progress = work, records, folder, progress
        self._data = data
        self._world = work[0][1].workers
        self._loss = work[0][1].loss
        self._need_switch = any(read_method(cell.method).switch is not None for cell, _ in work)
        self._link: dict[str, Any] = {}
        self._kept = 0
        self._said: deque[str] = deque(maxlen=_LAST_LINES)

    def run(self, rate: str, timeout_s: int, tell: Callable[[str], object]) -> None:
        lab_here = rate != UNLIMITED or not lab_missing()
        host = Topology(self._world).switch_address if lab_here else "127.0.0.1"
        plan = self._plan(timeout_s, f"{host}:{_PORT}")
        command = [sys.executable, "-m", _WORKER, str(plan)]
        # A core is shared by several workers already.
        inherited = {**os.environ, "OMP_NUM_THREADS": "1"}
        if rate == UNLIMITED and lab_missing():
            with self._own_switch():
                exits = self._on_loopback(command, inherited)
        else:
            with Lab(Topology(self._world, rate_bps=read_rate_bps(rate, "rates"))) as lab, self._switch_in(lab):
                checked = lab.check_rate()
                if self._loss:
                    lab.lose(self._loss)
                if checked is not None:
                    self._link = {"there_bps": checked.there_bps, "back_bps": checked.back_bps}
                    tell(checked.text())
                    if warning := checked.warning():
                        tell(f"warning: {warning}")
                exits = lab.run(command, self._hear, inherited=inherited)
        self._keep_finished()
        failed = [left for left in exits if left.code]
        if failed or self._kept < len(self._work):
            raise EvenkeelError(self._failure(failed))

    def _switch_in(self, lab: Lab) -> AbstractContextManager[None]:
        """Runs a switch in the middle of the lab, where a method needs one; what comes down it loses itself."""
        if not self._need_switch:
            return nullcontext()
        bind = f"{lab.topology.switch_address}:{_PORT}"
        return lab.beside((*_SWITCH, "--bind", bind, "--loss-out", str(self._loss)))

    @contextmanager
    def _own_switch(self) -> Iterator[None]:
        """Runs a switch on this machine, where a method needs one."""
        if not self._need_switch:
            yield
            return
        process = subprocess.Popen((*_SWITCH, "--bind", f"127.0.0.1:{_PORT}", "--loss-out", str(self._loss)))
        try:
            yield
        finally:
            process.terminate()
            process.wait()

    def _plan(self, timeout_s: int, switch: str) -> Path:
        cells = []
        for number, (cell, training) in enumerate(self._work):
            stored = self._folder / cell.task
            if not stored.exists():
                stored.mkdir()
                self._data[cell.task].save(stored)
            classes = self._data[cell.task].classes
            own = {"number": number, "classes": classes, "switch": switch}
            cells.append({**own, **asdict(cell), **asdict(training)})
        path = self._folder / "plan.json"
        path.write_text(json.dumps({"folder": str(self._folder), "timeout_s": timeout_s, "cells": cells}))
        return path

    def _on_loopback(self, command: Sequence[str], inherited: Mapping[str, str]) -> list[HostExit]:
        launches = [
            Launch(
                f"rank{rank}",
                tuple(command),
                {**inherited, "RANK": str(rank), "WORLD_SIZE": str(self._world), "GLOO_SOCKET_IFNAME": "lo"},
            )
            for rank in range(self._world)
        ]
        return run_all(launches, self._hear)

    def _hear(self, host: str, line: str, is_error: bool) -> None:
        if not line.startswith(f"{PROGRESS} "):
            self._said.append(f"{host} | {line}")
            return
        _, number, steps = line.split()
        self._progress(self._work[int(number)][0], int(steps))
        self._keep_finished()

    def _keep_finished(self) -> None:
        """Keeps the next cells that all ranks have finished; they come in order."""
        while self._kept < len(self._work):
            files = [self._folder / f"cell-{self._kept}-rank-{rank}.json" for rank in range(self._world)]
            if not all(file.exists() for file in files):
                return
            cell, training = self._work[self._kept]
            parts = [json.loads(file.read_bytes()) for file in files]
            self._records.keep(cell, training, _together(cell, parts) | {"link": self._link})
            self._progress(cell, training.steps)
            self._kept += 1

    def _failure(self, failed: Sequence[HostExit]) -> str:
        cell = self._work[min(self._kept, len(self._work) - 1)][0]
        first = [left for left in failed if not left.stopped] or failed
        how = "; ".join(left.text() for left in first) or "its figures are missing"
        said = "\n".join(self._said) or "nothing was said"
        return (
            f"{cell.task} with {cell.method} at {cell.rate}, seed {cell.seed}: {how}. Cells that were finished are "
            f"kept with --records. The last lines:\n{said}"
        )


def _together(cell: Cell, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Puts together one training's figures from those of its ranks.

    A step ends when its last rank has ended it, and its loss is the mean over ranks; so are bytes and costs.
    """
    if len({part["weights"] for part in parts}) > 1:
        raise EvenkeelError(
            f"the ranks ended {cell.task} with {cell.method} with different weights: their averages differed"
        )
    begin = min(part["begin"] for part in parts)
    sent = np.mean([part["sent_bytes"] for part in parts], axis=0)
    return {
        "parameters": parts[0]["parameters"],
        "losses": np.mean([part["losses"] for part in parts], axis=0).tolist(),
        "times_s": (np.max([part["times"] for part in parts], axis=0) - begin).tolist(),
        "sent_bytes": sent.tolist(),
        "resent_bytes": _mean(parts, "resent_bytes"),
        "evaluations": sorted(tuple(found) for part in parts for found in part["evaluations"]),
        "compute_s": _mean(parts, "compute_s"),
        "encode_s": _mean(parts, "encode_s"),
        "add_s": _mean(parts, "add_s"),
        "decode_s": _mean(parts, "decode_s"),
        "communicate_s": _mean(parts, "communicate_s"),
        "counted_bytes": _mean(parts, "counted_bytes"),
        "local_nmse": _mean(parts, "local_nmse"),
        "peak_bytes": max(part["peak_bytes"] for part in parts),
        **{name: _mean(parts, name) for name in _OF_SWITCHES if name in parts[0]},
    }


def _mean(parts: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [part.get(name) for part in parts]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(parts) else None


def _need_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise MissingExtraError("PyTorch", "train")
