"""Tiny random checkpoints of torch models, and the same with adapters of PEFT's."""

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 6, "tie_word_embeddings": False}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
}
QV = ["q_proj", "v_proj"]


def write_checkpoint(name, folder):
    """A random checkpoint of a family; biases and norms are not left at their zeros."""
    config, extra = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**SMALL, **extra))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2 if parameter.ndim > 1 else 0.5)
    model.save_pretrained(folder)
    return str(folder)


def torch_base(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def torch_adapted(folder, case):
    """A PEFT model whose every trainable weight is random."""
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **case}
    model = peft.get_peft_model(torch_base(folder), peft.LoraConfig(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    return model.eval()
