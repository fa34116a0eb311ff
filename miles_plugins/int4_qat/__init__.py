"""INT4 weights (W4A16): what the trainer computes with is what the engine runs, bit for bit."""
