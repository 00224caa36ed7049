"""A small language model trained on real text, with jaxgrad's rules and beside it with plain JAX's.

``rules.py`` is what a model has to change to use the library; ``model.py`` is the model.
"""
