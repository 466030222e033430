"""Rows of a table that no index reads cost nothing: neither the base pass nor a difference is as large as the table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import deepzero as dz
from judge import FLOAT32, judge

MU = 1e-3
INDEX = torch.tensor([[3, 17, 17, 4], [17, 40, 2, 9], [40, 40, 3, 11]])


class Classifier(nn.Module):
    def __init__(self, table: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = table(), nn.Linear(8, 3)

    def forward(self, index: Tensor) -> Tensor:
        rows = self.table(index)
        return self.out(torch.tanh(rows if rows.dim() == 2 else rows.mean(1)))


def loss(model: nn.Module, index: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(index), torch.tensor([0, 1, 2]))


TABLES = {
    "embedding": lambda rows: nn.Embedding(rows, 8),
    "padded": lambda rows: nn.Embedding(rows, 8, padding_idx=4),
    "sum": lambda rows: nn.EmbeddingBag(rows, 8, mode="sum"),
    "mean": lambda rows: nn.EmbeddingBag(rows, 8, mode="mean", padding_idx=17),
    "max": lambda rows: nn.EmbeddingBag(rows, 8, mode="max", padding_idx=3),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_large_table_costs_what_a_small_one_does(kind: str) -> None:
    seen = []
    for rows in (50, 20_000):
        model = Classifier(lambda rows=rows: TABLES[kind](rows))
        engine = dz.CGE(model, loss, strict=True).engine
        with engine.prepared(INDEX) as ready:
            assert ready.base is not None
            (table,) = ready.base.graph.placeholders("table.weight")
            assert ready.base.exact(table).data_ptr() == model.table.weight.data_ptr()
            route = engine.planner.route(ready.base, "table.weight")
        seen.append([(ran.what, ran.carrier, ran.bytes) for ran in route.ran])
    assert seen[0] == seen[1]
    assert seen[0][0][1] == "OneChannel"


@pytest.mark.parametrize("kind", TABLES)
def test_quotients_of_a_large_table(kind: str) -> None:
    model = Classifier(lambda: TABLES[kind](5_000))
    mask = torch.zeros(5_000, 8, dtype=torch.bool)
    mask[INDEX.unique()] = True
    mask[4_000:4_010] = True  # never read
    found = dz.CGE(model, loss, mu=MU, strict=True).estimate(INDEX, {"table.weight": mask}).grads["table.weight"]
    exact = Classifier(lambda: TABLES[kind](5_000)).double()
    exact.load_state_dict(model.state_dict())
    wanted = torch.zeros(mask.shape, dtype=torch.float64)
    with torch.no_grad():
        base = float(loss(exact, INDEX))
        for i, j in mask.nonzero().tolist():
            before = float(exact.table.weight[i, j])
            exact.table.weight[i, j] += MU
            wanted[i, j] = (float(loss(exact, INDEX)) - base) / MU
            exact.table.weight[i, j] = before
    judge({"table.weight": found[mask]}, {"table.weight": wanted[mask]}).check(FLOAT32)
    assert not found[4_000:4_010].any()


def test_a_table_that_is_read_otherwise_too() -> None:
    """Tied to the output layer, every row is read."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 8)

        def forward(self, index: Tensor) -> Tensor:
            return torch.tanh(self.words(index).mean(1)) @ self.words.weight.T

    model = Tied()
    engine = dz.CGE(model, loss, strict=True).engine
    with engine.prepared(INDEX) as ready:
        assert ready.base is not None
        assert all(ready.base.exact(n).dtype is torch.float64 for n in ready.base.graph.placeholders("words.weight"))
