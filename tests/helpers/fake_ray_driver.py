"""Stands in for the process that speaks to Ray: its actors live in itself. Run as `fake_ray_driver.py FD SCENARIO`.

Scenarios: `well`; `gone`, no cluster; `full`, no room; `wrong`, what the gateway cannot read.
"""

import json
import socket
import sys


def main(descriptor: str, scenario: str) -> None:
    lines = socket.socket(fileno=int(descriptor)).makefile("rwb")

    def say(**words: object) -> None:
        lines.write(json.dumps(words).encode() + b"\n")
        lines.flush()

    if scenario == "gone":
        say(id=0, error="no Ray cluster answers at head:6379", kind="other")
        return
    # Not before: who refuses everything is quick.
    from evenkeel.backends.ray_actors.actor import WorkerActor
    from evenkeel.backends.ray_actors.parcels import pack

    actors: dict[int, WorkerActor] = {}
    for line in lines:
        request = json.loads(line)
        number, worker = request["id"], request["worker"]
        if scenario == "full":
            say(id=number, error="Ray has not placed cifar10-base/replica: the cluster has 2 nodes", kind="other")
        elif scenario == "wrong":
            lines.write(b"[what is this?\n")
            lines.flush()
        elif request["do"] == "release":
            print(f"released {worker}", flush=True)
            actors.pop(worker, None)
            say(id=number, result={})
        else:
            if worker not in actors:
                parcels = [(parcel.spec, dict(parcel.files)) for parcel in map(pack, request["models"])]
                actors[worker] = WorkerActor(request["settings"], parcels, host="127.0.0.1")
            while (said := actors[worker].reach(1.0))["state"] == "loading":
                pass
            if said["state"] == "failed":
                say(id=number, error=said["reason"], kind="other")
            else:
                say(id=number, result={**said, "node": "a" * 56})


main(*sys.argv[1:])
