"""Tiny ONNX files, written byte by byte, since the package onnx is not part of a light install."""

import numpy as np

UINT8, FLOAT = 2, 1


def varint(value):
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def number(field, value):
    return varint(field << 3) + varint(value)


def block(field, content):
    content = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | 2) + varint(len(content)) + content


def tensor(name, values):
    values = np.asarray(values, np.float32)
    shape = b"".join(number(1, length) for length in values.shape)
    return shape + number(2, FLOAT) + block(8, name) + block(9, values.tobytes())


def value(name, element, shape):
    sizes = b"".join(block(1, block(2, size) if isinstance(size, str) else number(1, size)) for size in shape)
    return block(1, name) + block(2, block(1, number(1, element) + block(2, sizes)))


def node(operator, inputs, output, *attributes):
    ends = b"".join(block(1, name) for name in inputs) + block(2, output)
    return ends + block(4, operator) + b"".join(block(5, attribute) for attribute in attributes)


def whole(name, content):
    return block(1, name) + number(3, content) + number(20, 2)


def wholes(name, contents):
    return block(1, name) + b"".join(number(8, content) for content in contents) + number(20, 7)


def model(nodes, inputs, outputs, tensors):
    graph = b"".join(block(1, each) for each in nodes) + block(2, "graph")
    graph += b"".join(block(5, each) for each in tensors)
    graph += b"".join(block(11, each) for each in inputs) + b"".join(block(12, each) for each in outputs)
    return number(1, 7) + block(7, graph) + block(8, number(2, 11))


def boxes_model(side, boxes):
    """Takes uint8 `[n, side, side, 3]`, gives the same `boxes` [boxes, columns] for every row."""
    boxes = np.asarray(boxes, np.float32)
    nodes = [
        node("Cast", ["images"], "a", whole("to", FLOAT)),
        node("ReduceMean", ["a"], "b", wholes("axes", [2, 3]), whole("keepdims", 0)),
        node("ReduceMean", ["b"], "c", wholes("axes", [1]), whole("keepdims", 1)),
        node("Unsqueeze", ["c"], "d", wholes("axes", [2])),
        node("Mul", ["d", "zero"], "e"),
        node("Add", ["e", "boxes"], "scores"),
    ]
    return model(
        nodes,
        [value("images", UINT8, ("n", side, side, 3))],
        [value("scores", FLOAT, ("n", *boxes.shape))],
        [tensor("zero", [0.0]), tensor("boxes", boxes[None])],
    )


def linear_model(side, weights, element):
    """Takes `[n, side, side, 3]`, gives the mean colour times `weights` [3, classes] for every row."""
    nodes = [
        node("Cast", ["images"], "a", whole("to", FLOAT)),
        node("ReduceMean", ["a"], "b", wholes("axes", [1, 2]), whole("keepdims", 0)),
        node("MatMul", ["b", "weights"], "scores"),
    ]
    return model(
        nodes,
        [value("images", element, ("n", side, side, 3))],
        [value("scores", FLOAT, ("n", len(weights[0])))],
        [tensor("weights", weights)],
    )
