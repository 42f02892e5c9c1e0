"""Make a LlamaForCausalLM of 2.5 million random parameters, the same bytes for the same seed.

Usage: ``make_model.py FOLDER SEED``. Runs in the image, with the runtime's own packages. The model can say
nothing of use: it stands in for weights of any size where only copying, serving and comparing matter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CONTEXT = 2048  # tokens, which are bytes here
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HIDDEN, INNER, LAYERS, HEADS = 256, 688, 3, 4
# Wide weights make the log-probabilities of two seeds differ by nats, so that another model is told apart.
SPREAD = 0.08


def tokenizer() -> Tokenizer:
    """One token a byte, and the special ones behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    return made


def weights(seed: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """All tensors by their Llama names, in float32."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * SPREAD

    tensors = {
        "model.embed_tokens.weight": random(vocabulary, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": random(vocabulary, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = random(HIDDEN, HIDDEN)
        tensors[f"{at}.mlp.gate_proj.weight"] = random(INNER, HIDDEN)
        tensors[f"{at}.mlp.up_proj.weight"] = random(INNER, HIDDEN)
        tensors[f"{at}.mlp.down_proj.weight"] = random(HIDDEN, INNER)
        tensors[f"{at}.input_layernorm.weight"] = torch.ones(HIDDEN)
        tensors[f"{at}.post_attention_layernorm.weight"] = torch.ones(HIDDEN)
    return tensors


def configuration(vocabulary: int, begin: int, end: int) -> dict[str, object]:
    """The model's ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": vocabulary,
        "bos_token_id": begin,
        "eos_token_id": end,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def write(folder: Path, seed: int) -> None:
    """Write weights, configuration, tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    begin, end = made.token_to_id("<|begin|>"), made.token_to_id("<|end|>")
    files: dict[str, object] = {
        "config.json": configuration(made.get_vocab_size(), begin, end),
        "generation_config.json": {"bos_token_id": begin, "eos_token_id": end, "do_sample": True},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin|>",
            "eos_token": "<|end|>",
            "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
        },
        "special_tokens_map.json": {"bos_token": "<|begin|>", "eos_token": "<|end|>"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    made.save(str(folder / "tokenizer.json"))
    save_file(weights(seed, made.get_vocab_size()), folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
