"""Add features to an unmodified slime at run time.

The public API for plugin authors: mark functions with `hookimpl`, raise `ArgumentError` to refuse, publish the module
under the entry-point group `miles_plugins`.
"""

from __future__ import annotations

from miles_plugins.errors import (
    ArgumentError,
    AttestationError,
    PatchError,
    PluginConflictError,
    PluginError,
    PluginNotFoundError,
    UpstreamError,
)
from miles_plugins.finding import Finding
from miles_plugins.gathering import Encoding
from miles_plugins.hookspecs import hookimpl
from miles_plugins.linears import Linear, linear_layers
from miles_plugins.microbatch import Microbatch, current_microbatch
from miles_plugins.packing import Packing, Rank, Schedule

__all__ = [
    "ArgumentError",
    "AttestationError",
    "Encoding",
    "Finding",
    "Linear",
    "Microbatch",
    "Packing",
    "PatchError",
    "PluginConflictError",
    "PluginError",
    "PluginNotFoundError",
    "Rank",
    "Schedule",
    "UpstreamError",
    "current_microbatch",
    "hookimpl",
    "linear_layers",
]
