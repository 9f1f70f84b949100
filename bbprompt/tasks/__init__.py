"""Tasks, their examples, and where the data come from."""
