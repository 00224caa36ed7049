"""How exact the kernels are, and what they cost, beside those of jax.nn and optax."""
