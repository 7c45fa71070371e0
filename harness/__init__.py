"""Levelfield: reinforcement-learning algorithms for language models, compared at equal cost."""

__version__ = "0.1.0"
