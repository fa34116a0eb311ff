"""Which pass and which microbatch is running right now, in the forward pass and when activations are recomputed.

Pipelines run forwards and backwards of several microbatches interleaved, and recomputation happens inside a backward.
So the current microbatch is captured where a checkpointed function is first called, and set again where it is called
again.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Microbatch:
    """One microbatch of one pass.

    Attributes:
        batch: slime's microbatch (see the hook `microbatch_begins`).
        positions: [tokens] int64, where each token of this rank's MoE layers comes from: its position in the
            concatenation of the samples' tokens (`batch["unconcat_tokens"]`), -1 for padding. Packing, padding, context
            and sequence parallelism are all in it.
        stream: [packed tokens] int64, the same of this rank's packed stream, as attention sees it: sequence parallelism
            shares that among ranks, which have `positions` each.
        chunk: the virtual pipeline stage whose forward pass this is; 0 without such stages.
        values: what plugins keep with it, by plugin name.
        recomputing: whether activations are being recomputed, not computed for the first time.
    """

    __slots__ = ("batch", "chunk", "positions", "recomputing", "stream", "values")

    def __init__(
        self, batch: dict[str, Any], positions: torch.Tensor, chunk: int = 0, stream: torch.Tensor | None = None
    ) -> None:
        self.batch = batch
        self.positions = positions
        self.stream = positions if stream is None else stream
        self.chunk = chunk
        self.values: dict[str, Any] = {}
        self.recomputing = False


_current: ContextVar[Microbatch | None] = ContextVar("microbatch", default=None)


def current_microbatch() -> Microbatch | None:
    """The microbatch that runs in this thread; None outside of a pass."""
    return _current.get()


def set_current(microbatch: Microbatch | None) -> None:
    """The forward pass of this microbatch begins (or, with None, the pass ended)."""
    _current.set(microbatch)


@contextmanager
def announced_pass(hook: Any, args: Namespace, stage: str, model: Sequence[Any]) -> Iterator[None]:
    """A pass over all microbatches, between the hooks `pass_begins` and `pass_ends`, which are always paired."""
    try:
        hook.pass_begins(args=args, stage=stage, model=model)
        yield
    except BaseException as error:
        hook.pass_ends(args=args, stage=stage, model=model, error=error)
        raise
    else:
        hook.pass_ends(args=args, stage=stage, model=model, error=None)
    finally:
        set_current(None)


def begin_microbatch(
    hook: Any,
    args: Namespace,
    batch: dict[str, Any],
    positions: torch.Tensor,
    chunk: int = 0,
    stream: torch.Tensor | None = None,
) -> None:
    """The forward pass of one microbatch begins: see `Microbatch` for its parts."""
    microbatch = Microbatch(batch, positions, chunk, stream)
    set_current(microbatch)
    hook.microbatch_begins(args=args, microbatch=microbatch)


def bind(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, bound to the microbatch that runs now; its second call is a recomputation."""
    microbatch = _current.get()
    if microbatch is None:
        return function
    calls = 0

    def bound(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        before = microbatch.recomputing
        token = _current.set(microbatch)
        microbatch.recomputing = before or calls > 1
        try:
            return function(*args, **kwargs)
        finally:
            microbatch.recomputing = before
            _current.reset(token)

    return bound
