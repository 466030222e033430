"""A small run with dropout, augmentation, masks and momentum; `python resumable.py FOLDER EPOCHS [KILL_AT SIGNAL]`.

With KILL_AT the process sends itself SIGNAL in the middle of an estimate of that step (SIGINT+ sends it twice).
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from deepzero.baselines import PlainLoop
from deepzero.data import Loader
from deepzero.sparsity import UniformRandom
from deepzero.training import Checkpoints, Metrics, Progress, Trainer, checkpoint, warmup_cosine

EPOCHS = 4
STEPS_PER_EPOCH = 4


def make(
    folder: Path,
    *,
    kill_at: int = -1,
    kill: str = "",
    budget: int | None = None,
    optimizer=torch.optim.SGD,
    estimator=PlainLoop,
):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(32, 3)
    )
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(14, 1, 6, 6, generator=generator), torch.randint(3, (14,), generator=generator)
    calls = 0

    def objective(model, batch):
        nonlocal calls
        if trainer.step == kill_at:
            calls += 1
            if calls == 3:
                for _ in range(2 if kill.endswith("+") else 1):
                    os.kill(os.getpid(), getattr(signal, kill.rstrip("+")))
        return F.cross_entropy(model(batch[0]), batch[1])

    options = {"lr": 0.05, "momentum": 0.9} if optimizer is torch.optim.SGD else {"lr": 0.01}
    descent = optimizer(model.parameters(), **options)
    trainer = Trainer(
        model,
        estimator(model, objective, mu=1e-2, budget=budget),
        descent,
        Loader(images, labels, 4, seed=3, crop=1, flip=True),
        epochs=EPOCHS,
        scheduler=warmup_cosine(descent, total_steps=EPOCHS * STEPS_PER_EPOCH, warmup_steps=2),
        masks=UniformRandom(model, 0.8, seed=5),
        evaluate=lambda m: {"test_accuracy": float((m(images).argmax(1) == labels).float().mean())},
        callbacks=(Metrics(folder / "metrics.jsonl"), Progress("test"), Checkpoints(folder / "checkpoints", every=3)),
        config={"note": "test"},
    )
    return trainer


def main(folder: Path, kill_at: int = -1, kill: str = "") -> None:
    trainer = make(folder, kill_at=kill_at, kill=kill)
    last = folder / "checkpoints" / "last.pt"
    if last.exists():
        trainer.load_state_dict(checkpoint.load(last))
    trainer.fit()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *(kind(text) for kind, text in zip((int, str), sys.argv[2:], strict=False)))
