"""Codes: answers from some of the replies. `code.py` holds the seam and its laws; each other file holds one code."""

from evenkeel.coding.berrut import Berrut
from evenkeel.coding.boxes import BoxCollage
from evenkeel.coding.cheap import Cheap
from evenkeel.coding.code import Answer, Code, Source, Task
from evenkeel.coding.collage import Collage
from evenkeel.coding.elastic import Elastic
from evenkeel.coding.parity import ConcatEncoder, Parity, ParityEncoder, SumEncoder
from evenkeel.coding.replicate import Replicate
from evenkeel.coding.score_form import ScoreForm
from evenkeel.coding.tiles import Pixels

__all__ = [
    "Answer",
    "Berrut",
    "BoxCollage",
    "Cheap",
    "Code",
    "Collage",
    "ConcatEncoder",
    "Elastic",
    "Parity",
    "ParityEncoder",
    "Pixels",
    "Replicate",
    "ScoreForm",
    "Source",
    "SumEncoder",
    "Task",
]
