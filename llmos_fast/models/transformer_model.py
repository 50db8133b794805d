"""PyTorch's word language model: embedding, positions, a causal encoder stack, a projection."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from llmos_fast import ops
from llmos_fast.models.language_model import LanguageModel, loss_in_blocks
from llmos_fast.models.positional_encoding import PositionalEncoding
from llmos_fast.nn import TransformerEncoder, TransformerEncoderLayer, plain


class TransformerModel(LanguageModel):
    """A causal language model over tokens, batch first.

    The parameters carry the names of ``TransformerModel`` in pytorch/examples
    (word_language_model), so its ``state_dict`` fits apart from the table of positions.

    ntoken:  size of the vocabulary
    ninp:    width of the model, a multiple of ``nhead``
    nhead:   attention heads per layer
    nhid:    width of the feed-forward network
    nlayers: layers
    dropout: after the positions, in the attention and in the feed-forward networks
    """

    def __init__(
        self, ntoken: int, ninp: int, nhead: int, nhid: int, nlayers: int, dropout: float = 0.5
    ):
        super().__init__()
        _check_sizes(ntoken, ninp, nhead, nhid, nlayers, dropout)
        self.arguments: dict[str, Any] = {
            "ntoken": ntoken,
            "ninp": ninp,
            "nhead": nhead,
            "nhid": nhid,
            "nlayers": nlayers,
            "dropout": dropout,
        }
        self.ninp = ninp
        self.input_emb = nn.Embedding(ntoken, ninp)
        self.pos_encoder = PositionalEncoding(ninp, dropout)
        layer = TransformerEncoderLayer(ninp, nhead, nhid, dropout, batch_first=True)
        self.encoder = TransformerEncoder(layer, nlayers, enable_nested_tensor=False)
        self.decoder = nn.Linear(ninp, ntoken)
        self.init_weights()

    def init_weights(self) -> None:
        """Embedding and projection uniform in -0.1..0.1, the projection's bias zero."""
        nn.init.uniform_(self.input_emb.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Output of the stack; position ``i`` has seen tokens ``0..i``.

        tokens:  Int[batch seq], int64 or int32
        returns: Float[batch seq ninp]
        """
        if tokens.ndim != 2:
            raise ValueError(
                f"TransformerModel: tokens must be [batch seq], got shape {tuple(tokens.shape)}"
            )
        positions = self.pos_encoder.rows(tokens.shape[1])
        scale, dropout = math.sqrt(self.ninp), self.pos_encoder.dropout
        x = plain.embedding(self.input_emb, tokens, scale, positions, dropout)
        encoded: Tensor = self.encoder(x, is_causal=True)
        return encoded

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position: Float[batch seq ntoken]."""
        return self._project(self.hidden(tokens))

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits of the token after the last one, the only row that is projected."""
        return self._project(self.hidden(tokens)[:, -1])

    def _project(self, hidden: Tensor) -> Tensor:
        if isinstance(self.decoder, nn.Linear):
            return ops.linear(hidden, self.decoder.weight, self.decoder.bias)
        logits: Tensor = self.decoder(hidden)
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of ``targets``, the token that follows each of ``tokens``.

        tokens, targets: Int[batch seq]; positions whose target is -100 do not count
        returns:         Float[]
        """
        if targets.shape != tokens.shape:
            raise ValueError(
                f"TransformerModel.loss: targets must have the shape of tokens "
                f"{tuple(tokens.shape)}, got {tuple(targets.shape)}"
            )
        hidden = self.hidden(tokens)
        if isinstance(self.decoder, nn.Linear):
            return ops.linear_cross_entropy(hidden, self.decoder.weight, targets, self.decoder.bias)
        return loss_in_blocks(self.decoder, hidden, targets, self.arguments["ntoken"])


def _check_sizes(
    ntoken: int, ninp: int, nhead: int, nhid: int, nlayers: int, dropout: float
) -> None:
    sizes = {"ntoken": ntoken, "ninp": ninp, "nhead": nhead, "nhid": nhid, "nlayers": nlayers}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"TransformerModel: {name} must be at least 1, got {size}")
    if ninp % nhead:
        raise ValueError(
            f"TransformerModel: ninp must be a multiple of nhead, got {ninp} and {nhead}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"TransformerModel: dropout must be in 0..1 (1 excluded), got {dropout}")
