"""``nn.Dense`` and ``nn.Embed``, whose products in 16 bits are fast on a CPU too."""

from typing import Any

import flax.linen as nn
import jax

from jqlora import products


class Dense(nn.Dense):
    """The linear layer; its fields are those of ``nn.Dense``."""

    dot_general: Any = products.dot_general


class Embed(nn.Embed):
    """The table of embeddings, and of a tied head; its fields are those of ``nn.Embed``."""

    def attend(self, query: jax.Array) -> jax.Array:
        """``query`` [..., D] against every row: [..., V] in the module's dtype."""
        x, table = self.promote_dtype(query, self.embedding, dtype=self.dtype)
        assert x is not None
        assert table is not None
        return products.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())))
