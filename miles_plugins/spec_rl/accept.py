"""How much of what a draft proposes is accepted: counts, means over a rollout and by weight version, what it saves.

SGLang counts for each request and tells in `meta_info`. Until 0.5.9 the counts are called otherwise than from 0.5.12
on; a request that was never verified (one token, or aborted in its prefill) has none. A partial rollout has one
response for each part, and what counts is their sum: all means here are ratios of sums, so a long response weighs more
than a short one.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Since SGLang 0.5.12, its aliases until 0.5.15, and the names until 0.5.9: the first one that is there counts.
ACCEPTED = ("spec_num_correct_drafts", "spec_accepted_drafts", "spec_accept_token_num")
PROPOSED = ("spec_num_proposed_drafts", "spec_proposed_drafts", "spec_draft_token_num")
VERIFIED = ("spec_verify_ct",)
TOKENS = ("completion_tokens",)
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Counts:
    """Of one response, or of any number of them.

    Attributes:
        accepted: Proposed tokens that the target accepted.
        proposed: Tokens that the draft proposed.
        verified: Verification passes of the target.
        tokens: Tokens of responses that were verified at all.
    """

    accepted: int = 0
    proposed: int = 0
    verified: int = 0
    tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def rate(self) -> float | None:
        """Accepted of proposed tokens; None where nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def length(self) -> float | None:
        """Tokens a verification pass, as SGLang and slime count them; None where there was none.

        The target's own token is in it, and so is the first one of a response, which no pass verified: a response of
        n tokens has 1 / n too much. Without any accepted token it is 1.
        """
        return self.tokens / self.verified if self.verified else None


def total(counts: Iterable[Counts]) -> Counts:
    return sum(counts, Counts())


def read(meta_info: Mapping[str, Any]) -> Counts:
    """The counts of one response, by the names of any SGLang; nothing where it tells nothing."""

    def of(names: Sequence[str]) -> int:
        return next((int(meta_info[name]) for name in names if meta_info.get(name) is not None), 0)

    verified = of(VERIFIED)
    return Counts(of(ACCEPTED), of(PROPOSED), verified, of(TOKENS)) if verified > 0 else Counts()


def slimes(meta_info: Mapping[str, Any]) -> dict[str, int]:
    """The same under the names by which slime's `Sample.SpecInfo` counts.

    Tokens of responses that were never verified are left out: slime would divide them by the passes of others.
    """
    counts = read(meta_info)
    return {
        "spec_accept_token_num": counts.accepted,
        "spec_draft_token_num": counts.proposed,
        "spec_verify_ct": counts.verified,
        "completion_tokens": counts.tokens,
    }


class Tally:
    """The counts of each sample by the weights that made them; forgotten with the sample."""

    def __init__(self) -> None:
        self._samples: dict[int, tuple[weakref.ref[Any], dict[str, Counts]]] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, sample: Any, meta_info: Mapping[str, Any]) -> None:
        """One response, or a part of one."""
        counts, version = read(meta_info), str(meta_info.get("weight_version") or UNKNOWN)
        if not counts.verified:
            return
        key = id(sample)
        if key not in self._samples:  # a slime sample cannot be hashed; its id may be another's once it is gone
            self._samples[key] = (weakref.ref(sample, lambda _: self._samples.pop(key, None)), {})
        versions = self._samples[key][1]
        versions[version] = versions.get(version, Counts()) + counts

    def by_version(self, samples: Iterable[Any]) -> dict[str, Counts]:
        """Of these samples. One that was copied, or loaded from a dump, has what slime has counted of it."""
        found: dict[str, Counts] = {}
        for sample in samples:
            _, versions = self._samples.get(id(sample), (None, None))
            for version, counts in (versions or _by_slime(sample)).items():
                found[version] = found.get(version, Counts()) + counts
        return found


def _by_slime(sample: Any) -> dict[str, Counts]:
    info = getattr(sample, "spec_info", None)
    names = ("spec_accept_token_num", "spec_draft_token_num", "spec_verify_ct", "completion_token_num")
    counts = Counts(*(int(getattr(info, name, 0)) for name in names))
    versions = set(map(str, getattr(sample, "weight_versions", None) or []))
    return {versions.pop() if len(versions) == 1 else UNKNOWN: counts} if counts.verified else {}


# -- metrics ---------------------------------------------------------------------------------------------------------


def metrics(by_version: Mapping[str, Counts], draft_cost: float | None = None) -> dict[str, float]:
    """What a rollout logs. `lag_n` is of the weights that are n updates older than the newest in this rollout.

    `draft_cost` is as in `speed_up`.
    """
    every = total(by_version.values())
    if every.length is None:
        return {}
    found = {"spec/accept_length": every.length, "spec/verified": float(every.verified)}
    if every.rate is not None:
        found["spec/accept_rate"] = every.rate
    if draft_cost is not None:
        found["spec/estimated_speed_up"] = speed_up(every.length, draft_cost)
    numbered = {int(version): counts for version, counts in by_version.items() if version.isdecimal()}
    if len(numbered) > 1:
        newest = max(numbered)
        for version, counts in sorted(numbered.items(), reverse=True):
            assert counts.length is not None
            found[f"spec/accept_length/lag_{newest - version}"] = counts.length
    return found


def slimes_metrics(samples: Sequence[Any]) -> dict[str, float]:
    """slime's own two numbers, means over samples, which v0.2.2 to v0.2.4 compute and do not log."""
    infos = [sample.spec_info for sample in samples]
    if not any(info.spec_verify_ct for info in infos):
        return {}
    return {
        name: sum(getattr(info, name) for info in infos) / len(infos)
        for name in ("spec_accept_rate", "spec_accept_length")
    }


def relative_draft_cost(num_steps: int, layers: int, draft_layers: int = 1) -> float:
    """What the draft costs a verification pass, as a share of one decoding step of the target.

    `num_steps` forward passes of `draft_layers` of the target's `layers`, each layer as dear as the target's.
    """
    return num_steps * draft_layers / layers


def speed_up(accept_length: float, draft_cost: float) -> float:
    """How many times as fast as plain decoding: accept length / (1 + relative draft cost). An estimate.

    It takes a verification pass to cost what a plain decoding step does, which holds while decoding is bound by memory:
    at large batches it is not, and speculation can be slower than none. Left out are the draft's output head (with one
    layer and a large vocabulary most of its cost), its pass over the accepted tokens, sampling and tree building,
    SGLang's smaller default batch (max_running_requests of 48), and the long tail of a rollout, where batches are small
    and the saving is largest. Compare it between steps, not with a stopwatch.
    """
    return accept_length / (1 + draft_cost)


class Decay:
    """Tells when acceptance falls: what drafts save, not what the target does by itself, is compared.

    `accept length - 1` is averaged over the last `window` rollouts. A warning is due when that is below `share` of the
    highest such average before, and again only after it has recovered, or has fallen by `share` once more.
    """

    def __init__(self, window: int = 5, share: float = 0.8) -> None:
        self._last: deque[float] = deque(maxlen=window)
        self._share = share
        self._best = 0.0
        self._warned_at: float | None = None

    def add(self, accept_length: float) -> str | None:
        """One rollout's; the warning, if one is due."""
        self._last.append(accept_length - 1)
        if len(self._last) < (self._last.maxlen or 0):
            return None
        now = sum(self._last) / len(self._last)
        self._best = max(self._best, now)
        if now >= self._share * self._best:
            self._warned_at = None
            return None
        if self._warned_at is not None and now >= self._share * self._warned_at:
            return None
        self._warned_at = now
        return (
            f"the accept length has fallen to {now + 1:.2f} (mean of {len(self._last)} rollouts) from "
            f"{self._best + 1:.2f}: the policy moves away from its draft"
        )
