"""Shapes: how a tree grows and how it is cut. `shape("2x2x2")` makes one from its name."""

from tokentree.shapes.adaptive import Adaptive
from tokentree.shapes.base import Shape
from tokentree.shapes.cost import Cost
from tokentree.shapes.curve import CostCurve
from tokentree.shapes.dynamic import Dynamic
from tokentree.shapes.optimal import find_choices, optimal_paths
from tokentree.shapes.parse import shape
from tokentree.shapes.static import Static

__all__ = ["Adaptive", "Cost", "CostCurve", "Dynamic", "Shape", "Static", "find_choices", "optimal_paths", "shape"]
