"""Tune the prompt of a frozen language model that you can only call forward."""
