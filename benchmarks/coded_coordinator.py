"""What does a round cost the coordinator itself, without the devices' work and the network?

    python benchmarks/coded_coordinator.py [--devices 20] [--rows 6000] [--columns 5000] [--rounds 50] [--json FILE]

Devices are objects in this process, with sparse data so that they fit: what the coordinator does depends on the
numbers of rows and columns alone. Their own time is taken off. `present`: all reply, and gradients are added. `away`:
two devices are away, so that their products are solved for and shares of the missing gradients handed out. Each
gradient is checked against what is known, always. A round's value needs the loss of every example, which is part of
it.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from output import show, write_json

from evenkeel.coding.answers.linear_codes import linear_code
from evenkeel.training.coded.coordinator import CodedSettings, Coordinator
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.links import LocalDevices
from evenkeel.training.coded.losses import Logistic
from evenkeel.training.coded.matrix import SparseMatrix
from evenkeel.training.coded.messages import DeviceMessage

NONZEROS = 5  # in a row


class TimedDevice(Device):
    """A device that says how long all devices together worked."""

    spent_s = 0.0

    def answer(self, request: DeviceMessage) -> DeviceMessage:
        began_s = time.process_time()
        reply = super().answer(request)
        TimedDevice.spent_s += time.process_time() - began_s
        return reply


def measure(devices: int, rows: int, columns: int, rounds: int) -> list[dict]:
    random = np.random.default_rng(0)
    made = []
    for place in range(devices):
        values = random.normal(size=rows * NONZEROS).astype(np.float32)
        places = np.sort(random.integers(0, columns // NONZEROS, (rows, NONZEROS)), axis=1)
        places += np.arange(NONZEROS) * (columns // NONZEROS)
        starts = np.arange(rows + 1) * NONZEROS
        table = SparseMatrix(values, places.ravel().astype(np.int32), starts, columns)
        made.append(TimedDevice(f"device{place:02}", (table, random.integers(0, 2, rows))))
    link = LocalDevices(made)
    settings = CodedSettings("float32", inspect_every=0, least_wait_s=0.001)
    coordinator = Coordinator(link, lambda count, sizes: linear_code("balanced:copies=3", count, sizes=sizes), settings)
    coordinator.set_up(devices)
    rows_ = []
    for name, away in (("present", []), ("away", ["device03", "device11"])):
        for device in away:
            link.take_away(device)
        took = []
        for number in range(rounds + 3):
            weights = random.normal(size=columns) / columns**0.5
            TimedDevice.spent_s = 0.0
            began_s = time.process_time()
            found = coordinator.evaluate(weights, Logistic(), (0.0, 1.0))
            if number >= 3:
                took.append((time.process_time() - began_s - TimedDevice.spent_s) * 1e3)
        low, middle, high = np.percentile(took, [10, 50, 90])
        rows_.append(
            {
                "case": name,
                "devices": devices,
                "rows": rows,
                "columns": columns,
                "decoded": len(found.decoded),
                "own_ms": round(float(middle), 2),
                "own_ms_low": round(float(low), 2),
                "own_ms_high": round(float(high), 2),
            }
        )
    return rows_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--rows", type=int, default=6000, help="Of each device.")
    parser.add_argument("--columns", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = measure(given.devices, given.rows, given.columns, given.rounds)
    columns = {"case": ("case", ""), "decoded": ("decoded", "d"), "own_ms": ("own ms", ".2f")}
    columns |= {"own_ms_low": ("10 %", ".2f"), "own_ms_high": ("90 %", ".2f")}
    show(f"{given.devices} devices x {given.rows} x {given.columns}", rows, columns)
    write_json(given.json, {name: str(value) for name, value in vars(given).items()}, rows)


if __name__ == "__main__":
    main()
