"""``TransformerModel`` on torch.nn alone: the peer that speed and quality are measured against."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from llmos_fast.models import LanguageModel
from llmos_fast.models.positional_encoding import PositionalEncoding


class TorchTransformerModel(LanguageModel):
    """The same parameters under the same names, computed by torch.nn alone."""

    def __init__(
        self, ntoken: int, ninp: int, nhead: int, nhid: int, nlayers: int, dropout: float = 0.5
    ):
        super().__init__()
        self.ninp = ninp
        self.input_emb = nn.Embedding(ntoken, ninp)
        self.pos_encoder = PositionalEncoding(ninp, dropout)
        layer = nn.TransformerEncoderLayer(ninp, nhead, nhid, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, nlayers, enable_nested_tensor=False)
        self.decoder = nn.Linear(ninp, ntoken)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position: Float[batch seq ntoken]."""
        x = self.pos_encoder(self.input_emb(tokens) * math.sqrt(self.ninp))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=x.device)
        logits: Tensor = self.decoder(self.encoder(x, mask=mask, is_causal=True))
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of ``targets``, from logits that are held as a whole."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())
