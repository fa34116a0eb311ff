"""torch: what upstream takes for granted of CUDA."""
