"""What a check of `miles-plugins doctor` found."""

from __future__ import annotations

from dataclasses import dataclass

STATUSES = ("problem", "note", "ok")  # in the order in which they are shown


@dataclass(frozen=True)
class Finding:
    """One thing that a check looked at.

    Attributes:
        check: What was looked at, in a word or two.
        status: `ok`; `note`, good to know, a run is still possible; `problem`, a run would fail or be wrong.
        found: What is there, with versions, paths and numbers; one line.
        next: What to do, in plain words; empty when ok, and never empty for a problem.
    """

    check: str
    status: str
    found: str
    next: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"the status of finding {self.check!r} is {self.status!r}; known: {', '.join(STATUSES)}")
        if self.status == "problem" and not self.next:
            raise ValueError(f"finding {self.check!r} is a problem and does not say what to do: give `next`")
        if self.status == "ok" and self.next:
            raise ValueError(f"finding {self.check!r} is ok and says what to do: {self.next!r}")
