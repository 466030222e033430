"""A network of sign activations: backpropagation sees a zero gradient, function values do not.

    python examples/sign_network.py

The derivative of sign is 0 wherever it exists, so autograd cannot move the first layer at all. A finite difference
with a large step can: moving one weight by mu flips some signs of the batch, and the loss answers.
"""

import os

import torch
from torch import nn
from torch.nn import functional as F

import deepzero as dz
from deepzero.baselines import Backprop

SMALL = os.environ.get("DEEPZERO_EXAMPLE_SMALL") == "1"
EPOCHS = 3 if SMALL else 20


class Sign(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sign(x)


torch.manual_seed(0)
torch.set_num_threads(1)
data = dz.data.digits()


def objective(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), Sign(), nn.Linear(24, 10))


def train(model: nn.Module, estimator: dz.Estimator) -> float:
    """Test accuracy after training; the same masks, batches and optimizer for either estimator."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    masks = dz.sparsity.UniformRandom(model, sparsity=0.75)
    loader = dz.data.Loader(data.train_images, data.train_labels, batch_size=128)
    for epoch in range(EPOCHS):
        for i, batch in enumerate(loader):
            optimizer.zero_grad()
            estimator.backward(batch, mask=masks.sample(epoch * len(loader) + i))
            optimizer.step()
    with torch.no_grad():
        return float((model(data.test_images).argmax(1) == data.test_labels).float().mean())


model = network()
batch = (data.train_images[:128], data.train_labels[:128])
for name, estimator in {
    "autograd": Backprop(model, objective),
    "deepzero": dz.CGE(model, objective, mu=0.2, scheme="central"),
}.items():
    first = estimator.estimate(batch).grads["1.weight"]
    print(f"{name}: {int((first != 0).sum()):,} of {first.numel():,} gradients of the first layer are not zero")

model = network()
print(f"before: test accuracy {train(model, Backprop(model, objective)):.3f} by backpropagation: the last layer only")
model = network()
estimator = dz.CGE(model, objective, mu=0.2, scheme="central")
print(f"after: test accuracy {train(model, estimator):.3f} by function values, {estimator.queries:,} queries")
