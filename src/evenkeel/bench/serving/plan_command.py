"""Runs `evenkeel plan serving`."""

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from evenkeel.delays.recorded import read_latencies
from evenkeel.delays.text import parse_delay
from evenkeel.errors import ConfigurationError
from evenkeel.figures.outputs import Outputs, arguments_of
from evenkeel.figures.progress import bars
from evenkeel.figures.publish import publish
from evenkeel.figures.tables import Column, Page
from evenkeel.http_client.client import ClientAccess
from evenkeel.serving.plan import ServingInputs, plan_serving

__all__ = ["ServingPlanArguments", "run_plan_serving"]

_LABELS = (Column("name", "policy"),)
_COLUMNS = (
    Column("p50_ms", "p50", "ms"),
    Column("p99_ms", "p99", "ms"),
    Column("p999_ms", "p99.9", "ms"),
    Column("ideal_p99_ms", "best p99", "ms"),
    Column("approximate", "approximate", "%", factor=100),
    Column("wrong", "differ", "%", factor=100),
    Column("hedged", "hedged", "%", factor=100),
    Column("extra_nodes", "more nodes", "%", factor=100),
    Column("extra_work", "more passes", "%", factor=100),
)
_NOTE = (
    "best p99: no policy with these shares of fills and hedges can be quicker, even if it knew every time in advance"
)


@dataclass(frozen=True)
class ServingPlanArguments:
    """Holds the options of `evenkeel plan serving`; `--help` says what each one means."""

    latencies: str | None
    delay: str | None
    column: str
    unit: str
    key_file: Path | None
    ca: Path | None
    replicas: int
    load: float
    backups: tuple[int, ...]
    costs: tuple[float, float, float]
    agreement: float
    max_approximate: float
    requests: int
    outputs: Outputs


def run_plan_serving(arguments: ServingPlanArguments) -> None:
    """Runs `evenkeel plan serving`."""
    arguments.outputs.check()
    latencies, delay = arguments.latencies, arguments.delay
    if (latencies is None) == (delay is None):
        raise ConfigurationError("latencies: give either recorded ones or a law of them with --delay")
    inputs = ServingInputs(
        arguments.replicas,
        arguments.load,
        arguments.backups or (1, 2),
        arguments.costs,
        arguments.agreement,
        arguments.max_approximate,
        arguments.requests,
    )
    if (arguments.key_file or arguments.ca) and not (latencies or "").startswith(("http://", "https://")):
        raise ConfigurationError("key-file, ca: they are for latencies at a server's address")
    if latencies is None:
        law = parse_delay(delay or "")
    else:
        access = ClientAccess.of_files(arguments.key_file, arguments.ca)
        law = read_latencies(
            latencies, arguments.column, arguments.unit, headers=access.headers(), context=access.context()
        )
    with bars(Console(stderr=True), 16) as progress:
        task = progress.add_task("policies", total=2 + 2 * len(inputs.backups))
        plan = plan_serving(law, inputs, lambda name: progress.update(task, advance=1, description=name))
    rows = [{"name": option.name, **asdict(option)} for option in plan.options]
    publish(
        [Page(rows, _LABELS, _COLUMNS)],
        rows,
        arguments_of(arguments),
        arguments.outputs,
        notes=[
            "",
            f"service times of {latencies or delay}, mean {law.mean_s * 1e3:,.1f} ms: "
            f"{inputs.replicas} replicas at load {inputs.load:g}, {inputs.requests:,} requests on a virtual clock",
            _NOTE,
            "",
            plan.sentence,
        ],
        further={"recommendation": plan.sentence},
    )
