"""Shows the progress bars of every measurement."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["bars"]


def bars(console: Console, width: int) -> Progress:
    """Shows bars on `console`, each behind `width` letters of what is being done; in the end, with the time it took."""
    return Progress(
        TextColumn(f"{{task.description:<{width}.{width}}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )
