"""Shapes: how a tree grows and how it is cut. `shape("2x2x2")` makes one from its name."""

from tokentree.shapes.base import Shape
from tokentree.shapes.dynamic import Dynamic
from tokentree.shapes.parse import shape
from tokentree.shapes.static import Static

__all__ = ["Dynamic", "Shape", "Static", "shape"]
