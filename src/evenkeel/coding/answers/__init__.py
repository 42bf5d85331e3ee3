"""Holds the codes, each in a file, that answer from some of the replies. `coding/code.py` has the laws."""

from evenkeel.coding.answers.berrut import Berrut
from evenkeel.coding.answers.boxes import BoxCollage
from evenkeel.coding.answers.cascade import Cascade
from evenkeel.coding.answers.cheap import Cheap
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.elastic import Elastic
from evenkeel.coding.answers.parity import ConcatEncoder, Parity, ParityEncoder, SumEncoder
from evenkeel.coding.answers.replicate import Replicate
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.answers.tiles import Pixels
from evenkeel.coding.code import Answer, Code, Source, Task

__all__ = [
    "Answer",
    "Berrut",
    "BoxCollage",
    "Cascade",
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
