"""Parameter counts of the literature, shapes, and the registry's errors."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn import functional as F

from deepzero.models import MODELS, mlp, paper_cnn, vit


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("depth", "count"), [(1, 730), (2, 3700), (3, 6670), (4, 9640), (5, 12610)])
def test_the_papers_cnn_has_the_papers_sizes(depth, count):
    assert parameters(paper_cnn(depth=depth)) == count


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet20", 269722), ("resnet32", 464154), ("resnet44", 658586), ("resnet56", 853018), ("resnet110", 1727962)],
)
def test_residual_networks_have_the_sizes_of_the_literature(name, count):
    model = MODELS[name]()
    assert parameters(model) == count
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_option_a_shortcut_subsamples_and_pads_channels():
    block = MODELS["resnet20"]().layer2[0].eval()
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        block.bn2.weight.zero_()
        out = block(x)
    assert torch.equal(out[:, 8:24], F.relu(x[:, :, ::2, ::2]))
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_residual_weights_start_from_kaiming_normal():
    torch.manual_seed(0)
    weight = MODELS["resnet20"]().layer3[2].conv2.weight.detach()
    assert float(weight.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_mlp_and_vit_sizes():
    assert parameters(mlp(1, 8, 10, hidden=(32,))) == 64 * 32 + 32 + 32 * 10 + 10
    model = vit()
    assert model.position.shape == (1, 64, 96)
    assert len(model.blocks) == 6
    block = 4 * 96 + (96 * 288 + 288) + (96 * 96 + 96) + (96 * 384 + 384) + (384 * 96 + 96)
    assert parameters(model) == 48 * 96 + 96 + 64 * 96 + 6 * block + 2 * 96 + 970


def test_plain_attention_equals_the_fused_one():
    torch.manual_seed(0)
    block = vit().blocks[0].double()
    x = torch.randn(2, 5, 96, dtype=torch.double)
    q, k, v = block.qkv(block.norm1(x)).chunk(3, -1)

    def split(t):
        return t.view(2, 5, 3, 32).transpose(1, 2)

    y = x + block.project(
        F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).reshape(2, 5, 96)
    )
    torch.testing.assert_close(block(x), y + block.down(F.gelu(block.up(block.norm2(y)))))


def test_every_registered_model_takes_its_shape_from_the_data():
    for name, factory in MODELS.items():
        accepted = inspect.signature(factory).parameters
        shape = {"in_channels": 1, "image_size": 28, "num_classes": 7}
        model = factory(**{key: value for key, value in shape.items() if key in accepted})
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7), name


def test_vit_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match=r"image_size must be a multiple of patch .* image_size=30, patch=4"):
        vit(image_size=30)
