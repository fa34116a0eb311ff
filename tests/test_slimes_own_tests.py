"""slime's own CPU unit tests give the same results with the plugin layer active as without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# The files that slime's CI runs without a GPU (its workflow pr-test.yml at v0.3.1, job cpu-unittest).
FILES = """
test_megatron_argument_validation test_deep_ep_tms_patch test_stateless_adam utils/test_megatron_server_arguments
test_dp_schedule test_cp_utils test_metric_report test_metric_report_dist test_loss_cp_invariance
test_logprob_response_spans test_value_temperature test_cispo_loss test_ppo_logprob_entropy test_rm_f1 test_rm_gpqa
test_rm_math test_rm_math_dapo test_rm_deepscaler test_sample test_rollout_validation test_rollout_sample_hooks
test_hf_to_megatron test_qwen3_5_vl_native test_reloadable_process_group_world test_placement_group
test_external_sglang_engines test_empty_colocated_weight_bucket utils/test_hf_checkpoint_saver
plugin_contracts/test_plugin_rollout_contracts plugin_contracts/test_plugin_runtime_hook_contracts
plugin_contracts/test_plugin_path_loading_contracts plugin_contracts/test_plugin_generate_contracts
""".split()
ACTIVATE = "from miles_plugins.activation import activate\nactivate(['r3', 'metrics'], 'driver', environment={})\n"


def results(output: str) -> dict[str, str]:
    """Each test's outcome, from pytest -rA."""
    return {name: outcome for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) (\S+)", output, re.M)}


@pytest.mark.upstream
@pytest.mark.parametrize("file", FILES)
def test_same_results_with_the_layer_active(file: str, slime: Path, upstream_path: str, tmp_path: Path) -> None:
    (tmp_path / "layer_active.py").write_text(ACTIVATE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), upstream_path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", f"tests/{file}.py"]

    def run(*extra: str) -> tuple[int, str]:
        done = subprocess.run(
            [*command, *extra], cwd=slime, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return done.returncode, done.stdout

    code, active = run("-p", "layer_active")
    assert results(active), active[-3000:]
    if code != 0:  # perhaps without the layer too
        assert results(active) == results(run()[1]), active[-3000:]
