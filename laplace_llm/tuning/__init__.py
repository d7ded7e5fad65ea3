"""Choosing the prior precision, one method a module."""

from laplace_llm.tuning.optimize import LoraTuned

__all__ = ["LoraTuned"]
