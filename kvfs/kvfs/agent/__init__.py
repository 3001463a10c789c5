"""The node agent: the arena of this machine, and the process that fills it."""
