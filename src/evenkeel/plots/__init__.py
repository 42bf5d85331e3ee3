"""Figures from records and rows, a file for each kind. matplotlib is loaded only when one is drawn."""

from evenkeel.plots.code_figure import codes
from evenkeel.plots.drawing import save, svg
from evenkeel.plots.fill_figure import fills
from evenkeel.plots.gradient_figure import gradients
from evenkeel.plots.serving_figures import Latencies, colours, latency_histograms, sources, tail

__all__ = [
    "Latencies",
    "codes",
    "colours",
    "fills",
    "gradients",
    "latency_histograms",
    "save",
    "sources",
    "svg",
    "tail",
]
