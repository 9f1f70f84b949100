"""Where a frozen model lives: the local torch backend and, later, remote ones."""
