"""Megatron-LM: routers, recomputation, and running without a GPU."""
