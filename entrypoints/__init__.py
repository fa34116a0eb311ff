"""The commands, and the hooks by which worker and child processes are reached."""

if __name__ != "miles_plugins.entrypoints":
    raise ImportError(
        "import miles_plugins.entrypoints, not the checkout's folder: one file under two module names is patched twice"
    )
