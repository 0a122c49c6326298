"""Text encoder of the embedded default: a word table and one attention layer.

The vocabulary is the world's: colours, shapes, garments, places, poses. The encoder reads near synonyms as the trained
word ("scarlet" as "red"), and drops filler words and unknown words. It pads a caption to `SLOTS` tokens, so every
prompt gives tensors of the same shape.

Shapes: ids `[B, T]`; context `[B, T, D]`, pooled `[B, P]`; T = `SLOTS`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOTS = 20  # tokens per prompt
PAD = 0

VOCABULARY: tuple[str, ...] = (
    "<pad>",
    # things
    "doll", "ball", "box", "star", "heart", "house", "tree", "fish", "moon",
    # colours and grounds
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "grey", "dark", "pale", "black", "brown",
    "blonde", "ground",
    # dolls
    "hair", "short", "long", "shirt", "trousers", "skirt", "plain", "striped", "spotted", "arms", "up", "down", "out",
    "waving",
    # places
    "left", "right", "above", "below", "top", "bottom", "centre", "in",
    # kept for later worlds, so that ids never move
    "two", "large", "small", "dress", "hat", "dog", "cat", "car", "flower", "cloud", "sun", "face", "running",
    "sitting", "standing", "dotted", "checked", "sks",
    # of the second edition; the first one's word table ends here
    "tee", "vest", "coat", "shorts", "tied", "pointing", "printed", "letterx", "lettert", "letterh",
)  # fmt: skip

SYNONYMS: dict[str, str] = {
    "gray": "grey", "scarlet": "red", "crimson": "red", "ruby": "red", "golden": "yellow", "gold": "yellow",
    "azure": "blue", "navy": "blue", "emerald": "green", "lime": "green", "violet": "purple", "lilac": "purple",
    "magenta": "pink", "rose": "pink", "blond": "blonde", "fair": "blonde", "brunette": "brown",
    "circle": "ball", "sphere": "ball", "disc": "ball", "disk": "ball", "balloon": "ball", "square": "box",
    "cube": "box", "crate": "box", "block": "box", "home": "house", "hut": "house", "cottage": "house", "pine": "tree",
    "fir": "tree", "crescent": "moon", "girl": "doll", "boy": "doll", "person": "doll", "man": "doll",
    "woman": "doll", "child": "doll", "figure": "doll", "puppet": "doll", "pants": "trousers", "jeans": "trousers",
    "sweater": "shirt", "jumper": "shirt", "tshirt": "shirt", "blouse": "shirt", "jacket": "shirt",
    "stripes": "striped", "stripy": "striped", "stripe": "striped", "dots": "spotted", "dotted": "spotted",
    "spots": "spotted", "polka": "spotted", "arm": "arms", "hands": "arms", "raised": "up", "lowered": "down",
    "outstretched": "out", "spread": "out", "wave": "waving", "waves": "waving", "background": "ground",
    "backdrop": "ground", "floor": "ground", "over": "above", "under": "below", "beneath": "below", "upper": "top",
    "lower": "bottom", "night": "dark",
}  # fmt: skip

_FILLER = "a an the with and of on in at to is its his her wearing this that there picture paper plain"
FILLER = frozenset(_FILLER.split())  # "plain" is what a shirt is unless it is striped or spotted

# Words with an id that no caption of the world uses yet: their embeddings are untrained, so they count as unknown.
ROWS = VOCABULARY.index("tee")  # of the first edition's word table
RESERVED = frozenset(VOCABULARY[VOCABULARY.index("two") : ROWS]) | {"centre"}

TRAINED = frozenset(VOCABULARY[1:ROWS]) - RESERVED - FILLER
_IDS = {word: i for i, word in enumerate(VOCABULARY)}
_WORD = re.compile(r"[a-z]+")
_LETTER = re.compile(r"\bletter ([xth])\b")


class Edition(NamedTuple):
    """What a text encoder was trained on. `rows`: of its word table."""

    rows: int
    trained: frozenset[str]
    synonyms: dict[str, str]


_SECOND = frozenset(VOCABULARY[ROWS:]) | {"small", "dress", "checked"}
EDITIONS: dict[int, Edition] = {
    1: Edition(ROWS, TRAINED, SYNONYMS),
    2: Edition(
        len(VOCABULARY),
        TRAINED | _SECOND,
        {
            **SYNONYMS, "jacket": "coat", "overcoat": "coat", "tshirt": "tee", "gown": "dress", "frock": "dress",
            "waistcoat": "vest", "sleeveless": "vest", "singlet": "vest", "chequered": "checked", "plaid": "checked",
            "tartan": "checked", "squares": "checked", "bun": "tied", "ponytail": "tied", "knot": "tied",
            "little": "small", "tiny": "small", "print": "printed", "points": "pointing",
        },
    ),
}  # fmt: skip


def word_ids(text: str, edition: int = 1) -> tuple[list[int], list[str]]:
    """Ids of the known words of `text` in order, and the unknown words. Not padded, not cut."""
    ids, unknown = [], []
    _, trained, synonyms = EDITIONS[edition]
    text = text.lower()
    if edition > 1:  # a letter on a shirt is one word, and not the end of another one
        text = _LETTER.sub(r"letter\1", text.replace("t-shirt", "tee"))
    for word in _WORD.findall(text):
        if word in FILLER:
            continue
        single = word.removesuffix("s")
        meant = next((w for w in (word, synonyms.get(word), single, synonyms.get(single)) if w in trained), None)
        if meant is None:
            unknown.append(word)
        else:
            ids.append(_IDS[meant])
    return ids, unknown


class TinyTextEncoder(nn.Module):
    """Word ids to context and pooled vector.

    Args:
        rows: of the word table, an edition's.
        operations: ComfyUI's layer classes, or `torch.nn`.
    """

    def __init__(
        self,
        dim: int = 128,
        pooled_dim: int = 64,
        heads: int = 4,
        rows: int = ROWS,
        *,
        operations,
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.heads = heads
        self.words = operations.Embedding(rows, dim, **where)
        self.places = operations.Embedding(SLOTS, dim, **where)
        self.norm1 = operations.LayerNorm(dim, **where)
        self.qkv = operations.Linear(dim, 3 * dim, **where)
        self.proj = operations.Linear(dim, dim, **where)
        self.norm2 = operations.LayerNorm(dim, **where)
        self.mlp_in = operations.Linear(dim, 4 * dim, **where)
        self.mlp_out = operations.Linear(4 * dim, dim, **where)
        self.norm3 = operations.LayerNorm(dim, **where)
        self.pool = operations.Linear(dim, pooled_dim, **where)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids `[B, SLOTS]` -> context `[B, SLOTS, dim]`, pooled `[B, pooled_dim]`, both float32."""
        h = self.words(ids).float() + self.places(torch.arange(ids.shape[1], device=ids.device)).float()
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = h + self.mlp_out(F.gelu(self.mlp_in(self.norm2(h)), approximate="tanh"))
        h = self.norm3(h)
        said = (ids != PAD).unsqueeze(-1).to(h)
        pooled = (h * said).sum(1) / said.sum(1).clamp(min=1)
        return h, self.pool(pooled)
