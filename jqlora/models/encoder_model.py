"""An encoder with the head of its task: BERT, RoBERTa, XLM-RoBERTa, DeBERTa v2 and v3."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqlora.errors import CheckpointError
from jqlora.models.attention import Attention, implementation
from jqlora.models.bert import BertModel
from jqlora.models.deberta import DebertaModel
from jqlora.models.encoder_config import EncoderConfig
from jqlora.models.heads import HEADS
from jqlora.models.outputs import EncoderOutput, QuestionAnsweringOutput
from jqlora.models.stack import Remat, check_options


class EncoderForTask(nn.Module):
    """Parameters are ``param_dtype``, computation is ``dtype``.

    ``scan`` stacks the layers' parameters on a lead axis [L] under ``layer``; without it they live
    under ``layer_0``, ``layer_1``, ... . ``remat`` "full" keeps only each layer's input for the
    backward pass, "offload" in pinned host memory, "dots" the projections' outputs too.
    ``attention`` is as for :class:`~jqlora.models.causal.CausalLM`; DeBERTa's has a bias on its
    scores and is XLA's alone. There is no dropout but the adapters'.
    """

    config: EncoderConfig
    task: str
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan: bool = True
    remat: Remat = "none"
    attention: Attention = "auto"

    def setup(self) -> None:
        config, base_name = self.config, self.config.kind.base
        check_options(self.remat, self.attention)
        types = (("dtype", self.dtype), ("param_dtype", self.param_dtype))
        if config.disentangled is not None:
            implementation(self.attention, self.dtype, config.head_dim, biased=True)
            base: Any = DebertaModel(config, types, self.scan, self.remat)
        else:
            pooled = base_name == "bert" and self.task == "sequence-classification"
            base = BertModel(config, types, self.scan, self.remat, self.attention, pooled)
        head = HEADS[base_name][self.task](config, types)
        for name, module in {base_name: base, **head}.items():
            setattr(self, name, module)
        self.head_names = tuple(head)

    def __call__(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        output_hidden_states: bool = False,
    ) -> EncoderOutput | QuestionAnsweringOutput:
        """Logits for ``input_ids`` int32 [B, T], of the shape that the task has.

        ``attention_mask`` [B, T] is 1 at real tokens; outputs at padding mean nothing. Positions
        count from 0 whatever the mask (BERT, DeBERTa) or over the tokens that are no padding
        (RoBERTa), unless ``positions`` int32 [B, T] are given.
        """
        x, hidden = self._base(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            positions=positions,
            emit_hidden=output_hidden_states,
        )
        logits = self.head(x)
        if self.task == "question-answering":
            return QuestionAnsweringOutput(
                start_logits=logits[..., 0], end_logits=logits[..., 1], hidden_states=hidden
            )
        return EncoderOutput(logits=logits, hidden_states=hidden)

    def states(
        self,
        input_ids: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """[B, T, D]: what :meth:`head` makes logits of; arguments as for a call."""
        return self._base(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            positions=positions,
            emit_hidden=False,
        )[0]

    def head(self, x: jax.Array) -> jax.Array:
        """Logits of states [B, T, D], or [B, D] pooled; those of tokens for masked-lm."""
        beside = (self._base.attend,) if self.task == "masked-lm" else ()
        for name in self.head_names:
            x = getattr(self, name)(x, *beside)
        return x

    @property
    def _base(self) -> Any:
        return getattr(self, self.config.kind.base)

    def example_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the smallest call, to trace the model without data."""
        return {"input_ids": jax.ShapeDtypeStruct((1, 2), jnp.int32)}


def build_encoder(
    config: EncoderConfig, task: str, dtype: Any = jnp.float32, **options: Any
) -> EncoderForTask:
    """The module for ``task``. Raises CheckpointError for a masked-LM head that is not tied to the
    embeddings, which these models have in name only."""
    if task == "masked-lm" and not config.tie_word_embeddings:
        raise CheckpointError(
            "config.json: tie_word_embeddings=False is not supported for masked-lm; accepted: True"
        )
    if task == "question-answering":
        config = config.with_labels(2)
    return EncoderForTask(config, task, **{"dtype": dtype, "param_dtype": dtype, **options})
