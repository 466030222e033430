"""A plain PyTorch training loop whose gradients come from function values alone.

    python examples/train_loop.py

Everything but one line is what you would write for ``loss.backward()``: any module, any ``torch.optim`` optimizer.
Each step estimates a fresh random tenth of the coordinates; the others get a gradient of exactly 0.
"""

import os
import time

import torch
from torch.nn import functional as F

import deepzero as dz

SMALL = os.environ.get("DEEPZERO_EXAMPLE_SMALL") == "1"
EPOCHS = 4 if SMALL else 30

torch.manual_seed(0)
torch.set_num_threads(1)
data = dz.data.digits()
loader = dz.data.Loader(data.train_images, data.train_labels, batch_size=64)

model = dz.models.mlp(image_size=8, hidden=(32,))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
masks = dz.sparsity.UniformRandom(model, sparsity=0.9)  # drawn anew every step
estimator = dz.CGE(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))


def accuracy() -> float:
    with torch.no_grad():
        return float((model(data.test_images).argmax(1) == data.test_labels).float().mean())


coordinates = sum(p.numel() for p in model.parameters())
print(f"{coordinates:,} weights, {round(coordinates * 0.1):,} of them estimated a step")
print(f"before: test accuracy {accuracy():.3f}")

step, start = 0, time.perf_counter()
for epoch in range(EPOCHS):
    for batch in loader:
        optimizer.zero_grad()
        result = estimator.backward(batch, mask=masks.sample(step))  # instead of loss.backward()
        optimizer.step()
        step += 1
    if SMALL or epoch % 5 == 4:
        print(f"epoch {epoch + 1:2}: loss {result.loss:.3f}, test accuracy {accuracy():.3f}")

seconds = time.perf_counter() - start
print(f"after: test accuracy {accuracy():.3f}")
print(f"{estimator.queries:,} queries in {seconds:.1f} s, {estimator.queries / seconds:,.0f} queries/s")
