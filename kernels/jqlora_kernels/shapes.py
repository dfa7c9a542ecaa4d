"""The shapes that tests, tuning and benchmarks share: (rows of x, K inputs, N outputs).

Real layers, from their models' configurations, and small ones that end in the middle of every tile.
"""

MODEL_LAYERS = {
    "smollm2-135m q/o": (576, 576),
    "smollm2-135m k/v": (576, 192),
    "smollm2-135m up": (576, 1536),
    "smollm2-135m down": (1536, 576),
    "qwen2-0.5b k/v": (896, 128),
    "qwen2-0.5b up": (896, 4864),
    "llama3.2-1b q/o": (2048, 2048),
    "llama3.2-1b k/v": (2048, 512),
    "llama3.2-1b up": (2048, 8192),
    "llama3.2-1b down": (8192, 2048),
    "llama-7b up": (4096, 11008),
    "llama-7b down": (11008, 4096),
    "llama3-8b q/o": (4096, 4096),
    "llama3-8b k/v": (4096, 1024),
    "llama3-8b up": (4096, 14336),
    "llama3-8b down": (14336, 4096),
    "llama-13b q/o": (5120, 5120),
    "llama-13b up": (5120, 13824),
    "llama-13b down": (13824, 5120),
    "llama-65b q/o": (8192, 8192),
    "llama-65b up": (8192, 22016),
    "llama-65b down": (22016, 8192),
    "llama3-70b k/v": (8192, 1024),
    "llama3-70b up": (8192, 28672),
    "llama3-70b down": (28672, 8192),
}
"""(K, N) of the dense layers; those that two models share stand once."""

ROWS = tuple(2**i for i in range(15))
"""Rows of ``x``: one token decoded, a few sequences decoded, training batches."""

RAGGED = ((1, 64, 1), (3, 128, 80), (65, 64, 66), (16, 192, 100), (70, 256, 130))
"""No multiple of the tiles in rows or outputs; K a multiple of the default block."""

FLAT = ((5, 100, 12), (3, 65, 33), (2, 7, 5))
"""K no multiple of any block: blocks run on from row to row, the last one cut short."""
