"""Text through `stories`: its 512 pieces, likelihood, and greedy decoding.

    text.mean_nll(model.apply, params, data.stories(1200, 1230))  # 1.5578
    ids = text.greedy(model.apply, params, [text.BOS], 100)
    text.Pieces.load().decode(ids)  # "Once upon a time, there was a little girl ..."

References:
  Sennrich et al., `Subword Units <https://arxiv.org/abs/1508.07909>`_, 2016, section
  3.2. Differs: pairs merge by the score of their piece, and bytes stand in for
  characters without one, as in SentencePiece.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data
from experiments.models import stories

BOS, FIRST_BYTE, BYTES = 1, 3, 256


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The pieces of text, and the score that orders their merges.

    Attributes:
      pieces: Of each id. Ids 3 to 258 stand for single bytes.
      scores: Of each id.
    """

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]

    @classmethod
    def load(cls, root: Path | str | None = None) -> Pieces:
        """Those of the data folder."""
        file = json.loads(data.find("stories260k/tok512.json", root).read_text())
        pieces = [bytes.fromhex(piece) for piece in file["pieces_hex"]]
        pieces[FIRST_BYTE : FIRST_BYTE + BYTES] = [bytes([b]) for b in range(BYTES)]
        return cls(tuple(pieces), tuple(file["scores"]))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, BOS in front.

        A piece a character (its bytes where there is none), then the best adjacent pair
        merges, the first of equals, until no pair is a piece.
        """
        index = {piece: i for i, piece in enumerate(self.pieces)}
        ids: list[int] = []
        for character in f" {text}":
            piece = character.encode()
            ids += [index[piece]] if piece in index else [FIRST_BYTE + b for b in piece]
        while True:
            pairs = [
                self.pieces[a] + self.pieces[b] for a, b in itertools.pairwise(ids)
            ]
            known = [i for i, pair in enumerate(pairs) if pair in index]
            if not known:
                return [BOS, *ids]
            best = max(known, key=lambda i: self.scores[index[pairs[i]]])
            ids[best : best + 2] = [index[pairs[best]]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without BOS and the space in front."""
        text = b"".join(self.pieces[i] for i in ids if i != BOS)
        return text.decode(errors="replace").removeprefix(" ")


def mean_nll(
    apply: Callable[..., Any],
    params: Any,
    ids: Sequence[np.ndarray],
    *,
    batch_size: int = 10,
) -> float:
    """Mean over all tokens but the first of ``-log p(token | those before)``, in nats.

    Args:
      apply: ``apply(params, tokens)``: that of `stories.Stories`, or it lifted. It is
        jitted here.
      params: What `apply` takes first, compressed or not.
      ids: Of each story, BOS in front. They are padded at the end, which a causal
        model does not see.
      batch_size: Stories at a time.
    """
    run = jax.jit(apply)
    total, count = 0.0, 0
    length = max(len(story) for story in ids)
    for start in range(0, len(ids), batch_size):
        batch = np.zeros((batch_size, length), np.int32)
        known = np.zeros((batch_size, length), bool)
        for row, story in enumerate(ids[start : start + batch_size]):
            batch[row, : len(story)], known[row, : len(story)] = story, True
        nll = _nll(run(params, batch[:, :-1]), batch[:, 1:])
        total += float(np.asarray(nll, np.float64)[known[:, 1:]].sum())
        count += int(known[:, 1:].sum())
    return total / count


@jax.jit
def _nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]


def greedy(
    apply: Callable[..., Any],
    params: Any,
    prompt: Sequence[int],
    length: int,
    *,
    cache: stories.Cache | None = None,
) -> list[int]:
    """The prompt, and the likeliest token after it again and again, `length` in all.

    Args:
      apply: That of `stories.Stories`, or it lifted; called with ``method="decode"``.
      params: What `apply` takes first, compressed or not.
      prompt: Ids; the first is BOS.
      length: Ids in the result, at most 512.
      cache: Empty, for at least `length` tokens of one story; dense by default.
    """
    step = jax.jit(functools.partial(apply, method="decode"))
    ids, logits = list(prompt), None
    cache = stories.init_cache(1, length) if cache is None else cache
    for position in range(length - 1):
        token = np.array([[ids[position]]], np.int32)
        logits, cache = step(params, cache, token, np.int32(position))
        if position + 1 == len(ids):
            ids.append(int(jnp.argmax(logits[0, -1])))
    return ids
