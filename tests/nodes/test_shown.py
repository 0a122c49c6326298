"""The condition as the model sees it, on the node: after each run of the node, and of FreeCus when a sampler has it."""

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.comfy

from dit_toolkit.host import embedded, preview  # noqa: E402
from dit_toolkit.host.control.easycontrol import prepare_image  # noqa: E402
from dit_toolkit.host.run import attached  # noqa: E402
from dit_toolkit.nodes.easycontrol import ApplyEasyControl  # noqa: E402
from dit_toolkit.nodes.freecus import ApplyFreeCus  # noqa: E402
from dit_toolkit.nodes.try_on import TryOnPrepare  # noqa: E402
from dit_toolkit.tests.host import tiny  # noqa: E402
from dit_toolkit.tests.nodes.calling import executed, shown_by  # noqa: E402

STEP = 1 / 255


def pictures(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(5))


def controlled(model, file, **values):
    image = {} if "latent" in values else {"image": pictures(2, 40, 72)}
    given = {"model": model, "easycontrol": file, "vae": embedded.load_vae(), "kind": "subject", "condition_size": 64}
    return executed(ApplyEasyControl, **{**given, **image, **values})


def test_easycontrol_shows_the_batch_resized_and_padded(tiny_flux, file):
    seen = shown_by(controlled(tiny_flux, file, pad_color="black"))
    assert torch.allclose(seen, prepare_image(pictures(2, 40, 72), "subject", 64, "black").clamp(0, 1), atol=STEP)
    assert seen.shape == (2, 64, 64, 3)
    assert not seen[:, 0].any()  # the padding


def test_easycontrol_shows_nothing_where_it_has_no_picture(tiny_flux, file):
    assert shown_by(controlled(tiny_flux, file, strength=0.0)) is None
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    assert shown_by(controlled(tiny_flux, file, latent=latent, vae=None)) is None


def test_try_on_shows_the_masked_person_and_the_garments():
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    given = {"person": pictures(1, 64, 64), "mask": mask, "garment": pictures(2, 32, 32), "size": "fixed"}
    output = executed(TryOnPrepare, **given, width=48, height=64)
    person, garments, *_ = output.args
    assert torch.allclose(shown_by(output), torch.cat([person, garments]), atol=STEP)


def freed(model, **values):
    mask = torch.zeros(1, 64, 128)
    mask[:, :, 48:80] = 1
    given = {"model": model, "vae": embedded.load_vae(), "reference": pictures(1, 64, 128), "subject": mask}
    return executed(ApplyFreeCus, **{**given, **values})


def test_freecus_shows_what_the_mask_takes_at_once(tiny_flux):
    seen, given = shown_by(freed(tiny_flux)), pictures(1, 64, 128)
    assert torch.allclose(seen[:, :, 48:80], given[:, :, 48:80], atol=STEP)
    assert torch.allclose(seen[:, :, :48], given[:, :, :48] / 4, atol=STEP)


def test_freecus_shows_what_the_sampler_gave_the_model(tiny_flux, monkeypatch):
    """Cut to the picture's square, and dark but for the subject's tokens of 16 pixels. Once: nothing has changed."""
    sent = []
    monkeypatch.setattr("dit_toolkit.nodes.freecus.show_picture", lambda node, picture: sent.append((node, picture)))
    model = freed(tiny_flux).args[0]
    size = tiny.sample(model, 1).shape[-1] * 8
    tiny.sample(model, 1)
    ((node, picture),) = sent
    assert node == "12"
    assert picture.shape == (1, size, size, 3)
    (settings,) = attached(model)
    plain = settings.reference.picture(size // 8, size // 8)
    ratio = (picture.sum() / plain.sum()).item()
    assert 0.25 < ratio < 1
    share = picture[0, ::16, ::16].sum(-1) / plain[0, ::16, ::16].sum(-1)
    assert {round(value, 3) for value in share.flatten().tolist()} == {0.25, 1.0}


def test_without_a_page_nobody_is_told():
    preview.show_picture(None, pictures(1, 8, 8))
    preview.show_picture("12", pictures(1, 8, 8))
