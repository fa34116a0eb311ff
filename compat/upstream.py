"""Where the user's slime is, and whether it is slime."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SlimeProblem:
    """Why slime cannot be used, and what to do."""

    found: str
    next: str


def package_folder(name: str) -> Path | None:
    """The folder of a top-level package, without importing it."""
    spec = importlib.util.find_spec(name)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else None


def find_train_script(explicit: str | None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """slime's `train.py`, which is in no wheel: as given, beside an editable slime, in $SLIME_HOME, in this folder."""
    if explicit:
        script = Path(explicit).expanduser()
        return script if script.is_file() else None
    package = package_folder("slime")
    candidates = [package.parent / "train.py"] if package else []
    if home := environment.get("SLIME_HOME"):
        candidates.append(Path(home).expanduser() / "train.py")
    candidates.append(Path("train.py"))
    return next((script.resolve() for script in candidates if script.is_file()), None)


def slime_problem() -> SlimeProblem | None:
    """None when `import slime` gives THUDM's slime; PyPI's package of that name is an unrelated statistics library."""
    package = package_folder("slime")
    if package is None:
        return SlimeProblem(
            "no package named slime can be imported",
            "clone https://github.com/THUDM/slime and `pip install -e . --no-deps` there, or put it on PYTHONPATH",
        )
    if not (package / "__init__.py").is_file() and (package / "slime" / "utils" / "arguments.py").is_file():
        return SlimeProblem(f"{package} is a folder around slime, not slime", f"put {package} itself on PYTHONPATH")
    if not (package / "utils" / "arguments.py").is_file():
        return SlimeProblem(
            f"{package} is not THUDM's slime (it has no utils/arguments.py); PyPI's `slime` is another project",
            "`pip uninstall slime`, then install THUDM's from its checkout: `pip install -e . --no-deps`",
        )
    return None
