"""Trains a tile network from a bank of scored views: distillation in plain PyTorch, resumable bit for bit."""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evenkeel.arrays import LEAST_PROBABILITY, PixelArray
from evenkeel.errors import ConfigurationError
from evenkeel.vision.fit.lossy_views import LossyViews
from evenkeel.vision.fit.views import ViewBank
from evenkeel.vision.networks.architecture import TileNet
from evenkeel.vision.networks.arithmetic import bfloat16_is_fast
from evenkeel.vision.networks.checkpoint import load_checkpoint, save_checkpoint
from evenkeel.vision.networks.data import translate
from evenkeel.vision.networks.muon import Muon
from evenkeel.vision.networks.own_tiles import OwnTiles

__all__ = [
    "FIT_MEAN",
    "FIT_STD",
    "FitRecipe",
    "Held",
    "Progress",
    "TileReader",
    "agreement",
    "answers_of",
    "as_tiles_show",
    "begun_as",
    "fit_tiles",
    "in_bfloat16",
    "shrink",
    "soft_temperature",
    "standardise",
    "start_from",
    "whiten",
]

# What `standardise` takes off and divides by, of pixel values in 0..1: one choice for whatever pictures come.
FIT_MEAN = (0.5, 0.5, 0.5)
FIT_STD = (0.25, 0.25, 0.25)
TileReader = TileNet | OwnTiles  # what reads a collage's tiles
_CHECKPOINT_EVERY_S = 60.0
_OFTEN_UNUSED = ("lossy", "quality", "blended")  # of a recipe: without them checkpoints are as they once were
_PART = 250  # tiles
_WATCHED = 300  # held-out images that show how a training goes
_WATCHED_EVERY = 20  # times as many tiles are trained between two looks, so that looking takes a sixtieth of the time
_GATHERED = 10_000  # images that the norms' statistics are of in the end
_WHITENED = 1_000_000  # pixels whose 2x2 patches the first filters are made from: some 100 MB


@dataclass(frozen=True)
class FitRecipe:
    """Describes how a tile network is trained; what it is trained on stands in its `ViewBank`."""

    epochs: float = 40.0  # passes over the images, each time in one of their views
    tiles: int = 500  # in a step
    rate: float = 0.13  # of Muon, radians a step at the start; falls straight to zero, as the others do
    bias_rate: float = 100.0  # of norm biases, for 1,000 tiles a step; they set how sparse the features are
    head_rate: float = 0.415
    decay: float = 4e-3  # what a step of 1,000 tiles takes from biases and head at the start
    own_rate: float = 4e-4  # of AdamW, where the weights are the classifier's own
    own_decay: float = 0.01
    layer_rate: float = 0.3  # of the first layer's own weights, as a share; those between lie between
    average: float = 0.99  # of the weights, per step; nearer 1 is smoother and later
    temperature: float = 2.0  # of the classifier's scores
    lossy: float = 0.0  # largest share of its blocks that a view loses
    quality: int = 0  # of the JPEG that views with losses cross a link as
    blended: float = 0.0  # share of the steps that show blends of two views
    jitter: int = 2  # pixels by which a view is moved once more when it is shown
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """Says how far a training has come: steps done and wanted, the loss of the last one, seconds in all attempts.

    The loss is NaN where an earlier attempt has done the last step. `agreement` is of the averaged weights, with the
    classifier, on some held-out images, when it was last measured; None before that, or where none are watched.
    """

    step: int
    steps: int
    loss: float
    seconds: float
    agreement: float | None = None


@dataclass(frozen=True)
class Held:
    """Holds images that are not learned from and show how a training goes, and when it may stop.

    Attributes:
        pixels: uint8 [n, h, w, 3].
        answers: the classifier's [n].
        until: share of them with which the averaged weights have to agree for the training to stop; None: never.
    """

    pixels: PixelArray
    answers: NDArray[np.int64]
    until: float | None = None


def soft_temperature(scores: Tensor, target: float = 0.75) -> float:
    """Finds the temperature at which the mean highest probability of logits `scores` [n, classes] is `target`.

    Scores of a sure classifier say little but its first choice; softened so far, the other classes teach as well.
    """
    low, high = 0.05, 50.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        surer = float((scores / middle).softmax(1).amax(1).mean()) > target
        low, high = (middle, high) if surer else (low, middle)
    return round((low * high) ** 0.5, 3)


class _Average:
    """Keeps a running mean of a network's weights and statistics."""

    def __init__(self, network: TileReader, decay: float) -> None:
        self.network, self.decay = copy.deepcopy(network).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, 1 - 10 / (10 + step))  # a short memory while everything still moves
        fast = network.state_dict()
        for name, slow in self.network.state_dict().items():
            if slow.is_floating_point():
                slow.lerp_(fast[name], weight)


def fit_tiles(
    network: TileReader,
    bank: ViewBank,
    recipe: FitRecipe,
    checkpoint: Path,
    side: int = 32,
    device: str = "cpu",
    held: Held | None = None,
) -> Iterator[Progress]:
    """Trains `network` in place on the views in `bank`, shrunk to `side` pixels; gives the progress after each step.

    Where the checkpoint says that all is done, it gives the progress once.

    With `held` images it measures the agreement on the first few of them every so many steps, and stops where that on
    these and then that on all of them is what `held.until` wants.

    In the end the averaged weights stand in `network`, and its scores are of the classifier's scale.

    What the classifier said of a view is also taught of the same view moved by a pixel or two, since it says nearly the
    same of that; with the scored views alone the network would come to know them by heart.

    A training that was stopped goes on from `checkpoint`, and ends with the very weights that it would have had:
    which tiles a step shows follows from the seed and the step's number alone. Where the machine is fast in bfloat16 it
    computes in that as far as it is safe: weights are another machine's bit for bit only if their arithmetic is alike.

    Raises:
        ConfigurationError: the checkpoint is of another network or recipe, is damaged, or cannot be written.
    """
    network.to(device)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    average = _Average(network, recipe.average)
    optimisers = _optimisers(network, recipe)
    peaks = [[float(group["lr"]) for group in optimiser.param_groups] for optimiser in optimisers]
    per_epoch = bank.per_epoch // recipe.tiles
    if per_epoch == 0:
        raise ConfigurationError(f"{len(bank)} images are too few: one step shows {recipe.tiles} tiles")
    steps = max(1, round(recipe.epochs * per_epoch))
    about = {
        "recipe": {name: value for name, value in asdict(recipe).items() if value or name not in _OFTEN_UNUSED},
        "images": len(bank),
        "more": bank.more,
        "views": bank.views,
        **_form(network),
    }
    change = LossyViews(recipe.lossy, recipe.quality) if recipe.lossy else None
    step, spent_s, reached = _load(checkpoint, about, network, average, optimisers)
    every = max(1, min(steps, _WATCHED_EVERY * _WATCHED // recipe.tiles))
    began = saved = time.monotonic()
    enough = held is not None and _is_enough(reached, held, average.network, side)
    if step >= steps or enough:
        yield Progress(step, steps, math.nan, spent_s, reached)  # what an earlier attempt has finished is reported too
    network.train()
    while step < steps and not enough:
        epoch, place = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        order = bank.order(generator)
        seen = torch.randint(0, bank.views, (len(bank),), generator=generator)
        for start in range(place * recipe.tiles, per_epoch * recipe.tiles, recipe.tiles):
            images = order[start : start + recipe.tiles]
            views = seen[images]
            shifts = torch.Generator().manual_seed(recipe.seed * 1_000_003 + 500_000 + step)
            pixels = translate(bank.pixels(images, views), recipe.jitter, shifts)
            if change is not None:
                pixels = change(pixels, shifts)
            pixels, taught = shrink(pixels, side), bank.scores(images, views) / recipe.temperature
            if torch.rand((), generator=shifts) < recipe.blended:
                pixels, taught = blend(pixels, taught, shifts)
            loss = _step(network, pixels.to(device), taught.to(device), optimisers)
            share = 1 - step / steps
            for optimiser, rates in zip(optimisers, peaks, strict=True):
                for group, rate in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = rate * share
            step += 1
            average.update(network, step)
            if held is not None and (step % every == 0 or step == steps):
                reached = agreement(average.network, held.pixels[:_WATCHED], held.answers[:_WATCHED], side)
                enough = _is_enough(reached, held, average.network, side)
            seconds = spent_s + time.monotonic() - began
            if time.monotonic() - saved > _CHECKPOINT_EVERY_S or step == steps or enough:
                _save(checkpoint, about, network, average, optimisers, step, seconds, reached)
                saved = time.monotonic()
            yield Progress(step, steps, loss, seconds, reached)
            if step == steps or enough:
                break
    network.load_state_dict(average.network.state_dict())
    _gather_statistics(network, bank, side, device, change)
    network.scale_scores(recipe.temperature)  # as the classifier scales them
    network.eval()


def _is_enough(reached: float | None, held: Held, network: TileReader, side: int) -> bool:
    """True if the agreement that is wanted is `reached` on a few images, and on all of them too."""
    if held.until is None or reached is None or reached < held.until:
        return False
    return len(held.pixels) <= _WATCHED or agreement(network, held.pixels, held.answers, side) >= held.until


def in_bfloat16(network: nn.Module, device: str) -> bool:
    """True if `network` trains faster in bfloat16: convolutions with groups do not (13 ms a tile became 21)."""
    return bfloat16_is_fast(device) and not (isinstance(network, OwnTiles) and network.graph.is_grouped)


@torch.no_grad()
def _gather_statistics(network: nn.Module, bank: ViewBank, side: int, device: str, change: LossyViews | None) -> None:
    """Gathers the norms' statistics for the weights as they are now: those met on the way are of other weights."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return  # those of the classifier's own graph stay as they are
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all parts
    network.train()
    shown = bank.order(torch.Generator().manual_seed(0))[:_GATHERED]
    for images in torch.split(shown, _PART):
        pixels = bank.pixels(images, images % bank.views)
        if change is not None:
            pixels = change(pixels, torch.Generator().manual_seed(int(images[0])))
        network(standardise(shrink(pixels, side).to(device)))


def agreement(network: TileReader, pixels: PixelArray, answers: NDArray[np.int64], side: int) -> float:
    """Gives the share of images uint8 [n, h, w, 3] to which `network` gives the classifier's `answers` [n]."""
    return float((answers_of(network, pixels, side) == answers).mean())


@torch.no_grad()
def answers_of(network: TileReader, pixels: PixelArray, side: int) -> NDArray[np.int64]:
    """Gives the classes [n] that `network` sees in images uint8 [n, h, w, 3]."""
    was_training, device = network.training, next(network.parameters()).device
    network.eval()
    found = []
    for start in range(0, len(pixels), _PART):
        tiles = shrink(torch.from_numpy(pixels[start : start + _PART]).permute(0, 3, 1, 2), side)
        found.append(network(standardise(tiles.to(device))).argmax(1).cpu().numpy())
    network.train(was_training)
    return np.concatenate(found)


def whiten(network: TileNet, bank: ViewBank, side: int) -> None:
    """Sets the first filters of `network` from the images in `bank`, shrunk to `side` pixels."""
    count = max(1, _WHITENED // side**2)
    chosen = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[:count]
    network.set_whitening(standardise(shrink(bank.pixels(chosen, torch.zeros_like(chosen)), side)))


def _form(network: TileReader) -> dict[str, Any]:
    """Gives what a checkpoint has to say of a network, beside the shapes of its weights."""
    if isinstance(network, TileNet):
        return {"halvings": network.halvings}
    left_out = network.graph.left_out
    return {"weights": "classifier", **({"left_out": left_out} if left_out else {})}


def begun_as(folder: Path) -> tuple[Literal["fresh", "classifier"], int]:
    """Tells with which weights the fit in `folder` began, and how many residual blocks of the classifier it left out.

    Raises:
        ConfigurationError: a checkpoint in it is damaged.
    """
    about = [load_checkpoint(path, "about")["about"] for path in sorted(folder.glob("*.checkpoint"))]
    own = [each for each in about if each.get("weights") == "classifier"]
    return ("classifier", int(own[0].get("left_out", 0))) if own else ("fresh", 0)


def start_from(network: TileReader, folder: Path) -> None:
    """Gives `network` the averaged weights of an earlier fit: of the checkpoint in `folder` of its size.

    Raises:
        ConfigurationError: there is none, or a damaged one.
    """
    wanted = {name: value.shape for name, value in network.state_dict().items()}
    for path in sorted(folder.glob("*.checkpoint")):
        state = load_checkpoint(path, "about", "average")
        weights = state["average"]
        alike = {name: value.shape for name, value in weights.items()} == wanted
        if alike and _form(network).items() <= state["about"].items():
            network.load_state_dict(weights)
            return
    raise ConfigurationError(f"start: {folder} holds no checkpoint of a network of this size; give the folder of a fit")


def _optimisers(network: TileReader, recipe: FitRecipe) -> list[torch.optim.Optimizer]:
    if isinstance(network, OwnTiles):
        layers = list(network.graph.parameters())  # as a pass meets them
        groups = [
            {
                "params": [layer],
                "lr": recipe.own_rate * (recipe.layer_rate + (1 - recipe.layer_rate) * place / len(layers)),
                "weight_decay": recipe.own_decay if layer.ndim > 1 else 0.0,
            }
            for place, layer in enumerate(layers)
        ]
        return [torch.optim.AdamW(groups, foreach=True)]
    share = recipe.tiles / 1000
    parts = ((network.biases, recipe.bias_rate * share), ([network.head.weight], recipe.head_rate))
    plain = [{"params": part, "lr": rate, "weight_decay": recipe.decay * share / rate} for part, rate in parts]
    return [Muon(network.filters, recipe.rate), torch.optim.SGD(plain, momentum=0.85, nesterov=True)]


def _step(
    network: nn.Module,
    pixels: Tensor,
    taught: Tensor,
    optimisers: list[torch.optim.Optimizer],
) -> float:
    """Takes a step on the mean loss of all tiles, part by part, so that what a part needs stays in a CPU's cache."""
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=True)
    parts = round(max(1, len(pixels) / _PART)) if pixels.device.type == "cpu" else 1
    total = 0.0
    for tiles, said in zip(pixels.chunk(parts), taught.chunk(parts), strict=True):
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=in_bfloat16(network, pixels.device.type)):
            scores = network(standardise(tiles))
        loss = teach(scores.float(), said) * (len(tiles) / len(pixels))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    for optimiser in optimisers:
        optimiser.step()
    return total


def shrink(pixels: Tensor, side: int) -> Tensor:
    """Squeezes images [n, 3, h, w] into uint8 tiles [n, 3, side, side], as `coding.answers.tiles.Tile` does."""
    if pixels.shape[2:] == (side, side):
        return pixels
    return nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True)


def as_tiles_show(pixels: PixelArray, side: int) -> PixelArray:
    """Gives images uint8 [n, h, w, 3] shrunk to tiles of `side` and enlarged again: with what a tile keeps of them."""
    whole = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    seen = nn.functional.interpolate(shrink(whole, side), tuple(whole.shape[2:]), mode="bicubic", antialias=True)
    return seen.permute(0, 2, 3, 1).contiguous().numpy()


def standardise(pixels: Tensor) -> Tensor:
    """Makes float32 images in -2..2 from uint8 `pixels` [n, 3, h, w], channels last in memory."""
    return ((pixels.float() / 255 - FIT_MEAN[0]) / FIT_STD[0]).contiguous(memory_format=torch.channels_last)


def blend(pixels: Tensor, taught: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blends each of `pixels` uint8 [n, 3, h, w] with another, half of it at most, and what is `taught` of them.

    Of the taught logits [n, classes] the probabilities are blended. A classifier's own weights learn a few thousand
    images by heart in a dozen passes; they cannot learn all blends of them.
    Source: Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization" (2018), section 2.
    """
    others = torch.randperm(len(pixels), generator=generator)
    weights = 0.5 + 0.5 * torch.rand((len(pixels), 1), generator=generator)
    blended = torch.lerp(pixels[others].float(), pixels.float(), weights[:, :, None, None])
    probabilities = taught.softmax(1)
    probabilities = torch.lerp(probabilities[others], probabilities, weights)
    return blended.round().to(torch.uint8), probabilities.clamp_min(LEAST_PROBABILITY).log()


def teach(scores: Tensor, taught: Tensor) -> Tensor:
    """Gives the divergence of `scores` from those `taught`, logits both [n, classes]; mean over rows.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2; but only the
    classifier's scores are divided by the temperature, so that training is the same whatever their scale.
    """
    return nn.functional.kl_div(scores.log_softmax(1), taught.log_softmax(1), reduction="batchmean", log_target=True)


def _save(
    path: Path,
    about: dict[str, Any],
    network: nn.Module,
    average: _Average,
    optimisers: list[torch.optim.Optimizer],
    step: int,
    seconds: float,
    reached: float | None,
) -> None:
    state = {
        "about": about,
        "network": network.state_dict(),
        "average": average.network.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "step": step,
        "seconds": seconds,
        "agreement": reached,
    }
    save_checkpoint(path, state)


def _load(
    path: Path,
    about: dict[str, Any],
    network: nn.Module,
    average: _Average,
    optimisers: list[torch.optim.Optimizer],
) -> tuple[int, float, float | None]:
    if not path.is_file():
        return 0, 0.0, None
    state = load_checkpoint(path, "about", "network", "average", "optimisers", "step", "seconds")
    if state["about"] != about:
        raise ConfigurationError(
            f"checkpoint {path} is of {state['about']}, not of {about}; give the same arguments or another --out"
        )
    network.load_state_dict(state["network"])
    average.network.load_state_dict(state["average"])
    for optimiser, stored in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(stored)
    reached = state.get("agreement")
    return int(state["step"]), float(state["seconds"]), None if reached is None else float(reached)
