"""What runs first in every Ray worker of the job (Ray calls it by name, before an actor's module is imported)."""

from __future__ import annotations

import os
import socket

from miles_plugins.activation import ROLE, USER_SETUP_HOOK, activate_from_environment, current


def setup() -> None:
    """Activate the driver's plugins, then run the setup hook that the user had.

    An error ends the worker with its text, which Ray reports to the driver: nothing runs half-patched.
    """
    activate_from_environment(os.environ.get(ROLE, "worker"))
    if user_hook := os.environ.get(USER_SETUP_HOOK):
        from ray._private.runtime_env.setup_hook import load_and_execute_setup_hook

        if error := load_and_execute_setup_hook(user_hook):
            raise RuntimeError(f"on {socket.gethostname()}: {error}")


class Witness:
    """A small actor that the driver starts on every node before anything else."""

    def digest(self) -> str:
        """The digest of the plugin set that is active there."""
        return current().plugins.digest
