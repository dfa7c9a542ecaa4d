"""A small bidirectional encoder with a classifier, once in Linen and once in torch."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

VOCABULARY, WIDTH, DEPTH, HEADS, LENGTH, CLASSES = 32, 24, 2, 4, 7, 3
TARGETS = ["query", "key", "value", "output", "up", "down"]


class Layer(nn.Module):
    """Attention and MLP, each followed by a residual and a norm, as in BERT."""

    @nn.compact
    def __call__(self, x):
        def heads(name):
            y = nn.Dense(WIDTH, name=name)(x)
            return y.reshape(*x.shape[:2], HEADS, -1)

        mixed = jax.nn.dot_product_attention(heads("query"), heads("key"), heads("value"))
        y = nn.Dense(WIDTH, name="output")(mixed.reshape(x.shape))
        x = nn.LayerNorm(epsilon=1e-12, name="attention_norm")(x + y)
        y = nn.Dense(WIDTH, name="down")(
            nn.gelu(nn.Dense(2 * WIDTH, name="up")(x), approximate=False)
        )
        return nn.LayerNorm(epsilon=1e-12, name="mlp_norm")(x + y)


class Encoder(nn.Module):
    """Class logits [B, C] of token ids [B, T]."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(ids)
        for i in range(DEPTH):
            x = Layer(name=f"layers_{i}")(x)
        return nn.Dense(CLASSES, name="head")(x.mean(1))


class TorchLayer(torch.nn.Module):
    """The same layer in torch."""

    def __init__(self):
        super().__init__()
        for name in ("query", "key", "value", "output"):
            setattr(self, name, torch.nn.Linear(WIDTH, WIDTH))
        self.up, self.down = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(2 * WIDTH, WIDTH)
        self.attention_norm = torch.nn.LayerNorm(WIDTH, eps=1e-12)
        self.mlp_norm = torch.nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x):
        q, k, v = (
            part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = self.attention_norm(x + self.output(mixed.transpose(1, 2).flatten(-2)))
        return self.mlp_norm(x + self.down(torch.nn.functional.gelu(self.up(x))))


class TorchEncoder(torch.nn.Module):
    """The same encoder in torch, returning its loss as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.layers = torch.nn.ModuleList(TorchLayer() for _ in range(DEPTH))
        self.head = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, ids, labels):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        loss = torch.nn.functional.cross_entropy(self.head(x.mean(1)), labels)
        return SimpleNamespace(loss=loss)


def linen_params(model):
    """The torch encoder's weights as parameters of :class:`Encoder`."""
    params = {}
    for name, value in model.state_dict().items():
        *parts, end = name.split(".")
        if parts[0] == "layers":
            parts = [f"layers_{parts[1]}", *parts[2:]]
        array = value.numpy()
        if parts[-1] == "embed":
            end = "embedding"
        elif end == "weight":
            end, array = ("kernel", array.T) if array.ndim == 2 else ("scale", array)
        node = params
        for part in parts:
            node = node.setdefault(part, {})
        node[end] = jnp.asarray(np.array(array), jnp.float32)
    return params
