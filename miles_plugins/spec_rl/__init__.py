"""Speculative RL: the rollout's draft is trained with the policy, and does not disturb it."""
