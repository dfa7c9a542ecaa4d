"""Tracing for a GPU that is not there."""

from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh


def absent_gpu():
    """A context in which an H100 is traced for: models choose by it, and Pallas, from jax 0.11 on,
    asks for it when lowering."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))
