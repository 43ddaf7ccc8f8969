"""Texts to tokens and tokens to the arrays of a forward pass, without torch and transformers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from pairdr.records import Passage
from pairdr.tokens import Contract, Side, Tokens

Arrays = dict[str, npt.NDArray[np.int64]]
"""Name of an input to its [n, width] values: input_ids, attention_mask, token_type_ids."""


class TextReader:
    """Tokenises as the model did that was exported: its tokenizer, prefixes, lengths, segments.

    Args:
        tokenizer: the tokenizer's JSON; its truncation says which end of a long text is cut.
        contract: prefixes and lengths.
        token_types: whether the model tells segments apart by token types.
    """

    def __init__(self, tokenizer: str, contract: Contract, token_types: bool) -> None:
        self.contract, self.token_types = contract, token_types
        # A tokenizer holds the length it cuts to, so each side has one of its own and they may work side by side.
        self._tokenizers = {
            "query": _cut_to(tokenizer, contract.query_length),
            "passage": _cut_to(tokenizer, contract.passage_length),
        }

    def tokenize_queries(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenise questions, prefix included, cut to the contract's length."""
        return self._tokenize(self.contract.form_queries(texts), None, "query")

    def tokenize_passages(self, passages: Sequence[Passage]) -> list[Tokens]:
        """Tokenise passages, prefix included, cut to the contract's length; pairs longest first."""
        return self._tokenize(*self.contract.form_passages(passages), "passage")

    def _tokenize(self, first: list[str], second: list[str] | None, side: Side) -> list[Tokens]:
        inputs = first if second is None else list(zip(first, second, strict=True))
        return [
            Tokens(coded.ids, coded.type_ids if self.token_types else [])
            for coded in self._tokenizers[side].encode_batch(inputs)
        ]


def pad_tokens(tokens: Sequence[Tokens], pad_id: int, multiple: int = 1) -> Arrays:
    """Return the arrays of one forward pass, padded on the right to the longest text, or to the next multiple."""
    shape = (len(tokens), -(-max(len(t.input_ids) for t in tokens) // multiple) * multiple)
    arrays = {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "attention_mask": np.zeros(shape, dtype=np.int64),
        "token_type_ids": np.zeros(shape, dtype=np.int64),
    }
    for row, (ids, types) in enumerate(tokens):
        arrays["input_ids"][row, : len(ids)] = ids
        arrays["attention_mask"][row, : len(ids)] = 1
        arrays["token_type_ids"][row, : len(types)] = types
    return arrays


def _cut_to(tokenizer: str, length: int) -> Tokenizer:
    made = Tokenizer.from_str(tokenizer)
    side = (made.truncation or {}).get("direction", "right")
    made.no_padding()
    made.enable_truncation(length, strategy="longest_first", direction=side)
    return made
