"""Whether trainer, environment, checkpoint and engine agree on FP8: a table of rules over facts, without upstream.

`judge(facts)` asks every rule of RULES. Each answers nothing where it does not apply, and else `deny`, `warn` or
`allow`; a denial or a warning says what was found, what was expected, what it costs, and what to do.

Costs are differences of dequantised values in percent rms, found by exact emulation of e4m3 and bfloat16 on Gaussian
weights (sigma 0.02) without a GPU. To compare: FP8 itself is 2.65 % away from bfloat16.
"""

from __future__ import annotations

# isort: off
# The rules are in the table in this order, which is that of a run.
from miles_plugins.fp8_unified.rules import training, serving, updates, measuring  # noqa: F401
# isort: on

from miles_plugins.fp8_unified.rules.layouts import (
    engine_matrices,
    moe_runner,
    needs_post_process,
    rollout_scales,
    trainer_matrices,
    ue8m0_parts,
)
from miles_plugins.fp8_unified.rules.run import (
    BLOCK,
    DEEPGEMM_DISPATCHERS,
    VARIABLE,
    Checkpoint,
    Engine,
    Facts,
    Method,
    Mode,
    Model,
    Recipe,
    Scales,
    Trainer,
    Upstream,
)
from miles_plugins.fp8_unified.rules.table import RULES, VERDICTS, Answer, Decision, Rule, deny, judge

__all__ = [
    "BLOCK",
    "DEEPGEMM_DISPATCHERS",
    "RULES",
    "VARIABLE",
    "VERDICTS",
    "Answer",
    "Checkpoint",
    "Decision",
    "Engine",
    "Facts",
    "Method",
    "Mode",
    "Model",
    "Recipe",
    "Rule",
    "Scales",
    "Trainer",
    "Upstream",
    "deny",
    "engine_matrices",
    "judge",
    "moe_runner",
    "needs_post_process",
    "rollout_scales",
    "trainer_matrices",
    "ue8m0_parts",
]
