"""Speed and quality, as scripts."""
