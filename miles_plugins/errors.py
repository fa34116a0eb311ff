"""What can go wrong, each as one readable block: what was found, what was expected, where, and what to do."""

from __future__ import annotations

from collections.abc import Mapping


class PluginError(Exception):
    """Base of every error this package raises on purpose.

    `facts` are shown as an aligned two-column block below the message; `next` says what to do.
    """

    def __init__(self, message: str, facts: Mapping[str, object] | None = None, next: str | None = None) -> None:
        self.message = message
        self.facts = dict(facts or {})
        self.next = next
        super().__init__(message)

    def __str__(self) -> str:
        rows = [(name, str(value)) for name, value in self.facts.items() if value not in (None, "")]
        if self.next:
            rows.append(("next", self.next))
        width = max((len(name) for name, _ in rows), default=0)
        indent = "\n" + " " * (width + 4)
        return "\n".join(
            [self.message, *(f"  {name:<{width}}  {value.replace(chr(10), indent)}" for name, value in rows)]
        )

    def __reduce__(self) -> tuple[object, ...]:  # crosses Ray and multiprocessing
        return (type(self), (self.message, self.facts, self.next))


class PatchError(PluginError):
    """A patch does not fit the upstream that is installed; everything of its set was undone."""


class PluginNotFoundError(PluginError):
    """`--plugins` names something that no installed distribution provides."""


class PluginConflictError(PluginError):
    """The selected plugins cannot be used together, or a required one is missing."""


class ArgumentError(PluginError):
    """A command-line flag is unknown, or asks for something a plugin must refuse."""


class UpstreamError(PluginError):
    """slime, Megatron-LM, SGLang or Ray is missing, is an impostor, or is not a supported kind."""


class AttestationError(PluginError):
    """A process did not report, or reported another plugin set or an unverified patch."""
