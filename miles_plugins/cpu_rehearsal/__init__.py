"""Run the whole real stack on a machine without a GPU, on a tiny model."""
