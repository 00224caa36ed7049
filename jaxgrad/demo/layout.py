"""Which devices hold what of the training run: words over ``data``, the model over ``model``."""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, NamedSharding, P
from jax.sharding import AxisType

import jaxgrad
from jaxgrad.demo.model import Params, Rules
from jaxgrad.demo.options import Options
from jaxgrad.parallel import sharded
from jaxgrad.terminal import InvalidInput

AXES = ("data", "model")
SPECS = {
    "embedding": P("model"),
    "qkv": P(None, None, "model"),
    "out": P("model"),
    "mlp_in": P(None, "model"),
    "mlp_out": P("model"),
}


def sizes(mesh: str) -> dict[str, int]:
    """The axes of ``data=2,model=4``, 1 for one that is not named.

    Raises:
      ValueError: It does not read like that.
    """
    given = dict(part.split("=") for part in mesh.split(","))
    if not set(given) <= set(AXES) or any(int(n) < 1 for n in given.values()):
        raise ValueError(mesh)
    return {axis: int(given.get(axis, 1)) for axis in AXES}


def start(options: Options) -> None:
    """Asks JAX for the devices of the mesh, on a CPU, and joins the other processes.

    To be called before JAX has started a device.
    """
    if options.mesh is None:
        return
    devices = math.prod(sizes(options.mesh).values())
    jax.config.update("jax_num_cpu_devices", max(1, devices // options.processes))
    if options.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(options.coordinator, options.processes, options.process)


class Layout:
    """A mesh, or one device."""

    def __init__(self, options: Options) -> None:
        """The mesh of ``options``, over the devices that there are."""
        self.mesh = None
        if options.mesh is None:
            return
        named = sizes(options.mesh)
        if (need := math.prod(named.values())) > jax.device_count():
            raise InvalidInput(
                f"--mesh {options.mesh}: need {need} devices, got {jax.device_count()}"
            )
        if options.batch % named["data"]:
            raise InvalidInput(
                f"--mesh {options.mesh}: data must divide the batch, got a batch of {options.batch}"
            )
        kinds = (AxisType.Auto,) * len(AXES)
        devices = jax.devices()[:need]
        self.mesh = jax.make_mesh(tuple(named.values()), AXES, kinds, devices=devices)

    def params(self, params: Params) -> Params:
        """Parameters where they belong; one that an axis does not divide is on every device."""
        if self.mesh is None:
            return params
        return {name: self._placed(z, SPECS.get(name, P())) for name, z in params.items()}

    def state(self, state: Any) -> Any:
        """The optimiser's state: what is not like a parameter is on every device."""
        if self.mesh is None:
            return state
        return jax.tree.map(lambda z: z if z.ndim else self._placed(z, P()), state)

    def windows(self, windows: np.ndarray) -> Any:
        """A batch of training windows."""
        return windows if self.mesh is None else self._placed(windows, P("data"))

    def rules(self, rules: Rules) -> Rules:
        """The rules, with a fused head told how its tokens and classes are cut."""
        fused = jaxgrad.linear_softmax_cross_entropy
        if self.mesh is None or getattr(rules.loss, "func", None) is not fused:
            return rules
        head = sharded(fused, self.mesh, batch_axes="data", vocab_axis_name="model")
        shards, options = self.mesh.shape["model"], cast(functools.partial, rules.loss).keywords

        def loss(hidden: Array, embedding: Array, labels: Array) -> Array:
            classes, padding = len(embedding), -len(embedding) % shards
            embedding = jnp.pad(embedding, ((0, padding), (0, 0)))
            where = jnp.arange(classes + padding) < classes
            return head(hidden, embedding, labels, where=where, **options)

        return rules._replace(loss=loss)

    def shardings(self, tree: Any) -> Any:
        """Where the arrays of ``tree`` are, as ``jax.jit`` takes it."""
        return None if self.mesh is None else jax.tree.map(lambda z: z.sharding, tree)

    def _placed(self, z, spec):
        assert self.mesh is not None
        axes = zip(z.shape, spec, strict=False)
        fits = all(name is None or n % self.mesh.shape[name] == 0 for n, name in axes)
        return jax.device_put(np.asarray(z), NamedSharding(self.mesh, spec if fits else P()))
