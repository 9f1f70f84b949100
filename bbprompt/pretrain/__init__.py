"""Pre-training of prompts, the only part that goes backward through a model."""
