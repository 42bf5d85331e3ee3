"""An ordinary classifier, trained in the ordinary way, to fit collages to: ResNet-18 as an ONNX file.

    python examples/resnet18.py --images tiny.parquet --split train --test-split val --side 64 --out resnet18.onnx
    evenkeel fit --classifier resnet18.onnx --images tiny.parquet --split train --test-split val --out fitted/

The file takes float images [n, 3, side, side] in 0..1. A training that was stopped goes on from `<out>.checkpoint`.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016), table 1.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evenkeel.images.image_set import read_images
from evenkeel.vision.networks.checkpoint import load_checkpoint, save_checkpoint
from evenkeel.vision.networks.data import LabelledImages, alternating_flip, as_images, translate

BATCH = 200
CHECKPOINT_EVERY_S = 120


class Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, maps: Tensor) -> Tensor:
        return (self.path(maps) + self.shortcut(maps)).relu()


class ResNet18(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        before = 64
        for width in (64, 128, 256, 512):
            layers += [Block(before, width, 1 if width == before else 2), Block(width, width, 1)]
            before = width
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((images - 0.45) / 0.25)


def train(
    network: nn.Module, images: LabelledImages, epochs: float, rate: float, checkpoint: Path, bfloat16: bool = False
) -> None:
    """SGD with momentum; the rate rises for a tenth of the time and falls to zero."""
    plain = [parameter for parameter in network.parameters() if parameter.ndim == 1]
    decayed = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 5e-4}]
    optimiser = torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True)
    per_epoch = len(images) // BATCH
    steps, done, reach = round(epochs * per_epoch), 0, images.pixels.shape[-1] // 10
    if checkpoint.is_file():
        state = load_checkpoint(checkpoint, "network", "optimiser", "done")
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        done = state["done"]
    network.train()
    began = saved = time.monotonic()
    for step in range(done, steps):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        chosen = order[place * BATCH : (place + 1) * BATCH]
        pixels = alternating_flip(images.pixels[chosen], chosen, epoch, 0)
        pixels = translate(pixels, reach, torch.Generator().manual_seed(1_000_000 + step))
        for group in optimiser.param_groups:
            group["lr"] = rate * min(10 * (step + 1) / steps, (1 - step / steps) / 0.9)
        pixels = (pixels.float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            scores = network(pixels)
        loss = cross_entropy(scores.float(), images.labels[chosen], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0:
            print(f"step {step} of {steps}, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
        if time.monotonic() - saved > CHECKPOINT_EVERY_S or step + 1 == steps:
            state = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "done": step + 1}
            save_checkpoint(checkpoint, state)
            saved = time.monotonic()


@torch.no_grad()
def accuracy(network: nn.Module, images: LabelledImages) -> float:
    network.eval()
    parts = zip(images.pixels.split(250), images.labels.split(250), strict=True)
    return sum(int((network(pixels / 255).argmax(1) == labels).sum()) for pixels, labels in parts) / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="with labels: folder, Parquet, npz or IDX")
    parser.add_argument("--split", help="of a Parquet file with a column `split`")
    parser.add_argument("--test-split", help="of the same file; default: every tenth image")
    parser.add_argument("--side", type=int, default=64, help="of the images, pixels")
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=0.2, help="of learning, the highest")
    parser.add_argument("--bfloat16", action="store_true", help="faster on a processor with AVX-512 BF16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True, help="ONNX file")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    side = arguments.side
    read = read_images(arguments.images, height=side, width=side, split=arguments.split)
    if arguments.test_split is None:
        rest, held_out = read.hold_out(len(read) // 10, 0)
        images, tests = as_images(read.take(rest)), as_images(held_out)
    else:
        images = as_images(read)
        tests = as_images(read_images(arguments.images, height=side, width=side, split=arguments.test_split))
    if len(images) < BATCH:
        parser.error(f"{len(images)} images are too few; {BATCH} are shown at once")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    network = ResNet18(1 + int(images.labels.max())).to(memory_format=torch.channels_last)
    checkpoint = arguments.out.with_suffix(".checkpoint")
    train(network, images, arguments.epochs, arguments.rate, checkpoint, arguments.bfloat16)
    print(f"right: {100 * accuracy(network, tests):.1f} % of {len(tests):,} test images")
    torch.onnx.export(
        network.eval(),
        (torch.rand(2, 3, side, side),),
        str(arguments.out),
        input_names=["images"],
        output_names=["scores"],
        dynamic_axes={"images": {0: "n"}, "scores": {0: "n"}},
        dynamo=False,
    )


if __name__ == "__main__":
    main()
