"""From the command line to the routers, on every release of slime that is supported: its own code, our patches.

Each release runs in a process of its own (tests/older_slime.py), on the Megatron-LM and the SGLang that it is pinned
to, as far as their files go: nothing of them is compiled. The tests only read what it reports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.older_slime import BEHAVIOURS
from tests.wheels import unpacked_commit, unpacked_wheel

pytestmark = pytest.mark.upstream

ROOT = Path(__file__).resolve().parents[1]
OLD = "3714d81d418c9f1bca4594fc35f9e8289f652862"
NEW = "1dcf0dafa884ad52ffb243625717a3471643e087"
MAIN = "624b824a898ab0ec1fcb4d373004c7f3852bf515"  # slime's main of 2026-07

# slime -> its Megatron-LM, its SGLang. v0.2.2's own SGLang is a nightly that is on no index.
RELEASES = {
    "v0.2.2": (OLD, "0.5.9"),
    "v0.2.3": (OLD, "0.5.9"),
    "v0.2.4": (OLD, "0.5.9"),
    "v0.3.0": (NEW, "0.5.12.post1"),
    "v0.3.1": (NEW, "0.5.15.post1"),
    MAIN: (NEW, "0.5.15.post1"),
}


@pytest.fixture(scope="module", params=list(RELEASES), ids=lambda release: "main" if release == MAIN else release)
def reported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Behaviour -> what is wrong with it on one release."""
    pytest.importorskip("ray")
    pytest.importorskip("transformers")
    pinned, sglang = RELEASES[request.param]
    slime = unpacked_commit(("SLIME_HOME", "~/slime", request.param), "slime")
    megatron = unpacked_commit(("MEGATRON_HOME", "~/Megatron-LM", pinned), "megatron")
    path = [slime, megatron, unpacked_wheel("sglang", sglang), ROOT]
    folder = tmp_path_factory.mktemp("release")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MILES_PLUGINS", "RAY_"))}
    environment = {
        **variables,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # otherwise Ray turns 127.0.0.1 into the machine's own address
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "GLOO_SOCKET_IFNAME": "lo",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "SLIME_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ENABLE_ROUTING_REPLAY": "0",
        "TQDM_DISABLE": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    script = str(ROOT / "tests" / "older_slime.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, str(folder), str(slime), str(megatron)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("behaviour", list(BEHAVIOURS))
def test_a_release(reported: dict[str, Any], behaviour: str) -> None:
    assert not reported["behaviours"][behaviour], reported["behaviours"][behaviour]
