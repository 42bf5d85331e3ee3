"""Makes the models that `evenkeel bench gradients` trains: small enough for two cores."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["convnet", "mlp", "transformer"]

_WIDTH, _HEADS, _LAYERS = 64, 4, 2


def mlp(side: int, classes: int) -> nn.Module:
    """Makes two hidden layers for grey images `[b, side, side]`; 1.3 M parameters for MNIST, hardly any computation."""
    return _scaled(
        nn.Sequential(
            *(nn.Flatten(), nn.Linear(side * side, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU()),
            nn.Linear(512, classes),
        )
    )


def convnet(side: int, classes: int) -> nn.Module:
    """Makes four convolutions and a large head for images `[b, 3, side, side]`; CIFAR-10: .24 and .13 M parameters."""
    layers: list[nn.Module] = []
    for inside, outside, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 1), (128, 128, 2)):
        layers += [nn.Conv2d(inside, outside, 3, stride, padding=1), nn.ReLU()]
    head = (nn.Flatten(), nn.Linear(128 * (side // 8) ** 2, 64), nn.ReLU(), nn.Linear(64, classes))
    return _scaled(nn.Sequential(*layers, *head))


def transformer(length: int, classes: int) -> nn.Module:
    """Makes a character-level decoder for `[b, length]` numbers of characters; .12 M parameters, much computation."""
    return _Decoder(length, classes)


def _scaled(model: nn.Sequential) -> nn.Module:
    """Draws weights as He et al. do for ReLU: torch's own are so small that a deep model without norms is stuck."""
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


class _Decoder(nn.Module):
    def __init__(self, length: int, classes: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(classes, _WIDTH)
        self.places = nn.Embedding(length, _WIDTH)
        self.blocks = nn.Sequential(*(_Block() for _ in range(_LAYERS)))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, classes)

    def forward(self, letters: Tensor) -> Any:
        """Gives logits of each next character, `[b, length, classes]`."""
        places = torch.arange(letters.shape[1])
        return self.head(self.norm(self.blocks(self.letters(letters) + self.places(places))))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.mixed, self.joined = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.thought = nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH))

    def forward(self, row: Tensor) -> Any:
        """Applies attention to what came before, then a perceptron; adds both to their input."""
        batch, length, _ = row.shape
        parts = self.mixed(self.before(row)).view(batch, length, 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        row = row + self.joined(seen.transpose(1, 2).reshape(batch, length, _WIDTH))
        return row + self.thought(self.between(row))
