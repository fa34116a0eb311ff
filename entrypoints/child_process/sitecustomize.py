"""Activates the plugins in the child processes of an SGLang engine, which are not Ray's.

The engine actor puts this folder first on PYTHONPATH while it starts its server; a new interpreter imports
`sitecustomize` before anything else. A `sitecustomize` of the user's own, further down the path, runs first.
"""

import os
import sys


def _run_next_sitecustomize() -> None:
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.realpath(os.path.dirname(__file__))
    rest = [folder for folder in sys.path if os.path.realpath(folder or ".") != here]
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


def _is_spawned_child() -> bool:
    """Only multiprocessing's spawned children: other Python programs that SGLang starts are left alone."""
    return any("spawn_main" in argument for argument in sys.orig_argv)


try:
    _run_next_sitecustomize()
except Exception:
    import traceback

    traceback.print_exc()  # as Python itself does with an error there: it prints it and goes on
if os.environ.get("MILES_PLUGINS") and _is_spawned_child():
    try:
        from miles_plugins.activation import activate_from_environment

        activate_from_environment("sglang_child")
    except BaseException:
        # Python prints an error of sitecustomize and goes on; a half-patched server must not.
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(78)
