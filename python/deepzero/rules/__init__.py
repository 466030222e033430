"""Difference rules of the Core ATen ops, one module per family. Importing this package fills the table."""

from . import attention, blackbox, linear, loss, norm, pointwise, pool, reduce, shape, softmax
from .registry import RULES, Rule, rule

__all__ = ["RULES", "Rule", "attention", "linear", "loss", "norm", "pointwise", "pool", "reduce", "rule", "shape"]
__all__ += ["blackbox", "softmax"]
