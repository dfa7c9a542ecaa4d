"""Small Linen models of every form in which a module may be reached, and one table of them."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jqlora.models.config import LlamaConfig
from jqlora.models.llama import LlamaForCausalLM

VOCABULARY, WIDTH, DEPTH = 17, 32, 2
IDS = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)


class Block(nn.Module):
    """An MLP with a residual; ``kind`` adds experts under ``nn.vmap``, or attention."""

    kind: str
    dtype: Any

    @nn.compact
    def __call__(self, x, _=None):
        make = functools.partial(nn.Dense, dtype=self.dtype)
        h = make(2 * WIDTH, name="up")(x)
        h = make(WIDTH, name="down", use_bias=False)(nn.gelu(h))
        if self.kind == "experts":
            experts = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                out_axes=0,
                axis_size=3,
            )
            h = h + experts(WIDTH, dtype=self.dtype, name="experts")(x).sum(0)
        if self.kind == "attention":
            attention = nn.MultiHeadDotProductAttention(2, dtype=self.dtype, name="attention")
            h = h + attention(x, x)
        return x + h, None


class Toy(nn.Module):
    """Embedding, blocks (scanned or not, remat or not) and a head: logits [B, T, V]."""

    kind: str = "mlp"
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCABULARY, WIDTH, dtype=self.dtype, name="embed")(ids)
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        if self.scan:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            scanned = nn.scan(block, length=DEPTH, **axes)
            x, _ = scanned(self.kind, self.dtype, name="layers")(x, None)
        else:
            for i in range(DEPTH):
                x, _ = block(self.kind, self.dtype, name=f"layers_{i}")(x)
        return nn.Dense(VOCABULARY, dtype=self.dtype, name="head")(x)


class Llama(nn.Module):
    """The real decoder, tiny, returning bare logits."""

    scan: bool = True
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        self.lm = llama(scan=self.scan, remat=self.remat, dtype=self.dtype)

    def __call__(self, ids):
        return self.lm(ids).logits


def llama(*, scan=True, remat=False, dtype=jnp.float32, tied=False):
    config = LlamaConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16,
            "tie_word_embeddings": tied,
        }
    )
    return LlamaForCausalLM(config, scan=scan, remat="full" if remat else "none", dtype=dtype)


FORMS = {
    "loop": Toy(),
    "scan": Toy(scan=True),
    "scan and remat": Toy(scan=True, remat=True),
    "experts": Toy("experts", scan=True),
    "attention": Toy("attention", scan=True),
    "llama": Llama(),
    "llama loop": Llama(scan=False),
}


@functools.cache
def params_of(model):
    """Random parameters; biases and norms are not at their zeros and ones."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IDS))["params"]
    generator = np.random.default_rng(1)

    def draw(leaf):
        scale = leaf.shape[-min(leaf.ndim, 2)] ** -0.5
        return jnp.asarray(generator.normal(0, scale, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)
