"""Many runs as one: the grid, what works through it, and a run as a process."""
