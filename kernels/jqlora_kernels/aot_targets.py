"""Descriptions of GPUs that need not be there, for compiling ahead of time.

The fields are those of XLA's ``GpuTargetConfigProto``; the numbers are the vendor's, as the driver
reports them.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Target:
    """One GPU; sizes in bytes, ``shared`` is what one block of threads may ask for at most."""

    name: str
    capability: tuple[int, int]
    extension: str
    cores: int
    memory: int
    bandwidth: int
    cache: int
    clock: float
    lanes: int
    shared: int

    def text(self) -> str:
        """The description as XLA reads it (protobuf text)."""
        major, minor = self.capability
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared + 1024}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared}
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: {self.extension}
  }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  name: "{self.name}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.name}"
"""


_HOPPER = {
    "capability": (9, 0),
    "extension": "ACCELERATED_FEATURES",
    "cores": 132,
    "cache": 52428800,
    "clock": 1.98,
    "lanes": 128,
    "shared": 232448,
}
_A100 = {
    "capability": (8, 0),
    "extension": "NONE",
    "cores": 108,
    "cache": 41943040,
    "clock": 1.41,
    "lanes": 64,
    "shared": 166912,
}
_AMPERE = {"capability": (8, 6), "extension": "NONE", "lanes": 128, "shared": 101376}
_ADA = {"capability": (8, 9), "extension": "NONE", "lanes": 128, "shared": 101376}

TARGETS = {
    "h100": Target(
        name="NVIDIA H100 80GB HBM3",
        memory=84942979072,
        bandwidth=3352320000000,
        **_HOPPER,
    ),
    "h200": Target(name="NVIDIA H200", memory=151397597184, bandwidth=4800000000000, **_HOPPER),
    "a100": Target(
        name="NVIDIA A100-SXM4-80GB",
        memory=85100068864,
        bandwidth=2039040000000,
        **_A100,
    ),
    "a100-40": Target(
        name="NVIDIA A100-SXM4-40GB",
        memory=42298834944,
        bandwidth=1555200000000,
        **_A100,
    ),
    "a10": Target(
        name="NVIDIA A10",
        memory=22 * GIB,
        bandwidth=600000000000,
        cores=72,
        cache=6291456,
        clock=1.695,
        **_AMPERE,
    ),
    # JAX knows no names of consumers' GPUs: those stand as the card with their chip's capability
    "rtx3090": Target(
        name="NVIDIA A10",
        memory=int(23.6 * GIB),
        bandwidth=936000000000,
        cores=82,
        cache=6291456,
        clock=1.695,
        **_AMPERE,
    ),
    "l4": Target(
        name="NVIDIA L4",
        memory=22 * GIB,
        bandwidth=300000000000,
        cores=58,
        cache=50331648,
        clock=2.04,
        **_ADA,
    ),
    "l40": Target(
        name="NVIDIA L40",
        memory=int(44.4 * GIB),
        bandwidth=864000000000,
        cores=142,
        cache=100663296,
        clock=2.49,
        **_ADA,
    ),
    "rtx4090": Target(
        name="NVIDIA L40",
        memory=int(23.6 * GIB),
        bandwidth=1008000000000,
        cores=128,
        cache=75497472,
        clock=2.52,
        **_ADA,
    ),
}
"""By the names that commands take. Round numbers of memory are what drivers leave of the nominal
size, rounded down."""
