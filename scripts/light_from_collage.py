"""Makes the light classifier that comes with the package: the network that reads a tile of the shipped 3x3 Collage-CNN.

    python scripts/light_from_collage.py --data cifar10.parquet --out models/

What a Collage-CNN says of a tile depends on that tile alone, so its network is a small classifier by itself. The file
is cut free of the canvas around it; nothing is trained. Its temperature comes from training images that the network was
not fitted to, its accuracy from the test images, its cost from passes of both models in turns.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from evenkeel.images.image_set import read_images
from evenkeel.models import shipped
from evenkeel.models.cards import load_card, save_card
from evenkeel.models.measure import ModelSession, fit_temperature, interleaved_latencies_ms, wilson
from evenkeel.vision.networks.export import file_sha256

SOURCE, NAME = "cifar10-collage-3x3", "cifar10-light"
HELD_OUT, HELD_OUT_SEED = 2000, 94  # as in the fitting of the Collage-CNN
ROUNDS = 300


def cut_free(model: onnx.ModelProto, side: int, classes: int) -> onnx.ModelProto:
    """Takes the cutting of the canvas, and the joining of the scores, from around the network of a tile."""
    graph = model.graph
    first = next(node for node in graph.node if node.op_type == "Conv")
    pixels = next(node for node in graph.node if node.op_type == "Add").output[0]
    last = next(node for node in graph.node if node.op_type == "Div")
    first.input[0], last.output[0] = pixels, "scores"
    wanted, kept = {"scores"}, []
    before = list(graph.node)
    for node in reversed(before[: before.index(last) + 1]):  # what follows joins the tiles' scores
        if wanted.intersection(node.output):
            kept.insert(0, node)
            wanted.update(node.input)
    inputs = [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n", side, side, 3])]
    outputs = [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", classes])]
    weights = [tensor for tensor in graph.initializer if tensor.name in wanted]
    cut = helper.make_model(helper.make_graph(kept, NAME, inputs, outputs, weights), opset_imports=model.opset_import)
    cut.ir_version = model.ir_version
    onnx.checker.check_model(cut, full_check=True)
    return cut


def main() -> None:
    """Cut, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Parquet file with a column `split`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its card")
    arguments = parser.parse_args()
    whole, base = load_card(shipped.card_path(SOURCE)), load_card(shipped.card_path("cifar10-base"))
    side, path = whole.tile_side, arguments.out / f"{NAME}.onnx"
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cut_free(onnx.load(str(shipped.model_path(SOURCE))), side, len(whole.classes)).SerializeToString())
    session, accurate = ModelSession.open(path), ModelSession.open(shipped.model_path("cifar10-base"))
    _, held = read_images(arguments.data, height=side, width=side, split="train").hold_out(HELD_OUT, HELD_OUT_SEED)
    test = read_images(arguments.data, height=side, width=side, split="test")
    hits = int((session(test.pixels).argmax(axis=1) == test.labels).sum())
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    mine_ms, its_ms = interleaved_latencies_ms([lambda: session(image), lambda: accurate(image)], ROUNDS)
    card = replace(
        base,
        name=NAME,
        file=path.name,
        sha256=file_sha256(path),
        mean=whole.mean,
        std=whole.std,
        interpolation=whole.interpolation,
        temperature=fit_temperature(session(held.pixels), held.labels),
        macs=whole.macs // whole.cells,
        parameters=whole.parameters,
        latency_ms=round(mine_ms, 3),
        relative_cost=round(mine_ms / its_ms, 3),
        accuracy=wilson(hits, len(test.pixels), f"all {len(test.pixels):,} test images, one view"),
        notes={
            "taken_from": SOURCE,
            "taken_from_sha256": whole.sha256,
            "beside": base.name,
            "held_out_images": HELD_OUT,
            "latency_how": f"median of {ROUNDS} interleaved passes, batch 1, one thread, processor time, CPU",
        },
    )
    save_card(card, arguments.out / f"{NAME}.json")
    print(card.accuracy, f"{card.latency_ms} ms, {card.relative_cost} of a pass of {base.name}")


if __name__ == "__main__":
    main()
