"""FP8 on both sides: the trainer computes with the values that the engine receives, and they are the same bits."""
