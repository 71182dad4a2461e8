"""One device for each core of a CPU, so that a batch is split over them.

XLA runs most of a program on one thread of a device: matrix products and convolutions take all cores, the rest, such as
normalisation, pooling and their gradients, takes one. As many devices as cores put all of them to work.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from jtl import sharding

ONE_THREAD = {"xla_cpu_multi_thread_eigen": False}  # of a device that has one core: threads would only wait


def over_cores(devices: int) -> Mesh | None:
    """A mesh of ``devices`` CPU devices; of the accelerators on another backend; None for a single device.

    Raises:
        RuntimeError: JAX has started already with fewer.
    """
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:
        if jax.device_count() < devices:
            raise RuntimeError(
                f"JAX has started with {jax.device_count()} devices, --devices {devices} needs a process of its own"
            ) from error
    found = jax.devices()[:devices]
    return sharding.make_mesh(found) if len(found) > 1 else None
