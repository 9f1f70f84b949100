"""How an example is written out for a model."""
