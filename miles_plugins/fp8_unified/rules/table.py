"""Decisions, rules and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from miles_plugins.fp8_unified.rules.run import Facts

Verdict = Literal["deny", "warn", "allow"]
VERDICTS: tuple[Verdict, ...] = ("deny", "warn", "allow")  # in the order in which they are shown
NOT_MEASURED = "not measured"
REFUSED = "the run fails by itself, later"
GARBAGE = "wrong weights, without an error"
CONVERT_TO_POWERS = "convert the BF16 checkpoint with `miles-plugins convert-fp8 --scale power-of-two`"


@dataclass(frozen=True)
class Decision:
    """What one rule says of a run.

    Attributes:
        rule: its id, such as `fp8.scale-kind`.
        found, expected: both sides, with names and numbers; one line each.
        cost: what it costs to go on, in percent rms or in words; empty where nothing is lost.
        next: what to do, beginning with a verb; empty only when allowed.
    """

    rule: str
    verdict: Verdict
    found: str
    expected: str
    cost: str = ""
    next: str = ""

    @property
    def consequence(self) -> str:
        """What it costs, as a sentence; empty where nothing is lost."""
        if not self.cost:
            return ""
        if self.cost.startswith(NOT_MEASURED):
            return f"What it costs was {self.cost}."
        return f"It costs {self.cost}." if self.cost[0].isdigit() else f"The consequence: {self.cost}."

    @property
    def advice(self) -> str:
        """What to do, as a sentence: a flag at its end stays as it is typed."""
        end = "" if self.next.endswith(("'", ".")) else "."
        return self.next and f"{self.next[0].upper()}{self.next[1:]}{end}"

    @property
    def sentence(self) -> str:
        """All that it says, in a line; the rule's id goes before."""
        parts = (f"{self.found}; expected {self.expected}.", self.consequence, self.advice)
        return " ".join(part for part in parts if part)

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"the verdict of {self.rule} is {self.verdict!r}; known: {', '.join(VERDICTS)}")
        if not (self.rule and self.found and self.expected):
            raise ValueError(f"a decision of rule {self.rule!r} does not say what was found and expected")
        if self.verdict != "allow" and not (self.next and self.cost):
            raise ValueError(f"rule {self.rule!r} does not say what it costs and what to do: give `cost` and `next`")


class Answer(NamedTuple):
    """A decision, before the table adds whose it is; `cost` None: the rule's own."""

    verdict: Verdict
    found: str
    expected: str
    next: str = ""
    cost: str | None = None


Judgement = Callable[[Facts], Iterable[Answer]]


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        id: its name, in messages and documents.
        reason: why there is such a rule, in a line.
        cost: of breaking it.
        judgement: Facts -> its answers; none where it does not apply.
    """

    id: str
    reason: str
    cost: str
    judgement: Judgement

    def decide(self, facts: Facts) -> Iterator[Decision]:
        for answer in self.judgement(facts):
            cost = self.cost if answer.cost is None else answer.cost
            cost = "" if answer.verdict == "allow" and answer.cost is None else cost
            yield Decision(self.id, answer.verdict, answer.found, answer.expected, cost, answer.next)


RULES: list[Rule] = []
"""The table, in the order of a run: how it trains, what it serves, how weights get there, how it is measured."""


def rule(id: str, reason: str, cost: str) -> Callable[[Judgement], Judgement]:
    """Add the decorated function to the table."""

    def add(judgement: Judgement) -> Judgement:
        RULES.append(Rule(id, reason, cost, judgement))
        return judgement

    return add


def judge(facts: Facts) -> list[Decision]:
    """What every rule says that applies: denials first, then warnings."""
    found = [decision for each in RULES for decision in each.decide(facts)]
    return sorted(found, key=lambda decision: VERDICTS.index(decision.verdict))


def deny(found: str, expected: str, next: str, cost: str | None = None) -> Answer:
    return Answer("deny", found, expected, next, cost)


def warn(found: str, expected: str, next: str, cost: str | None = None) -> Answer:
    return Answer("warn", found, expected, next, cost)


def allow(found: str, expected: str, cost: str | None = None) -> Answer:
    return Answer("allow", found, expected, cost=cost)
