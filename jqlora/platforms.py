"""For which kind of device a program is being traced."""

import jax


def traced_platform() -> str:
    """ "cpu", "gpu" or another: of the device that an abstract mesh names, which may be absent, or
    this process's."""
    named = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if named is None else named.platform
