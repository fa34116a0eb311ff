"""Which upstream is this, and what differs. Imports nothing of ours."""

if __name__ != "miles_plugins.compat":
    raise ImportError(
        "import miles_plugins.compat, not the checkout's folder: one file under two module names is patched twice"
    )
