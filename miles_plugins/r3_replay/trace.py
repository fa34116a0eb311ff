"""The recorded routing of one sample: what is valid, which tokens it belongs to, and how parts of it are joined.

Row i holds the experts that token i went through; the last token of a sample was never forwarded, so a sample of n
tokens has n - 1 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miles_plugins.errors import PluginError

if TYPE_CHECKING:
    import numpy
    import torch

BLOCK = 1 << 18  # ids


def moe_layers(layers: int, moe_layer_freq: int | Sequence[int]) -> list[int]:
    """Global indices of the MoE layers, as Megatron reads `--moe-layer-freq`: every n-th, or a 0/1 list."""
    if isinstance(moe_layer_freq, int):
        return [layer for layer in range(layers) if layer % moe_layer_freq == 0]
    return [layer for layer, is_moe in enumerate(moe_layer_freq) if is_moe]


@dataclass(frozen=True)
class Routing:
    """What valid routing of a model looks like.

    Attributes:
        layers: global indices of its MoE layers.
        topk: experts a token and layer.
        experts: experts a layer.
    """

    layers: tuple[int, ...]
    topk: int
    experts: int

    @property
    def bytes_per_token(self) -> int:
        """Of a trace in memory."""
        return len(self.layers) * self.topk * (1 if self.experts <= 256 else 2)

    def narrow(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids` in the smallest dtype, contiguous."""
        import torch

        return ids.to(torch.uint8 if self.experts <= 256 else torch.int16).contiguous()

    def check(self, rows: torch.Tensor, expected_rows: int, sample: str) -> None:
        """Raise PluginError unless `rows` are [expected_rows, MoE layers, topk] ids, each expert once a token.

        Nothing else may reach a token dispatcher, which counts on `topk` different experts a token.
        """
        shape, expected = tuple(rows.shape), (expected_rows, len(self.layers), self.topk)
        if shape != expected:
            raise refused(sample, "its shape is wrong", f"(rows, MoE layers, top-k) = {shape}", f"{expected}")
        if not rows.numel():
            return
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= self.experts:
            raise refused(sample, "an expert id is out of range", f"{low} to {high}", f"0 to {self.experts - 1}")
        if (at := _repeated(rows.contiguous().numpy().reshape(-1), self.topk)) is not None:
            row, layer = divmod(at // self.topk, len(self.layers))
            raise refused(
                sample,
                "an expert is named twice for one token",
                f"experts {rows[row, layer].tolist()} at token {row}, layer {self.layers[layer]}",
                f"{self.topk} different experts",
            )


def _repeated(ids: numpy.ndarray[Any, Any], topk: int) -> int | None:
    """Where an id occurs that occurs again among the `topk` of its row; None if there is none.

    Ids at every distance within a row are compared, all rows at once: ten times as fast as sorting the rows.
    """
    import numpy

    block = min(BLOCK, len(ids)) // topk * topk  # whole rows, few enough to stay in the processor's cache
    column = numpy.arange(block) % topk
    for distance in range(1, topk):
        in_row = column + distance < topk
        for begin in range(0, len(ids), block):
            part = ids[begin : begin + block]
            same = part[distance:] == part[:-distance]
            same &= in_row[: len(same)]
            if same.any():
                return begin + int(same.argmax())
    return None


def refused(sample: str, problem: str, got: object, expected: object) -> PluginError:
    """The error for routing of a sample that cannot be replayed."""
    return PluginError(
        f"the recorded routing of {sample} cannot be replayed: {problem}",
        {"got": got, "expected": expected},
        "look for the request in the log of the SGLang server; docs/r3_replay.md lists the known causes",
    )


@dataclass(frozen=True)
class Span:
    """Rows from `begin` up to `end` were recorded under one version of the weights."""

    begin: int
    end: int
    weight_version: str


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routing of one sample, with the tokens that it belongs to and where it comes from.

    Attributes:
        experts: [rows, MoE layers, topk] expert ids, uint8 up to 256 experts, else int16.
        tokens: [rows] int32, the token that each row routed. With them it is known, not assumed, that rows and tokens
            belong together, also after a sample was trimmed or resumed.
        spans: which rows were recorded under which weights, in order, without gaps.
    """

    experts: torch.Tensor
    tokens: torch.Tensor
    spans: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.experts)

    def head(self, rows: int) -> RoutingTrace:
        """Its first rows: of a sample whose last tokens were taken away."""
        spans = tuple(Span(s.begin, min(s.end, rows), s.weight_version) for s in self.spans if s.begin < rows)
        return RoutingTrace(self.experts[:rows], self.tokens[:rows], spans)

    def of(self, tokens: Sequence[int], sample: str, needed: int | None = None) -> RoutingTrace:
        """The rows of a sample that has these tokens now: all of them, or fewer if its end was trimmed.

        Args:
            needed: how many rows there must be; by default one for each token but the last. After them nothing is
                trained on: a conversation may end on a tool's answer that no engine ever saw.

        Raises:
            PluginError: tokens without a row, or rows of other tokens.
        """
        rows = max(len(tokens) - 1, 0)
        needed = rows if needed is None else needed
        shared = self._shared(tokens)
        if shared < min(rows, len(self)):
            raise refused(sample, "it belongs to other tokens", *_difference(self.tokens, tokens, shared))
        if len(self) < needed:
            raise refused(sample, "its last tokens have none", f"{len(self)} rows", f"{needed} rows")
        return self if len(self) <= rows else self.head(rows)

    def _shared(self, tokens: Sequence[int]) -> int:
        """How many first rows belong to the same tokens."""
        import torch

        count = min(len(tokens), len(self))
        same = self.tokens[:count] == torch.tensor(tokens[:count], dtype=torch.int32)
        return count if same.all() else int((~same).nonzero()[0])


def join(
    earlier: RoutingTrace | None,
    rows: torch.Tensor,
    start: int,
    tokens: Sequence[int],
    weight_version: str,
    keep: bool,
    sample: str,
) -> RoutingTrace:
    """The routing of a sample after a response that recorded `rows` for its tokens from `start` on.

    Args:
        earlier: what was recorded for the sample before; None if nothing was.
        rows: [tokens - 1 - start, MoE layers, topk], valid.
        tokens: the sample's tokens now, the response's among them.
        weight_version: of the weights that recorded the rows.
        keep: whether rows recorded earlier stay, as long as they belong to the same tokens; else the new ones count.
        sample: how an error names the sample.

    Raises:
        PluginError: the tokens before `start` have no earlier rows.
    """
    import torch

    new = RoutingTrace(
        rows,
        torch.tensor(tokens[start : start + len(rows)], dtype=torch.int32),
        (Span(start, start + len(rows), weight_version),) if len(rows) else (),
    )
    covered = earlier._shared(tokens[: start + len(rows)]) if earlier is not None else 0
    if covered < start:
        got = f"earlier rows for {covered} tokens" if earlier is not None else "no earlier rows"
        raise refused(sample, "there is a gap before the response's rows", got, f"rows for the first {start} tokens")
    begin = covered if keep else start
    if earlier is None or begin == 0:
        return new
    kept = earlier.head(begin)
    return RoutingTrace(
        torch.cat([kept.experts, new.experts[begin - start :]]),
        torch.cat([kept.tokens, new.tokens[begin - start :]]),
        _joined(kept.spans, Span(begin, start + len(rows), weight_version)),
    )


def _joined(spans: tuple[Span, ...], last: Span) -> tuple[Span, ...]:
    if last.begin == last.end:
        return spans
    if spans and spans[-1].weight_version == last.weight_version:
        return (*spans[:-1], Span(spans[-1].begin, last.end, last.weight_version))
    return (*spans, last)


def _difference(tokens: torch.Tensor, others: Sequence[int], at: int) -> tuple[str, str]:
    return f"token {int(tokens[at])} at position {at}", f"token {others[at]} there"
