"""A stand-in for upstream: one of everything that the patch tests change."""

from orchard.tools import cut, decorated
from orchard.trees import Tree as ReexportedTree

__all__ = ["ReexportedTree", "cut", "decorated"]
