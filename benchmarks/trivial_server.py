"""Configurations of `evenkeel serve` for trivial models."""

from pathlib import Path
from typing import Any

from trivial_model import CLASSES, COSTS

from evenkeel.models.cards import DataType, ModelCard, save_card

__all__ = ["NAME", "trivial_config"]

NAME = "trivial"
_MODEL = Path(__file__).with_name("trivial_model.py").resolve()


def trivial_config(
    folder: Path, side: int, policy: str, *, datatype: DataType = "UINT8", **fields: Any
) -> dict[str, Any]:
    """What the YAML file of such a server says; its cards are written to `folder`.

    Items are [side, side, 3] for UINT8 and [3, side, side] for FP32. Backups hold the classifier and, for UINT8,
    collages of 2x2 and 3x3 with tiles of at most 32 pixels, to which larger items are shrunk.
    """
    codes: list[dict[str, Any]] = [{"kind": "replicate"}]
    _card(folder / "base.json", NAME, side, 1, 0, datatype)
    for grid in COSTS if datatype == "UINT8" else ():
        path = folder / f"collage-{grid}x{grid}.json"
        tile_side = min(side, 32)
        _card(path, f"{NAME}-{grid}x{grid}", grid * tile_side, grid, tile_side, datatype)
        codes.append({"kind": "collage", "model": str(path), "run": f"python:{_MODEL}:make_collage_{grid}x{grid}"})
    return {
        "model": str(folder / "base.json"),
        "run": f"python:{_MODEL}:make",
        "codes": codes,
        "policy": policy,
        "max_outstanding": 4096,
        **fields,
    }


def _card(path: Path, name: str, side: int, grid: int, tile_side: int, datatype: DataType) -> None:
    card = ModelCard(
        name=name,
        kind="classifier" if grid == 1 else "collage",
        file="none",  # `run` stands in for it
        sha256="none",
        classes=tuple(f"class {number}" for number in range(CLASSES)),
        height=side,
        width=side,
        layout="NHWC" if datatype == "UINT8" else "NCHW",
        datatype=datatype,
        grid=grid,
        tile_side=tile_side,
        relative_cost=COSTS.get(grid, 1.0),
    )
    save_card(card, path)
