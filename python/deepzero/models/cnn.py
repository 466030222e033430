"""The small convolutional network of the paper's comparison of gradient estimators (Fig. 2)."""

from __future__ import annotations

from torch import nn


def paper_cnn(depth: int = 3, width: int = 18, in_channels: int = 3, num_classes: int = 10) -> nn.Sequential:
    """``depth`` blocks of Conv3x3 (padding 1, bias), BatchNorm, ReLU, MaxPool2; then average pool and Linear.

    Input [n, in_channels, H, W] with H, W >= 2**depth; output logits [n, num_classes]. With width 18, 3 input channels
    and 10 classes: 730, 3,700, 6,670, 9,640, 12,610 parameters at depth 1 to 5, the sizes of the paper.
    """
    layers: list[nn.Module] = []
    for block in range(depth):
        layers += [
            nn.Conv2d(in_channels if block == 0 else width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
