"""Tiny models of the usual families with tokenizers of their kinds, saved as anybody would save theirs."""

from pathlib import Path
from typing import Any

TEXT = ["alpha beta gamma delta return import value class def None True self " * 20, "naïve café 漢字 🙂"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
HOOK_POINTS = {
    "gpt_neox": ("gpt_neox.layers.1:input", "gpt_neox.layers.0", "gpt_neox.layers.0.mlp", "gpt_neox.layers.0.mlp.act"),
    "gpt2": ("transformer.h.1:input", "transformer.h.0", "transformer.h.1.mlp", "transformer.h.1.mlp.act"),
    "llama": ("model.layers.1:input", "model.layers.0", "model.layers.1.mlp", "model.layers.1.mlp.down_proj:input"),
    "qwen2": ("model.layers.1:input", "model.layers.0", "model.layers.0.mlp", "model.layers.0.mlp.down_proj:input"),
    "qwen3": ("model.layers.1:input", "model.layers.0", "model.layers.1.mlp", "model.layers.1.mlp.down_proj:input"),
    "bert": (
        "bert.encoder.layer.1:input",
        "bert.encoder.layer.0",
        "bert.encoder.layer.0.output.dense",
        "bert.encoder.layer.1.intermediate",
    ),
}
"""Family -> residual stream before layer 1 and after layer 0, what an MLP writes, its hidden layer."""


def save_model(
    family: str, folder: Path, *, dtype: str = "float32", max_shard_size: str = "1GB", **options: Any
) -> None:
    """A model of two layers of width 16 for contexts of 64 tokens with random weights, and its tokenizer."""
    import torch

    tokenizer = wordpiece() if family == "bert" else byte_level()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_model(family, len(tokenizer), **options)
        for parameter in model.parameters():
            # Biases and norms are zeros and ones at first: a mistake there would not show.
            torch.nn.init.normal_(parameter, std=0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)


def new_model(family: str, vocab_size: int, **options: Any) -> Any:
    import transformers

    sizes = {"vocab_size": vocab_size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 64}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt_neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, **ids, **options))
    if family == "gpt2":
        sizes = {"vocab_size": vocab_size, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 24}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids, **options))
    if family == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **options))
    # Four query heads share two key-value heads.
    grouped = {"num_key_value_heads": 2} | ids | options
    if family == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **grouped))
    if family == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, head_dim=8, **grouped))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **grouped))


def byte_level() -> Any:
    """300 tokens of byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def wordpiece() -> Any:
    """WordPiece as BERT has it: CLS, SEP, PAD and no end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
