"""slime: the driver's arguments, the processes it starts, and its training loop."""
