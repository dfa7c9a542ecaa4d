"""Which processor this machine has."""

import hashlib
import platform
from pathlib import Path

HALF = ("amx_bf16", "avx512_bf16", "bf16")
"""Instructions for products of bf16, as Linux names them; what has none computes those in fp32."""


def name() -> str:
    """As the system calls it, with its instructions for bf16: ``AMD EPYC, avx512_bf16``."""
    said = dict(line.split(":", 1) for line in _lines() if ":" in line)
    said = {key.strip(): value.strip() for key, value in said.items()}
    features = said.get("flags", said.get("Features", "")).split()
    model = said.get("model name", platform.processor() or platform.machine())
    return ", ".join([model, *(feature for feature in HALF if feature in features)])


def fingerprint() -> str:
    """Tells processors apart: what was compiled for one may be illegal on another."""
    lines = _lines() or [platform.processor()]
    features = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return hashlib.sha256("\n".join(sorted(features or lines)).encode()).hexdigest()[:16]


def _lines() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []
