"""Step caches of ComfyUI and of other packs: how to recognise each on a MODEL, whatever the order of nodes.

Two caches on one model forecast from each other's forecasts, and the picture falls apart without a warning. So ours
refuse to work beside another: when their node runs, and again when sampling starts.

| cache | pack | how it shows |
|---|---|---|
| EasyCache, LazyCache | ComfyUI | key `easycache` |
| TeaCache | ComfyUI-TeaCache | key `rel_l1_thresh`, and a function around the model |
| MagCache | ComfyUI-MagCache | key `magcache_thresh`, and a function around the model |
| CacheDiT | ComfyUI-CacheDiT | keys `cache_dit_turbo`, `ltx2_cache`, `wan_cache`; its forward outlasts its node |
| TaylorSeer | ComfyUI-TaylorSeer | a function around the model |
| First Block Cache | Comfy-WaveSpeed | a function around the model |
| first-block cache | ComfyUI-nunchaku | a threshold on the wrapped model |

Keys are those of `transformer_options`. We recognise functions by their own and their module's name, so we find other
versions and forks too. Attributes that these packs leave on the module after a run, such as `teacache_state`, are no
sign of a cache: nothing reads them without the pack's function.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from comfy.model_patcher import ModelPatcher

from ..run import KEY
from ..transformer import REMOVE, module_of, pack_of, passes, stranger, transformer_of, unwrapped

KEYS = {  # in transformer_options
    "easycache": "EasyCache",
    "rel_l1_thresh": "TeaCache",
    "magcache_thresh": "MagCache",
    "cache_dit_turbo": "CacheDiT",
    "ltx2_cache": "CacheDiT",
    "wan_cache": "CacheDiT",
}
WORDS = {  # in the name of a function or of its module, in small letters and without signs
    "teacache": "TeaCache",
    "magcache": "MagCache",
    "cachedit": "CacheDiT",
    "taylorseer": "ComfyUI-TaylorSeer",
    "fbcache": "First Block Cache",
    "firstblockcache": "First Block Cache",
    "deepcache": "DeepCache",
    "easycache": "EasyCache",
    "lazycache": "LazyCache",
}
MARKS = {"_original_forward": "CacheDiT", "_original_forward_wan": "CacheDiT"}  # on a module whose forward is replaced
NUNCHAKU = "residual_diff_threshold_multi"  # 0 is off


class ForeignCache(NamedTuple):
    """Another step cache. `remedy`: what to do about it, in sentences."""

    name: str
    remedy: str = REMOVE


def foreign_cache(model: ModelPatcher | None, model_options: dict) -> ForeignCache | None:
    """The step cache of ComfyUI or another pack on a MODEL, or None.

    Args:
        model_options: the MODEL's own, or those of its run.
    """
    options = model_options.get("transformer_options", {})
    for key, name in KEYS.items():
        if options.get(key) is not None:
            return ForeignCache(getattr(options[key], "name", name) if key == "easycache" else name)
    found = next(filter(None, map(named, functions(model, model_options))), "")
    if found or model is None:
        return ForeignCache(found) if found else None
    return in_module(model)


def functions(model: ModelPatcher | None, model_options: dict) -> Iterator[Any]:
    """The functions that other packs have put around the model."""
    yield model_options.get("model_function_wrapper")
    wrappers = [model_options.get("transformer_options", {}).get("wrappers", {}), getattr(model, "wrappers", {})]
    for by_key in (by_key for kinds in wrappers for by_key in kinds.values()):
        yield from (function for key, listed in by_key.items() if key != KEY for function in listed)


def in_module(model: ModelPatcher) -> ForeignCache | None:
    """A cache in the transformer itself."""
    transformer = transformer_of(model)
    if getattr(getattr(transformer, "model", None), NUNCHAKU, 0):
        return ForeignCache("nunchaku", "Set 'cache_threshold' of its loader to 0, or remove ours.")
    who = stranger(model)
    if who is None:
        return None
    marked = (name for mark, name in MARKS.items() if hasattr(transformer, mark))
    found = next(filter(None, (named(code) for _, code in passes(model))), "") or next(marked, "")
    return ForeignCache(found, who.remedy) if found else None


def named(code: Any) -> str:
    """The cache that a function belongs to, by its own and its module's name. Empty: no known cache."""
    if code is None or not pack_of(code):
        return ""
    code = unwrapped(code)
    module = re.split(r"[/\\]", module_of(code))[-1]  # without the pack's folders
    words = f"{module}.{getattr(code, '__qualname__', type(code).__qualname__)}"
    words = re.sub("[^a-z0-9]", "", words.lower())
    return next((name for word, name in WORDS.items() if word in words), "")
