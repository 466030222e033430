"""CIFAR residual networks (He et al. 2016) with parameter-free option-A shortcuts."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; option A: stride 2 and zero-padded channels on the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(out + x)


class ResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels with ``blocks`` blocks each: 6 * blocks + 2 layers.

    Input [n, in_channels, H, W]; output logits [n, num_classes]. Convolutions and the classifier start from
    Kaiming-normal weights.
    """

    def __init__(self, blocks: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages = []
        for fan_in, channels in ((16, 16), (16, 32), (32, 64)):
            first = BasicBlock(fan_in, channels, stride=1 if channels == fan_in else 2)
            stages.append(nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1))))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return cast("Tensor", self.linear(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1)))


def resnet20(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """269,722 parameters with 10 classes and 3 input channels."""
    return ResNet(3, num_classes, in_channels)


def resnet32(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """464,154 parameters with 10 classes and 3 input channels."""
    return ResNet(5, num_classes, in_channels)


def resnet44(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """658,586 parameters with 10 classes and 3 input channels."""
    return ResNet(7, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """853,018 parameters with 10 classes and 3 input channels."""
    return ResNet(9, num_classes, in_channels)


def resnet110(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """1,727,962 parameters with 10 classes and 3 input channels."""
    return ResNet(18, num_classes, in_channels)
