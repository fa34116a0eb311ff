"""Write what slime logs to a file of JSON lines."""
