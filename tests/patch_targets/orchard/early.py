"""Has copied names before anything is patched, when it is imported first."""

from orchard.tools import HAVE_LADDER, LIMIT, REGISTRY, cut
from orchard.tools import cut as chop
from orchard.trees import Tree

__all__ = ["HAVE_LADDER", "LIMIT", "REGISTRY", "Tree", "chop", "cut", "use"]


def use():
    return cut(7)
