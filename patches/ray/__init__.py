"""Ray: how the active plugins reach its workers."""
