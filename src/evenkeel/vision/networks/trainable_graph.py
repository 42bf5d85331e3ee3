"""Runs a user's ONNX classifier in PyTorch, so that its own weights can be trained further, at any resolution.

The graph is not translated into modules: its nodes are computed one after the other (`graph_operators.py`), with
weights as parameters. Sizes that an exporter wrote into the graph are freed: what a Reshape does is learned from one
run at the size that the graph was made for, and done alike at another.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self, cast

import numpy as np
import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn

from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import Layout
from evenkeel.vision.networks.graph_operators import OPERATOR_ERRORS, OPERATORS, filled, margins
from evenkeel.vision.networks.graph_resize import resized, sizes_of_resize
from evenkeel.vision.networks.graph_steps import GraphNode, first_line, read_steps, without_late_blocks
from evenkeel.vision.networks.reshape_alike import reshaped_alike

__all__ = ["TrainableGraph"]

# Where weights go in: (operator, place of the input). What else is constant in a graph is not learned.
_LEARNED = {
    *((kind, place) for kind in ("Conv", "Gemm", "BatchNormalization", "LayerNormalization") for place in (1, 2)),
    *((kind, place) for kind in ("MatMul", "Add", "Mul", "Sub") for place in (0, 1)),
    ("InstanceNormalization", 1), ("InstanceNormalization", 2), ("PRelu", 1),
}  # fmt: skip
# What they give is of a shape that other inputs say.
_SHAPED = ("Reshape", "Expand", "ConstantOfShape", "Range", "Tile", "Resize", "Upsample")


class TrainableGraph(nn.Module):
    """Gives scores `[n, classes]` of what the graph takes, `[n, 3, h, w]` or `[n, h, w, 3]` float32: logits.

    A softmax at the end is left out. Batch norms keep the statistics that the classifier was trained with. At the
    graph's own size its outputs are those of ONNX Runtime to about 1e-4 of their range.

    Args:
        model: the graph, weights inside.
        input_name: of the images, in the graph.
        output_name: of the scores.
        shape: of one image as the graph takes it, with a first axis of 1.
        layout: of the same.
        left_out: residual blocks that are passed by, counted from the last; a block is what an addition adds to the
            very map that it was computed from.

    Attributes:
        residual_blocks: that the whole graph has.
        left_out: of those.

    Raises:
        ConfigurationError: the graph holds what cannot be trained: control flow, operators that are not known; or has
            fewer residual blocks than are to be left out.
    """

    def __init__(
        self,
        model: ModelProto,
        input_name: str,
        output_name: str,
        shape: Sequence[int],
        layout: Layout = "NCHW",
        left_out: int = 0,
    ) -> None:
        super().__init__()
        self._input, self._shape, self._output = input_name, tuple(shape), output_name
        self._height_at = 2 if layout == "NCHW" else 1
        steps, constants = read_steps(model, output_name)
        self._steps, self.residual_blocks = without_late_blocks(steps, output_name, left_out)
        self.left_out = left_out
        used = list(dict.fromkeys(name for step in self._steps for name in step.inputs if name in constants))
        learned = {
            name
            for step in self._steps
            for place, name in enumerate(step.inputs)
            if (step.kind, place) in _LEARNED and name in constants
            if constants[name].is_floating_point() and constants[name].numel() > 1
        }
        self._places: dict[str, str] = {}
        for number, name in enumerate(used):  # in the order in which a pass meets them
            self._places[name] = f"weight_{number}" if name in learned else f"constant_{number}"
            if name in learned:
                self.register_parameter(self._places[name], nn.Parameter(constants[name].clone()))
            else:
                self.register_buffer(self._places[name], constants[name].clone())
        self._global: set[int] = set()  # pools that take the whole map
        self._reshaped: dict[int, tuple[list[int], list[int]]] = {}  # at the graph's own size: from, to
        self._targets: dict[int, list[int]] = {}  # at the present size; below zero: so many for each image
        self._known: dict[str, Tensor] = {}  # what follows from shapes alone
        with torch.no_grad():
            try:  # with two images it shows which axes grow with them
                self._run(torch.zeros(2, *self._shape[1:]), _SizeProbe(self, 2, first=True))
            except ConfigurationError:  # the graph may be for one
                self._run(torch.zeros(self._shape), _SizeProbe(self, 1, first=True))
        self.resize(*self._shape[self._height_at : self._height_at + 2])

    @classmethod
    def load(
        cls,
        path: Path,
        input_name: str,
        output_name: str,
        shape: Sequence[int],
        layout: Layout = "NCHW",
        left_out: int = 0,
    ) -> Self:
        """Reads the graph in `path`, weights in files beside it included; arguments as the class has them.

        Raises:
            ConfigurationError: it cannot be read, or holds what cannot be trained.
        """
        try:
            model = onnx.load(str(path))
        except Exception as error:  # protobuf's and onnx's own errors have no common base
            raise ConfigurationError(f"{path} cannot be read as an ONNX model: {error}") from error
        try:
            return cls(model, input_name, output_name, shape, layout, left_out)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error}") from error

    def resize(self, height: int, width: int) -> None:
        """Makes the graph take images of another size; position embeddings are resampled.

        Raises:
            ConfigurationError: it cannot; the message names the operator.
        """
        looks = []
        for rows in (2, 3):
            look = _SizeProbe(self, rows)
            shape = [rows, *self._shape[1:]]
            shape[self._height_at : self._height_at + 2] = height, width
            with torch.no_grad():
                scores = self._run(torch.zeros(shape), look)
            if scores.shape[0] != rows:
                raise ConfigurationError(f"it gives {scores.shape[0]} rows of scores for {rows} images")
            looks.append(look)
        two, three = looks
        self._targets = {}
        for place, found in two.shapes.items():
            grows = [small != large for small, large in zip(found, three.shapes[place], strict=True)]
            self._targets[place] = [-(size // 2) if grow else size for grow, size in zip(grows, found, strict=True)]
        self._known = {name: value for name, value in two.integers.items() if torch.equal(value, three.integers[name])}
        self._check_rows(shape)

    def _check_rows(self, shape: Sequence[int]) -> None:
        """Refuses a graph whose scores of an image depend on the images beside it."""
        images = torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            together, alone = self(images), self(images[1:2])
        if not torch.isfinite(together).all():
            raise ConfigurationError(f"its scores of images of {'x'.join(map(str, shape[1:]))} are not finite")
        reach = 1e-3 * max(float(alone.abs().max()), 1e-6)
        if not torch.allclose(together[1:2], alone, rtol=0, atol=reach):
            raise ConfigurationError(
                "an image's scores depend on those beside it: it was exported for one image at a time, and where "
                "several go cannot be told; export it with a free first axis"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Gives scores [n, classes]."""
        return self._run(images, None)

    @property
    def is_grouped(self) -> bool:
        """True if some convolution has groups: depthwise, mostly."""
        return any(step.kind == "Conv" and step.attributes.get("group", 1) > 1 for step in self._steps)

    def _run(self, images: Tensor, look: "_SizeProbe | None") -> Tensor:
        """Computes the nodes in order; with `look`, as a trial that notes sizes."""
        values: dict[str, Tensor] = {self._input: images}
        known = {} if look is not None else self._known
        for place, step in enumerate(self._steps):
            if look is None and all(name in known for name in step.outputs):
                continue
            inputs = [self._value(name, values, known) for name in step.inputs]
            try:
                if step.kind in _SHAPED:
                    given: Tensor | Sequence[Tensor] = self._shaped(place, step, inputs, images, look)
                elif place in self._global:
                    given = _whole_map(step.kind, cast(Tensor, inputs[0]))
                else:
                    if look is not None:
                        inputs = look.prepared(place, step, inputs)
                    given = OPERATORS[step.kind](step.attributes, inputs)
            except ConfigurationError:
                raise
            except OPERATOR_ERRORS as error:
                raise ConfigurationError(
                    f"the operator {step} cannot take images of {'x'.join(map(str, images.shape[1:]))}: "
                    f"{first_line(error)}"
                ) from error
            outputs = [given] if isinstance(given, Tensor) else given
            values.update(zip(step.outputs, outputs, strict=False))
            if look is not None:
                look.note(step, outputs)
        if self._output not in values:
            raise ConfigurationError(f"its output {self._output!r} does not come from the images")
        scores = values[self._output]
        return scores.flatten(1) if scores.ndim > 1 else scores[None]  # one image's may lack their first axis

    def _value(self, name: str, values: dict[str, Tensor], known: dict[str, Tensor]) -> Tensor | None:
        if not name:
            return None
        if name in values:
            return values[name]
        if name in known:
            return known[name]
        if name in self._places:
            return cast(Tensor, getattr(self, self._places[name]))
        return None  # follows from the number of images, and is of use to a Reshape alone

    def _shaped(
        self, place: int, step: GraphNode, inputs: list[Tensor | None], images: Tensor, look: "_SizeProbe | None"
    ) -> Tensor:
        """Computes an operator whose result's shape is the value of an input."""
        if look is None:
            target = self._targets[place]
        else:
            target = look.target(place, step, inputs)
            look.shapes[place] = list(target)
        value = inputs[0]
        if step.kind == "Reshape":
            return cast(Tensor, value).reshape([max(size, -1) for size in target])
        if step.kind in ("Resize", "Upsample"):
            return resized(step.attributes, inputs, target)
        rows = [images.shape[0] * -size if size < 0 else size for size in target]
        if step.kind == "Range":
            first, by = (float(cast(Tensor, inputs[which])) for which in (0, 2))
            return (torch.arange(rows[0], device=images.device) * by + first).to(cast(Tensor, value).dtype)
        if step.kind == "Expand":
            return cast(Tensor, value).expand(rows)
        if step.kind == "Tile":
            return cast(Tensor, value).repeat(rows)
        return filled(step.attributes, rows).to(images.device)


class _SizeProbe:
    """Notes the sizes in a trial run, and says what shape a Reshape makes at a size that the graph was not made for."""

    def __init__(self, graph: TrainableGraph, rows: int, first: bool = False) -> None:
        self.graph, self.rows, self.first = graph, rows, first
        self.shapes: dict[int, list[int]] = {}
        self.integers: dict[str, Tensor] = {}

    def note(self, step: GraphNode, outputs: Iterable[Tensor]) -> None:
        """Notes what follows from shapes alone."""
        for name, value in zip(step.outputs, outputs, strict=False):
            if not value.is_floating_point():
                self.integers[name] = value

    def target(self, place: int, step: GraphNode, inputs: list[Tensor | None]) -> list[int]:
        """Gives the shape that the result of an operator in `_SHAPED` has."""
        if step.kind in ("Resize", "Upsample"):
            return self._map_size(place, sizes_of_resize(step.attributes, inputs), cast(Tensor, inputs[0]))
        if step.kind == "Range":
            return [len(cast(Tensor, OPERATORS["Range"](step.attributes, inputs)))]
        wanted = inputs[-1]
        assert wanted is not None
        asked = [int(size) for size in wanted.reshape(-1).tolist()]
        if step.kind in ("ConstantOfShape", "Tile"):
            return asked
        value = inputs[0]
        assert value is not None
        if step.kind == "Expand":
            return list(np.broadcast_shapes(tuple(value.shape), tuple(asked)))
        shape = [int(size) for size in value.shape]
        if not step.attributes.get("allowzero", 0):
            asked = [shape[axis] if size == 0 else size for axis, size in enumerate(asked)]
        if -1 in asked and math.prod(shape) % math.prod(asked) == 0:
            asked[asked.index(-1)] = math.prod(shape) // -math.prod(asked)
        if self.first:
            self.graph._reshaped[place] = (shape, asked)
            return asked
        # What is computed from the present size is right; what an exporter wrote down is of the graph's own.
        if math.prod(asked) == math.prod(shape) and (step.inputs[-1] not in self.graph._places or asked[0] == shape[0]):
            return asked
        return reshaped_alike(*self.graph._reshaped[place], shape, self.rows)

    def _map_size(self, place: int, asked: list[int], value: Tensor) -> list[int]:
        """Gives the size to scale a map to: in proportion, where an exporter wrote down that of the graph's own."""
        shape = [int(size) for size in value.shape]
        if self.first:
            self.graph._reshaped[place] = (shape, asked)
            return asked
        before, after = self.graph._reshaped[place]
        written = asked[1:] == after[1:] and shape[1:] != before[1:]
        sized = zip(shape, before, after, strict=True)
        return [max(1, round(now * then / was)) for now, was, then in sized] if written else asked

    def prepared(self, place: int, step: GraphNode, inputs: list[Tensor | None]) -> list[Tensor | None]:
        """Finds pools over the whole map, and resamples position embeddings."""
        value = inputs[0]
        if self.first and step.kind in ("AveragePool", "MaxPool") and value is not None:
            # With borders it may be one place of several, as a 3x3 pool is over a map that is 3x3 by chance.
            kernel = step.attributes["kernel_shape"]
            if list(value.shape[2:]) == list(kernel) and not any(map(any, margins(step.attributes, value, kernel))):
                self.graph._global.add(place)
        if not self.first and step.kind == "Add" and len(inputs) == 2:
            for constant, other in ((0, 1), (1, 0)):
                name, kept, taken = step.inputs[constant], inputs[constant], inputs[other]
                if name not in self.graph._places or kept is None or taken is None:
                    continue
                if kept.ndim == 3 and taken.ndim == 3 and kept.shape[1] not in (1, taken.shape[1]):
                    parameter = nn.Parameter(_resampled(kept.detach(), int(taken.shape[1]), step))
                    setattr(self.graph, self.graph._places[name], parameter)
                    inputs[constant] = parameter
        return inputs


def _resampled(embedding: Tensor, length: int, step: GraphNode) -> Tensor:
    """Resamples a position embedding [1, tokens, width] of a square grid, and perhaps a class token before it."""
    for extra in (0, 1, 2):
        old, new = math.isqrt(embedding.shape[1] - extra), math.isqrt(max(0, length - extra))
        if old**2 + extra == embedding.shape[1] and new**2 + extra == length and new > 0:
            kept, grid = embedding[:, :extra], embedding[:, extra:]
            grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
            grid = nn.functional.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
            return torch.cat([kept, grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], 1)
    raise ConfigurationError(
        f"the operator {step} adds {embedding.shape[1]} rows to {length}, which are no square grids of positions"
    )


def _whole_map(kind: str, images: Tensor) -> Tensor:
    axes = list(range(2, images.ndim))
    return images.amax(axes, keepdim=True) if kind == "MaxPool" else images.mean(axes, keepdim=True)
