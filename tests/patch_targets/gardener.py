"""A plugin's module: importable wherever upstream is."""

from miles_plugins.patching import Patch, PatchSet


def mark(original, *args, **kwargs):
    return ["marked", *original(*args, **kwargs)]


async def mark_async(original, *args):
    return ["marked", *await original(*args)]


def arm(*targets):
    patch_set = PatchSet(*(Patch(id=target, target=target, wrap=mark, reason="test") for target in targets))
    patch_set.arm()
    return patch_set


def cut_in_child():
    """What a process that activates itself first sees."""
    arm("orchard.tools:cut")
    from orchard.early import use

    return use()
