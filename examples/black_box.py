"""A scikit-learn classifier inside the objective: train an adapter in front of a model that has no gradient.

    python examples/black_box.py

A random forest, fitted on clean digits, stumbles over noisy ones. It only returns probabilities, and those are
piecewise constant. ``dz.blackbox`` makes it part of the objective; a small denoiser in front of it, which starts as
the identity, learns from its answers alone.
"""

import os

import torch
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor, nn

import deepzero as dz

SMALL = os.environ.get("DEEPZERO_EXAMPLE_SMALL") == "1"
EPOCHS = 4 if SMALL else 12
NOISE = 1.0  # in standard deviations of a pixel

torch.manual_seed(0)
torch.set_num_threads(1)
data = dz.data.digits()
forest = RandomForestClassifier(20 if SMALL else 50, min_samples_leaf=2, random_state=0)
forest.fit(data.train_images.flatten(1).numpy(), data.train_labels.numpy())

# rows are independent, so all perturbations of a block are handed over as one call
ask = dz.blackbox(lambda images: forest.predict_proba(images.flatten(1).numpy()), batched=True)

denoiser = nn.Conv2d(1, 1, kernel_size=5, padding=2)
nn.init.dirac_(denoiser.weight)
nn.init.zeros_(denoiser.bias)


def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    right = ask(model(images)).gather(1, labels[:, None])
    return -right.clamp_min(1e-3).log().mean()


def noisy(images: Tensor) -> Tensor:
    return images + NOISE * torch.randn_like(images)


def accuracy(model: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((ask(model(images)).argmax(1) == data.test_labels).float().mean())


test = noisy(data.test_images)
print(f"forest on clean digits: test accuracy {accuracy(nn.Identity(), data.test_images):.3f}")
print(f"before: test accuracy {accuracy(denoiser, test):.3f} under noise")

loader = dz.data.Loader(data.train_images, data.train_labels, batch_size=256, drop_last=True)
optimizer = torch.optim.Adam(denoiser.parameters(), lr=0.02)
# a forest does not see a small step; a large central one measures the slope across its jumps
estimator = dz.CGE(denoiser, objective, mu=0.2, scheme="central")
ask.calls = ask.rows = 0
for epoch in range(EPOCHS):
    for images, labels in loader:
        optimizer.zero_grad()
        result = estimator.backward((noisy(images), labels))
        optimizer.step()
    print(f"epoch {epoch + 1:2}: loss {result.loss:.3f}")
print(f"{estimator.queries:,} queries, {ask.calls:,} calls of the forest, {ask.rows:,} images classified")
print(f"after: test accuracy {accuracy(denoiser, test):.3f} under noise")
