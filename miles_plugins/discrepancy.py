"""How far the trainer's log-probabilities are from the engine's, on the tokens that the loss counts.

Pure but for `reduced`, and for a context-parallel rank, which Megatron knows. The numbers come from the training
forward pass itself (hook `training_log_probs`), so no correction or rejection mask of the loss can flatter them. What a
rank adds up is one tensor of fixed size, whose sum over ranks is what one rank with all the tokens would have; nothing
is read back from the device before `result()`.

With p the trainer, q the rollout and r = log p - log q of a token that q sampled, the estimators of KL(q || p) are
k1 = -r and k3 = exp(r) - 1 - r (Schulman, http://joschu.net/blog/kl-approx.html); k3 is never negative.
"""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from miles_plugins.errors import UpstreamError

if TYPE_CHECKING:
    import torch

# The histogram of |difference|: from 2^-30 (1e-9) to 2^10 nats, each octave cut into 32 bins of equal width. A bin is
# read as its middle: within 1/64, 1.6 %, of every value in it.
OCTAVES = range(-30, 10)
STEPS = 32
BINS = 1 + len(OCTAVES) * STEPS + 1  # what is smaller, zero too, comes first; what is larger, last
RESOLUTION = 1 / (2 * STEPS)

_BITS_BELOW_A_BIN = 52 - STEPS.bit_length() + 1  # of a float64's significand; the bits above say octave and bin
_FIRST_BIN = (1023 + OCTAVES.start) * STEPS  # these bits of the smallest value that has a bin of its own

_SUMS = ("tokens", "nonfinite", "difference", "k1", "k3", "weighted", "weights")  # before the histogram
_WORST = ("difference", "sample", "position", "token", "train", "rollout")


# -- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """One token of a response, with the log-probability that each side gave it."""

    sample: int  # its index, or a running number (see `Discrepancy.add_microbatch`)
    position: int  # in the response
    token: int  # its id, -1 if that was not given
    train: float
    rollout: float

    @property
    def difference(self) -> float:
        """|log p in training - log p in the rollout| in nats; nan or inf where a log-prob is not finite."""
        return abs(self.train - self.rollout)


@dataclass(frozen=True)
class Result:
    """The discrepancy of what was added up; every number but the counts is nan when no token could be compared.

    Attributes:
        tokens: tokens compared: counted by the loss, and finite on both sides.
        nonfinite: tokens that the loss counts and that have a nan or an infinity on a side. They are in no mean.
        nonfinite_share: their share of the tokens that the loss counts.
        mean: of |d| over tokens, in nats.
        sample_mean: the mean over samples of each one's mean |d|, which is what slime reports without
            --calculate-per-token-loss. From slime v0.3.0 on a sample is all that one rollout became. A sample of
            which the loss counts no token has no mean here; slime takes it as 0.
        k1, k3: estimates of KL(rollout || train), means over tokens.
        p50, p99, p999: quantiles of |d| over tokens, within `RESOLUTION` of an exact one; below 1e-9 they are 0.
        maximum: the largest |d|, exact.
        worst: the tokens with the largest |d| among those of this rank, worst first, those that are not finite before
            all others.
    """

    tokens: int
    nonfinite: int
    nonfinite_share: float
    mean: float
    sample_mean: float
    k1: float
    k3: float
    p50: float
    p99: float
    p999: float
    maximum: float
    worst: tuple[Token, ...] = ()

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """The numbers by name, for `step_metrics`; without tokens to compare, only the counts."""
        named = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "worst"}
        return {f"{prefix}{name}": float(value) for name, value in named.items() if not math.isnan(value)}


# -- adding up -------------------------------------------------------------------------------------------------------


class Discrepancy:
    """Adds up the differences of any number of tokens, in any order and division; begin a new one for each step."""

    def __init__(self, worst: int = 5) -> None:
        """`worst` is how many of the worst tokens are kept."""
        import torch

        self.samples = 0  # added so far on this rank, for their running numbers
        self._keep = worst
        self._sums = torch.zeros(len(_SUMS) + BINS, dtype=torch.float64)
        self._maximum = torch.zeros((), dtype=torch.float64)
        self._worst = torch.zeros(0, len(_WORST), dtype=torch.float64)

    def add(
        self,
        train: torch.Tensor,
        rollout: torch.Tensor,
        mask: torch.Tensor,
        *,
        sample: int | None = None,
        tokens: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        counted: torch.Tensor | float | None = None,
    ) -> None:
        """Add the tokens of one sample, or those of it that this rank has.

        Args:
            train, rollout: [n] log-probabilities of the same tokens on both sides. Where the mask is 0 they may be
                anything, nan too.
            mask: [n], not 0 where the loss counts the token.
            sample: its index; by default they are numbered as they come.
            tokens, positions: [n] ids of the tokens, and their places in the response; by default -1, and 0 to n - 1.
            counted: how many tokens of the whole sample the loss counts, where other ranks have some of them.
        """
        import torch

        size, device = len(train), train.device
        mask = mask.to(device) != 0
        counted = mask.sum() if counted is None else counted
        self._add(
            train,
            rollout,
            mask,
            (1 / torch.as_tensor(counted, dtype=torch.float64, device=device).clamp_min(1)).expand(size),
            torch.full((size,), self.samples if sample is None else sample, device=device),
            torch.arange(size, device=device) if positions is None else positions,
            torch.full((size,), -1, device=device) if tokens is None else tokens,
        )
        self.samples += 1

    def add_microbatch(
        self,
        args: Namespace,
        batch: Mapping[str, Any],
        log_probs: Sequence[torch.Tensor],
        context_rank: int | None = None,
    ) -> bool:
        """Add what the hook `training_log_probs` was given; False if the rollout has no log-probabilities.

        Loss masks and tokens are those of whole samples; with context parallelism the part of this rank is cut out of
        them. Samples are named by `sample_indices`, if the plugin asks for these in `microbatch_keys`.

        Args:
            context_rank: by default Megatron's.

        Raises:
            UpstreamError: slime has other tokens on this rank than those.
        """
        import torch

        rollout = batch.get("rollout_log_probs")
        if not rollout:
            return False
        totals, responses = batch["total_lengths"], batch["response_lengths"]
        device, size = log_probs[0].device, args.context_parallel_size
        rank = _context_rank(size) if context_rank is None else context_rank
        padded = batch["max_seq_lens"] if getattr(args, "qkv_format", "thd") == "bshd" else totals
        parts = [response_part(*each, size, rank) for each in zip(totals, responses, padded, strict=True)]
        masks = [mask.to(device) != 0 for mask in batch["loss_masks"]]
        lengths = [sum(map(len, part)) for part in parts]
        _check(responses, lengths, masks, rollout, log_probs)

        counted = next((batch[name] for name in _OF_A_ROLLOUT if batch.get(name) is not None), None)
        counted = torch.stack([mask.sum() for mask in masks] if counted is None else list(counted)).to(device)
        names = batch.get("sample_indices") or range(self.samples, self.samples + len(lengths))
        repeats = torch.tensor(lengths, device=device)
        answers = [tokens[len(tokens) - n :] for tokens, n in zip(batch["unconcat_tokens"], responses, strict=True)]
        places = [torch.arange(n, device=device) for n in responses]

        def each_token(of_sample: torch.Tensor) -> torch.Tensor:
            return of_sample.to(device).repeat_interleave(repeats, output_size=sum(lengths))

        self._add(
            torch.cat(list(log_probs)),
            torch.cat(list(rollout)),
            _cut(masks, parts),
            each_token(1 / counted.double().clamp_min(1)),
            each_token(torch.tensor([int(name) for name in names])),
            _cut(places, parts),
            _cut(answers, parts),
        )
        self.samples += len(lengths)
        return True

    def _add(
        self,
        train: torch.Tensor,
        rollout: torch.Tensor,
        mask: torch.Tensor,
        weights: torch.Tensor,
        sample: torch.Tensor,
        position: torch.Tensor,
        token: torch.Tensor,
    ) -> None:
        import torch

        self._to(train.device)
        train = train.detach().double()
        rollout = rollout.detach().to(train.device).double()
        log_ratio = train - rollout
        finite = mask & log_ratio.isfinite()
        lost = mask & ~finite
        log_ratio = log_ratio.where(finite, 0.0)  # what is masked may be nan, and nan * 0 is nan
        difference = log_ratio.abs()
        k3 = (log_ratio.expm1() - log_ratio).clamp_min(0)  # rounding alone could make it negative
        weights = weights.where(finite, 0.0)
        sums = [finite.double(), lost.double(), difference, -log_ratio, k3, weights * difference, weights]
        self._sums[: len(_SUMS)] += torch.stack([each.sum() for each in sums])
        self._sums[len(_SUMS) :].scatter_add_(0, _bins(difference), finite.double())
        if len(difference):
            self._maximum = torch.maximum(self._maximum, difference.max())
        order = difference.where(finite, -1.0).masked_fill(lost, math.inf)
        self._keep_worst(torch.stack([each.double() for each in (order, sample, position, token, train, rollout)], 1))

    def _keep_worst(self, rows: torch.Tensor) -> None:
        """[n, len(_WORST)] float64; those with an order of -1 are no tokens of the loss."""
        import torch

        rows = torch.cat([self._worst, rows])
        self._worst = rows[rows[:, 0].topk(min(self._keep, len(rows))).indices]

    def _to(self, device: torch.device) -> None:
        self._sums, self._maximum, self._worst = (each.to(device) for each in (self._sums, self._maximum, self._worst))

    def merge(self, other: Discrepancy) -> None:
        """Add what the other has."""
        import torch

        self.samples += other.samples
        if self._sums.is_cpu:
            self._to(other._sums.device)
        device = self._sums.device
        self._sums = self._sums + other._sums.to(device)
        self._maximum = torch.maximum(self._maximum, other._maximum.to(device))
        self._keep_worst(other._worst.to(device))

    # -- reading ------------------------------------------------------------------------------------------------------

    def result(self) -> Result:
        """What was added up until now; waits for the device."""
        numbers: list[float] = self._sums.tolist()
        tokens, nonfinite, difference, k1, k3, weighted, weights = numbers[: len(_SUMS)]
        maximum, counts = float(self._maximum), numbers[len(_SUMS) :]

        def quantile(share: float) -> float:
            return _quantile(counts, share, maximum) if tokens else math.nan

        def mean(total: float, over: float) -> float:
            return total / over if over else math.nan

        return Result(
            tokens=int(tokens),
            nonfinite=int(nonfinite),
            nonfinite_share=mean(nonfinite, tokens + nonfinite),
            mean=mean(difference, tokens),
            sample_mean=mean(weighted, weights),
            k1=mean(k1, tokens),
            k3=mean(k3, tokens),
            p50=quantile(0.5),
            p99=quantile(0.99),
            p999=quantile(0.999),
            maximum=maximum if tokens else math.nan,
            worst=tuple(
                Token(int(sample), int(position), int(token), train, rollout)
                for order, sample, position, token, train, rollout in self._worst.tolist()
                if order >= 0
            ),
        )


def reduced(discrepancy: Discrepancy, group: Any = None) -> Discrepancy:
    """The discrepancy of all ranks with other tokens: a new one, for whose `result()` each has the same numbers.

    By default these are Megatron's data-parallel ones, with those of context parallelism; ranks of other dimensions
    have the same tokens, or none. Its worst tokens are this rank's. Call it on every rank, in `pass_ends` with no
    error. Without torch.distributed there is one rank.
    """
    import torch.distributed as dist

    whole = Discrepancy(discrepancy._keep)
    whole.merge(discrepancy)
    if dist.is_available() and dist.is_initialized():
        if group is None:
            from megatron.core import mpu

            group = mpu.get_data_parallel_group(with_context_parallel=True)
        if dist.get_backend(group) == "nccl":  # a rank that had no tokens has its zeros on the CPU
            whole._to(_cuda())
        dist.all_reduce(whole._sums, dist.ReduceOp.SUM, group)
        dist.all_reduce(whole._maximum, dist.ReduceOp.MAX, group)
    return whole


def _cuda() -> torch.device:
    import torch

    return torch.device("cuda", torch.cuda.current_device())


# -- parts -----------------------------------------------------------------------------------------------------------

_OF_A_ROLLOUT = ("rollout_mask_sums", "group_mask_sums")  # slime's denominators from v0.3.1 on, and of v0.3.0


def response_part(total: int, response: int, padded: int, size: int, rank: int) -> tuple[range, range]:
    """Which tokens of a response have their log-probabilities on a context-parallel rank: positions in the response.

    slime cuts a sample, padded to `padded` tokens (its own length, unless --qkv-format bshd), into two chunks a rank,
    first and last chunk to the first rank and so on inwards; a log-probability is where its token is predicted, one
    row earlier. With --allgather-cp attention has another layout, and slime brings the log-probabilities into this one.
    """
    if size == 1:
        return range(response), range(0)
    chunk = -(-padded // (2 * size))
    prompt = total - response
    first, second = (
        range(max(at * chunk - prompt + 1, 0), min((at + 1) * chunk - prompt + 1, response))
        for at in (rank, 2 * size - rank - 1)
    )
    return first, second


def _cut(whole: Sequence[torch.Tensor], parts: Sequence[tuple[range, range]]) -> torch.Tensor:
    import torch

    pairs = zip(whole, parts, strict=True)
    return torch.cat([sample[part.start : max(part.stop, part.start)] for sample, both in pairs for part in both])


def _check(
    responses: Sequence[int],
    lengths: Sequence[int],
    masks: Sequence[torch.Tensor],
    rollout: Sequence[torch.Tensor],
    log_probs: Sequence[torch.Tensor],
) -> None:
    found = {
        "loss_masks": ([len(each) for each in masks], list(responses)),
        "rollout_log_probs": ([len(each) for each in rollout], list(lengths)),
        "log_probs": ([len(each) for each in log_probs], list(lengths)),
    }
    if wrong := {name: pair for name, pair in found.items() if pair[0] != pair[1]}:
        raise UpstreamError(
            "this slime has other response tokens on a rank than the plugins think",
            {name: f"{there} tokens of each sample, expected {thought}" for name, (there, thought) in wrong.items()},
            "use a listed stack (docs/compatibility.md)",
        )


def _context_rank(size: int) -> int:
    if size == 1:
        return 0
    from megatron.core import mpu

    rank: int = mpu.get_context_parallel_rank()
    return rank


def _bins(difference: torch.Tensor) -> torch.Tensor:
    """[n] int64, the bin of each value: a float64's upper bits, read as an integer, count the bins."""
    import torch

    found = (difference.view(torch.int64) >> _BITS_BELOW_A_BIN) - _FIRST_BIN + 1
    return found.clamp(0, BINS - 1)


def _quantile(counts: Sequence[float], share: float, maximum: float) -> float:
    """The smallest value that `share` of all values do not exceed, as far as the histogram tells."""
    up_to = list(accumulate(counts))
    number = bisect_left(up_to, max(1, math.ceil(share * up_to[-1])))
    if number == 0:
        return 0.0
    if number == BINS - 1:
        return maximum
    octave, step = divmod(number - 1, STEPS)
    return min(math.ldexp(1 + (step + 0.5) / STEPS, OCTAVES[octave]), maximum)


# -- over steps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rise:
    """The mean difference has risen: medians of the first and of the last window, in nats."""

    step: int  # steps seen until now
    first: float
    last: float

    @property
    def ratio(self) -> float:
        return self.last / self.first if self.first else math.inf


@dataclass
class Drift:
    """An alarm for a difference that grows while training goes on.

    A sound pair of trainer and engine stays where it began; slime with SGLang was reported to go from 0.011 to 0.036 in
    30 steps where another engine stayed flat. The rule: the median of the last `window` steps is more than `factor`
    times the median of the first `window` steps after `warm_up`, and above `floor`. Medians, so that one bad rollout
    raises no alarm; the two windows share no step. A value that is not finite counts as no step: it has an alarm of its
    own (`Result.nonfinite`).

    Attributes:
        warm_up: steps to leave out at the beginning.
        floor: nats below which a difference is no matter, however it grew: of an engine that began with 0, say.
    """

    window: int = 5
    warm_up: int = 3
    factor: float = 2.0
    floor: float = 1e-4
    steps: int = field(default=0, init=False)
    _first: list[float] = field(default_factory=list, init=False, repr=False)
    _last: list[float] = field(default_factory=list, init=False, repr=False)

    def add(self, mean: float) -> Rise | None:
        """The mean difference of one more step; the rise, at every step at which the rule says so."""
        if not math.isfinite(mean):
            return None
        self.steps += 1
        if self.steps <= self.warm_up:
            return None
        if len(self._first) < self.window:
            self._first.append(mean)
            return None
        self._last = [*self._last, mean][-self.window :]
        if len(self._last) < self.window:
            return None
        rise = Rise(self.steps, statistics.median(self._first), statistics.median(self._last))
        return rise if rise.last > max(self.factor * rise.first, self.floor) else None
