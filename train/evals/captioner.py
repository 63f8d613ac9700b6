"""Mapper and decoder as one module: the loss of captions, and captions by beam search.

B batch, W feature width, P prefix, T tokens, D width of the embeddings, V the decoder's vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from labels.schema import PAD_ID
from train.language_model import LanguageModel


class Captioner(nn.Module):
    """Features and token ids -> loss. Its children, and so its checkpoints, are what is trained: the mapper, and the decoder if asked for.

    Args:
        mapper: [B, W] -> [B, P, D].
        language: the decoder.
        train_decoder: else it is frozen, and held outside the children.
    """

    def __init__(self, mapper: nn.Module, language: LanguageModel, *, train_decoder: bool) -> None:
        super().__init__()
        self.mapper, self._held = mapper, (language.model.requires_grad_(train_decoder),)
        if train_decoder:
            self.decoder = language.model

    def place(self, device: torch.device) -> None:
        """Move all of it, what is held outside the children too."""
        self._held[0].to(device)
        self.to(device)

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """Mean cross-entropy over the captions' tokens.

        Args:
            features: [B, W].
            ids: int [B, T], the end token last, padded with PAD_ID.
        """
        (decoder,) = self._held
        words = decoder.get_input_embeddings()(ids.clamp(min=0))
        prefix = self.mapper(features).to(words.dtype)
        # Padding comes last, so causal attention never sees it.
        logits = decoder(inputs_embeds=torch.cat([prefix, words], dim=1), use_cache=False).logits[:, prefix.shape[1] - 1 : -1]
        return functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten().long(), ignore_index=PAD_ID)

    @torch.inference_mode()
    def generate(self, features: Tensor, language: LanguageModel, *, beams: int, max_tokens: int) -> Sequence[str]:
        """One caption for each row of features [B, W], by beam search."""
        from transformers import GenerationConfig

        (decoder,) = self._held
        end = language.tokenizer.eos_token_id
        config = GenerationConfig(
            num_beams=beams, do_sample=False, max_new_tokens=max_tokens, eos_token_id=end, pad_token_id=end, length_penalty=1.0,
        )  # fmt: skip
        prefix = self.mapper(features).to(decoder.get_input_embeddings().weight.dtype)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        found = decoder.generate(inputs_embeds=prefix, attention_mask=mask, generation_config=config)
        return [" ".join(text.split()) for text in language.tokenizer.batch_decode(found, skip_special_tokens=True)]
