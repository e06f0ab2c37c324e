"""A causal model of a few thousand random weights that takes long prompts."""

from pathlib import Path

from tests.flows.models import byte_level


def save_local_model(folder: Path, longest: int = 4096) -> None:
    import torch
    import transformers

    tokenizer = byte_level()
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=longest,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
