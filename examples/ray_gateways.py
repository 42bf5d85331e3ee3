"""Runs several gateways as detached actors on a Ray cluster, which share one fleet of workers there.

    python examples/ray_gateways.py up gateway.yaml --gateways 2    # prints their URLs, for a load balancer
    python examples/ray_gateways.py down gateway.yaml               # ends the gateways, then the workers they shared

The configuration says `replicas: {ray: {count: 9, fleet: NAME}}`, and the same under `backups`. Each gateway is
stateless: groups and hedges are its own. One that dies is started again by Ray; a worker that dies by the gateway that
sees it first. Run it on a machine of the cluster, with evenkeel and Ray on every node.
"""

import asyncio
import os
import threading
from concurrent.futures import Future
from pathlib import Path

import click
import ray
import uvloop

from evenkeel.errors import EvenkeelError
from evenkeel.serving.config import ServeConfig, load_raw, read_config
from evenkeel.serving.service import serve

NAMESPACE = "evenkeel"  # in which gateways look for the workers, too
STARTED_S = 300.0


class GatewayActor:
    """Serves a configuration from a thread of the actor's process, at the node's address if it names no host."""

    def __init__(self, file: str, port: int) -> None:
        raw = load_raw(Path(file))
        raw = {"host": ray.util.get_node_ip_address(), **raw, "port": port}
        self._url: Future[str] = Future()
        self._ended = threading.Event()
        self._loop = uvloop.new_event_loop()
        self._task = self._loop.create_task(self._serve(read_config(raw, Path(file).parent)))
        threading.Thread(target=self._run, name="evenkeel-gateway", daemon=True).start()
        self._url.result(STARTED_S)  # a configuration that cannot be served fails the actor, with the reason

    def url(self) -> str:
        return self._url.result()

    def stop(self) -> None:
        """Answers what was accepted; returns when that is done."""
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._ended.wait()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:  # by `stop`
            self._ended.set()
        except Exception as error:
            if self._url.done():
                os._exit(1)  # Ray starts it again
            self._url.set_exception(RuntimeError(str(error)) if isinstance(error, EvenkeelError) else error)

    async def _serve(self, config: ServeConfig) -> None:
        await serve(config, lambda url, why_not: self._url.set_result(url))


def fleets(file: Path) -> list[tuple[str, int]]:
    """The names under which the gateways of a configuration share workers, with the number of these."""
    config = read_config(load_raw(file), file.parent)
    card = config.card()
    kinds = {"replica": config.replicas.ray, "backup": config.backups.ray}
    return [
        (f"{one.fleet}/{card.name}-{card.version}/{kind}", one.count) for kind, one in kinds.items() if one is not None
    ]


@click.group()
def main() -> None:
    """Run gateways on a Ray cluster."""


@main.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path))
@click.option("--gateways", type=click.IntRange(1, 100), default=2, show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0: each takes a free one.")
@click.option("--address", default="auto", help="Of the cluster.")
def up(config: Path, gateways: int, port: int, address: str) -> None:
    """Start gateways, or find those that run."""
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
    actor = ray.remote(GatewayActor)
    options = {"lifetime": "detached", "get_if_exists": True, "max_restarts": -1, "scheduling_strategy": "SPREAD"}
    started = [
        actor.options(name=f"gateway-{number}", num_cpus=1, **options).remote(str(config), port)
        for number in range(gateways)
    ]
    for one in started:
        click.echo(ray.get(one.url.remote(), timeout=STARTED_S))


@main.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path))
@click.option("--address", default="auto", help="Of the cluster.")
def down(config: Path, address: str) -> None:
    """End the gateways, and then the workers that they shared."""
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
    gateways = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if one["namespace"] == NAMESPACE]
    for name in [name for name in gateways if name.startswith("gateway-")]:
        actor = ray.get_actor(name)
        try:
            ray.get(actor.stop.remote(), timeout=STARTED_S)
        finally:
            ray.kill(actor)
    for group, count in fleets(config):
        for number in range(count):
            try:
                ray.kill(ray.get_actor(f"{group}/{number}"))
            except ValueError:  # it is gone already
                continue
        try:
            ray.util.remove_placement_group(ray.util.get_placement_group(group))
        except ValueError:
            continue


if __name__ == "__main__":
    main()
