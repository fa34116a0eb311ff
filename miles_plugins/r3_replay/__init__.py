"""Rollout Routing Replay (R3): train on the experts that the rollout used.

Ma et al., "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers", arXiv:2510.11370.
"""
