"""Positions of documents in a row."""

import torch


def document_starts(documents_BS: torch.Tensor) -> torch.Tensor:
    """Position of the first token of each token's document, [B, S].

    documents_BS: document index of each token, never decreasing along a row.
    """
    places = torch.arange(documents_BS.shape[1], device=documents_BS.device).expand_as(documents_BS)
    is_first = torch.ones_like(documents_BS, dtype=torch.bool)
    is_first[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return torch.where(is_first, places, 0).cummax(dim=1).values
