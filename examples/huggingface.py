"""A Hugging Face model, trained from function values alone.

    pip install transformers && python examples/huggingface.py

The model comes from a config with random weights, so nothing is downloaded. Any ``transformers`` model that returns a
loss fits the same objective: ``lambda model, batch: model(**batch).loss``.
"""

import os

import torch

import deepzero as dz

try:
    from transformers import ViTConfig, ViTForImageClassification
except ImportError:
    raise SystemExit("this example needs transformers: pip install transformers") from None

SMALL = os.environ.get("DEEPZERO_EXAMPLE_SMALL") == "1"
EPOCHS = 2 if SMALL else 8

torch.manual_seed(0)
torch.set_num_threads(1)
data = dz.data.digits()
loader = dz.data.Loader(data.train_images, data.train_labels, batch_size=64, drop_last=True)

config = ViTConfig(
    image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=32, num_labels=10,
)  # fmt: skip
model = ViTForImageClassification(config)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
masks = dz.sparsity.UniformRandom(model, sparsity=0.9)
estimator = dz.CGE(model, lambda model, batch: model(**batch).loss)


def accuracy() -> float:
    model.eval()
    with torch.no_grad():
        logits = model(pixel_values=data.test_images).logits
    model.train()
    return float((logits.argmax(1) == data.test_labels).float().mean())


print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} weights")
print(f"before: test accuracy {accuracy():.3f}")
for epoch in range(EPOCHS):
    for i, (images, labels) in enumerate(loader):
        optimizer.zero_grad()
        batch = {"pixel_values": images, "labels": labels}
        result = estimator.backward(batch, mask=masks.sample(epoch * len(loader) + i))
        optimizer.step()
    if SMALL or epoch % 4 == 3:
        print(f"epoch {epoch + 1:2}: loss {result.loss:.3f}")
print(f"after: test accuracy {accuracy():.3f}, {estimator.queries:,} queries")
