"""The oracle as a service: a frozen model and its prompts behind HTTP. Needs the extra `serve`."""
