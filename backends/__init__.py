"""Where a frozen model lives: here in torch, on a Ray cluster, or behind a server."""
