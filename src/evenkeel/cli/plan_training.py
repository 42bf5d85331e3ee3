"""`evenkeel plan training`: what a code or a schedule would gain."""

import os
from pathlib import Path

import click

__all__ = ["training"]


@click.command(
    epilog="\b\nExamples:\n"
    "  evenkeel plan training --workers 4 --rate 100mbit --parameters 11.7M --forward 30ms --backward 60ms\n"
    "  evenkeel lab run --hosts 4 --rate 100mbit -- \\\n"
    "    evenkeel plan training --parameters 11.7M --forward 30ms --backward 60ms\n"
    "  torchrun --nnodes 4 ... --no-python evenkeel plan training --parameters 11.7M --forward 30ms --backward 60ms"
)
@click.option(
    "--parameters", required=True, metavar="NUMBER", help="Number of parameters that the workers share: 11.7M."
)
@click.option("--forward", required=True, metavar="TIME", help="Time of one worker's forward pass: 30ms.")
@click.option("--backward", required=True, metavar="TIME", help="Time of its backward pass, without communication.")
@click.option("--update", default="0ms", metavar="TIME", help="Time of its optimiser's step.")
@click.option(
    "--segments", type=click.IntRange(1), help="Number of DDP's buckets; the default is what DDP's defaults make."
)
@click.option(
    "--rate", metavar="RATE", help="Assumed rate of each link, each way: 100mbit. Without it the link is measured."
)
@click.option("--workers", type=click.IntRange(2), help="Assumed number of workers; goes with --rate.")
@click.option("--latency", default="0.1ms", show_default=True, metavar="TIME", help="Assumed latency of one message.")
@click.option(
    "--sync", default="0ms", show_default=True, metavar="TIME", help="Assumed time until all workers have met."
)
@click.option("--adding", type=float, default=0.2, show_default=True, help="Assumed nanoseconds to add a byte.")
@click.option(
    "--matrix", "matrices", multiple=True, metavar="[N*]MxK", help="Shape of a weight, for PowerSGD: 4*512x4608."
)
@click.option("--convolutions", metavar="NUMBER", help="Number of parameters in convolutions, for GradiVeQ: 11.1M.")
@click.option(
    "--code-times",
    "code_times",
    multiple=True,
    metavar="CODE=E,D",
    help="Nanoseconds per parameter to encode and to decode: thc=6,5.",
)
@click.option("--backend", type=click.Choice(["gloo", "nccl"]), default="gloo", show_default=True)
@click.option("--budget", default="8s", show_default=True, metavar="TIME", help="Longest time to measure the link.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File to write the rows to, as JSON."
)
def training(
    parameters: str,
    forward: str,
    backward: str,
    update: str,
    segments: int | None,
    rate: str | None,
    workers: int | None,
    latency: str,
    sync: str,
    adding: float,
    matrices: tuple[str, ...],
    convolutions: str | None,
    code_times: tuple[str, ...],
    backend: str,
    budget: str,
    json_path: Path | None,
) -> None:
    """Predict the step time of every code under every schedule, and say what to use, if anything.

    Under torchrun or `evenkeel lab run` the link is measured on the group itself; with --rate it is assumed.
    """
    from evenkeel.errors import ConfigurationError
    from evenkeel.figures.outputs import check_outputs
    from evenkeel.text_values import read_duration_s, read_quantity, read_rate_bps
    from evenkeel.training.plan.plan import Wanted, make_plan, on_a_group, read_code_times, read_matrix, show
    from evenkeel.training.plan.timing import NetworkLink, Step, ddp_segments, require_time

    def time_s(text: str, option: str) -> float:
        seconds = read_duration_s(text, option)
        require_time(option, seconds)
        return seconds

    count = read_quantity(parameters, "parameters")
    wanted = Wanted(
        Step(
            forward_s=time_s(forward, "forward"),
            backward_s=time_s(backward, "backward"),
            update_s=time_s(update, "update"),
            parameters=count,
            segments=ddp_segments(count) if segments is None else segments,
        ),
        matrices=tuple(matrix for text in matrices for matrix in read_matrix(text)),
        convolutions=read_quantity(convolutions, "convolutions") if convolutions is not None else 0,
        code_times_ns=dict(read_code_times(text) for text in code_times),
    )
    check_outputs(json=json_path)
    if rate is not None:
        if workers is None:
            raise ConfigurationError("workers: say how many with --workers; the link is assumed, as --rate is given")
        require_time("adding", adding)
        link = NetworkLink(
            alpha_s=time_s(latency, "latency"),
            beta_s_per_byte=8 / read_rate_bps(rate, "rate"),
            gamma_s_per_byte=adding * 1e-9,
            sync_s=time_s(sync, "sync"),
        )
        plan = make_plan(link, workers, wanted)
    elif workers is not None:
        raise ConfigurationError("rate: say it with --rate, as --workers is given; or leave both out, and measure")
    elif not os.environ.get("RANK"):
        raise ConfigurationError(
            "no link: assume one with --workers and --rate, or measure it: start this under torchrun or "
            "`evenkeel lab run`"
        )
    else:
        found = on_a_group(wanted, backend, read_duration_s(budget, "budget"))
        if found is None:
            return  # the first rank shows it
        plan = found
    shown = click.get_current_context().params.items()
    arguments = {name: value for name, value in shown if value not in (None, ()) and name != "json_path"}
    show(plan, arguments, json_path)
