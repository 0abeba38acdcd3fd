"""Makes the golden files: random tiny models in Hugging Face layout, and what transformers computes with them.

    pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    python tests/models/golden/generate.py [NAME ...]

Each model is a directory as `save_pretrained` writes it, and `expected.npz` beside its files: tokens (2, T) int32,
logits (2, T, vocab) float32, and greedy (2, 32) int32, the continuation of the first 8 tokens of each row. All is
computed in float32 on one thread, whatever the type in which the weights are stored. A seed is used whose greedy
decisions are clear.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

HERE = Path(__file__).parent

COMMON = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "rms_norm_eps": 1e-5}

# Head width 16 and base 100 give wavelengths of 6 to 350 tokens; with an original context of 32 some are kept, some
# interpolated and some divided.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

MODELS = {
    "llama2": {"num_hidden_layers": 2, "max_position_embeddings": 64},
    "llama3_1": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rope_parameters": LLAMA3_ROPE,
    },
    "grouped": {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 64},
    "tied": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "model_type": "qwen2",
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "model_type": "mistral",
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 64,
        "sliding_window": 7,
    },
    "qwen3": {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    },
    # Caps so low that they are felt, and a scale of the scores that is not that of the head.
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "query_pre_attn_scalar": 18,
        "max_position_embeddings": 64,
        "sliding_window": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 10,
        "max_position_embeddings": 64,
        "sliding_window": 5,
        "sliding_window_pattern": 3,
        "rope_theta": 1000.0,
        "rope_local_base_freq": 50.0,
    },
    # Wavelengths of 6 to 200 tokens, four times that with scaling.
    "linear": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    },
    # The layout of Gemma 3 from 4B on: a text model beside a vision tower and a projector. Its global layer is scaled.
    "gemma3_images": {
        "model_type": "gemma3",
        "text_config": {
            **COMMON,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 10,
            "max_position_embeddings": 128,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "rope_theta": 100.0,
            "rope_local_base_freq": 50.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        "vision_config": {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": 4,
    },
}
STORED_AS = {
    "grouped": torch.float16,
    "tied": torch.bfloat16,
    "gemma3": torch.bfloat16,
    "gemma3_images": torch.bfloat16,
}
SHARDED = {"tied": "12KB"}
LENGTHS = {"llama3_1": 96}


def random_model(name: str, seed: int) -> PreTrainedModel:
    """Weights large enough that attention attends to something, norms that are not all ones, biases that matter."""
    torch.manual_seed(seed)
    shared = {} if "text_config" in MODELS[name] else {"model_type": "llama", **COMMON}
    config = AutoConfig.for_model(**{**shared, **MODELS[name]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(".bias"):
                parameter.normal_()
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
                if name.startswith("gemma"):  # its norms multiply by one plus this
                    parameter -= 1
            else:
                parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)
    stored = STORED_AS.get(name, torch.float32)
    return model.to(stored)


@torch.no_grad()
def as_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a float32 model.

    `model.float()` is not that: casting to 16 bits has rounded the rotary frequencies, which are a buffer, for good.
    """
    with torch.random.fork_rng():  # the weights that this draws are replaced
        wide = type(model)(model.config).eval()
    for target, source in zip(wide.parameters(), model.parameters(), strict=True):
        target.copy_(source)
    return wide


@torch.no_grad()
def greedy(model: PreTrainedModel, prompts: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
    """New tokens, and the smallest lead of a winner over the second."""
    tokens, lead = prompts, float("inf")
    for _ in range(count):
        best = model(tokens, use_cache=False).logits[:, -1].topk(2)
        lead = min(lead, float((best.values[:, 0] - best.values[:, 1]).min()))
        tokens = torch.cat([tokens, best.indices[:, :1]], dim=1)
    return tokens[:, prompts.shape[1] :], lead


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or MODELS:
        for seed in range(100):
            model = random_model(name, seed)
            wide = as_float32(model)
            tokens = torch.randint(0, COMMON["vocab_size"], (2, LENGTHS.get(name, 48)))
            continuation, lead = greedy(wide, tokens[:, :8], 32)
            if lead > 0.01:
                break
        directory = HERE / name
        shutil.rmtree(directory, ignore_errors=True)
        model.save_pretrained(directory, max_shard_size=SHARDED.get(name, "5GB"))
        for file in directory.iterdir():
            file.chmod(0o644)  # safetensors files are private when new
        with torch.no_grad():
            logits = wide(tokens, use_cache=False).logits
        np.savez_compressed(
            directory / "expected.npz",
            tokens=tokens.numpy().astype(np.int32),
            logits=logits.numpy(),
            greedy=continuation.numpy().astype(np.int32),
        )
        print(f"{name}: seed {seed}, smallest lead {lead:.3f}, logits up to {logits.abs().max():.1f}")


if __name__ == "__main__":
    main()
