"""Prompts, or the model itself, tuned by gradient descent through a local model: what black-box tuning is set beside.

Nothing here is imported unless a method asks for it; everything else in the package goes forward only, but for
`bbprompt.pretrain`.
"""

__all__: list[str] = []
