"""Features that need a mask, on every attention of ComfyUI's: the same picture.

xformers has no CPU kernels, so its own demands on a mask stand here instead of it, as its documentation has them.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.comfy

from comfy.ldm.modules import attention  # noqa: E402

from dit_toolkit.host import embedded  # noqa: E402
from dit_toolkit.host.accelerate.re_ttention import attach as attach_re_ttention  # noqa: E402
from dit_toolkit.host.accelerate.re_ttention_settings import ReTtention  # noqa: E402
from dit_toolkit.host.accelerate.sparse_attention import SparseAttention  # noqa: E402
from dit_toolkit.host.accelerate.sparse_attention import attach as attach_sparse  # noqa: E402
from dit_toolkit.host.control import freecus  # noqa: E402
from dit_toolkit.models.accelerate.re_ttention import Schedule  # noqa: E402
from dit_toolkit.models.accelerate.sparse_attention import Disc  # noqa: E402
from dit_toolkit.tests.host.tiny import close, controlled, prompt, sample  # noqa: E402


def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
    """xformers' attention over `[B, L, H, d]`, and what it refuses."""
    if attn_bias is not None:
        assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        assert attn_bias.dtype == q.dtype
        assert attn_bias.stride(-1) == 1
        assert attn_bias.stride(-2) % 8 == 0
        assert not attn_bias.isnan().any()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale)
    return out.transpose(1, 2)


@pytest.fixture
def backends(monkeypatch):
    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(attention, "xformers", SimpleNamespace(ops=ops), raising=False)
    names = ("basic", "split", "sub_quad", "pytorch", "xformers")
    found = {name: getattr(attention, f"attention_{name}") for name in names}
    found["sub_quad in chunks"] = partial(short_of_memory, found["sub_quad"])
    return found


def short_of_memory(attend, *args, **kwargs):
    """As on a device that is nearly full: a few keys at a time."""
    whole = attention.efficient_dot_product_attention

    def in_chunks(*args, **kwargs):
        return whole(*args, **{**kwargs, "kv_chunk_size": 3, "query_chunk_size": 4})

    attention.efficient_dot_product_attention = in_chunks
    try:
        return attend(*args, **kwargs)
    finally:
        attention.efficient_dot_product_attention = whole


def subject(model):
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(20))
    return freecus.attach(model, image, None, embedded.load_vae(), layers="all")


def half_a_condition(model):
    return controlled(model, influence=0.5)


FEATURES = {
    "influence": half_a_condition,
    "FreeCus, which the negative prompt does not see": subject,
    "both": lambda model: half_a_condition(subject(model)),
    "sparse with influence": lambda model: half_a_condition(attach_sparse(model, SparseAttention("test", Disc(2), 0))),
    "Re-ttention with influence": lambda model: half_a_condition(
        attach_re_ttention(model, ReTtention(0.3, Schedule(1, 2), min_tokens=0))
    ),
}
PROMPTS = {
    "two prompts in a batch": {"cfg": 3.0},
    "a prompt for an area": {"positive": prompt() + prompt(5, area=(4, 8, 0, 0), strength=1.0)},
    "a mask of core's own": {"positive": prompt(attention_mask=torch.tensor([[1, 1, 1, 0, 0]]))},
}


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.sweep
def test_the_picture_is_the_same_on_every_backend(tiny_flux, backends, name, case):
    found = {}
    for backend, attend in backends.items():
        model = tiny_flux.clone()

        def override(func, *args, attend=attend, **kwargs):
            return attend(*args, **{key: value for key, value in kwargs.items() if key != "transformer_options"})

        model.model_options["transformer_options"]["optimized_attention_override"] = override
        found[backend] = sample(FEATURES[name](model), 2, **PROMPTS[case])
        assert torch.isfinite(found[backend]).all(), backend
    for latent in found.values():
        close(latent, found["pytorch"], atol=2e-4)
