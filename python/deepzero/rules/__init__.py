"""Difference rules of the Core ATen ops, one module per family. Importing this package fills the table."""

from . import attention, blackbox, linear, loss, norm, pointwise, pool, reduce, shape, softmax
from .registry import RULES, Family, Rule, rule

__all__ = ["RULES", "Family", "Rule", "attention", "blackbox", "linear", "loss", "norm", "pointwise", "pool"]
__all__ += ["reduce", "rule", "shape", "softmax"]
