"""PixArt Alpha and Sigma. ComfyUI calls no block replacement and lets no node reach their attention."""

from __future__ import annotations

from comfy.ldm.pixart.pixartms import PixArtMS

from .family import Family

PIXART = Family("PixArt", (PixArtMS,))
