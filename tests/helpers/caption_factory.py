"""Coloured images with captions as shards of pairs, and a tiny language model in a folder."""

from pathlib import Path

import torch
from PIL import Image

from shard_factory import encode, sample, write_tar

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 220)}


def coloured_pairs(folder: Path, train: int = 24, test: int = 9) -> Path:
    """DIR/{train,test}/0.tar: images of one colour each, "A photo of something red." """
    number = 0
    for part, count in (("train", train), ("test", test)):
        members = []
        for index in range(count):
            name = list(COLOURS)[index % 3]
            number += 1
            shade = tuple(channel + number for channel in COLOURS[name])
            image = encode(Image.new("RGB", (24 + number % 5, 20), shade), "PNG")
            members += [(f"{number:05d}.png", image), *sample(f"{number:05d}", f"A photo of something {name}.")[1:]]
        write_tar(folder / part / "0.tar", members)
    return folder


def language_model_folder(folder: Path, texts: list[str], *, positions: int = 64) -> Path:
    """A Llama of one layer, with random weights so large that a prefix matters, and a BPE learnt from `texts`."""
    from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, 300, show_progress=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
