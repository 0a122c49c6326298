"""DiT4SR's windows in a run: against the definition, beside prompts, areas, ControlNets, caches and other tilers."""

from __future__ import annotations

from itertools import pairwise

import comfy.cldm.mmdit
import comfy.controlnet
import comfy.latent_formats
import comfy.model_management
import comfy.ops
import comfy.samplers
import comfy.utils
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.comfy

from dit_toolkit.host.families import sd3  # noqa: E402
from dit_toolkit.host.restore import dit4sr_run  # noqa: E402
from dit_toolkit.host.tiles import TILES, Tile  # noqa: E402
from dit_toolkit.models.restore.dit4sr_tiles import weights, windows  # noqa: E402
from dit_toolkit.tests.host.families import weight  # noqa: E402
from dit_toolkit.tests.host.restore.tiny_dit4sr import (  # noqa: E402
    OVERLAP,
    POOLED,
    SIDE,
    TEXT,
    TILE,
    base,
    close,
    latent,
    prompt,
    published,
    restored,
    sample,
)
from dit_toolkit.tests.models.restore import dit4sr_reference as reference  # noqa: E402

SIZE = (12, 20)  # 2 x 4 windows
LR = latent(12, SIZE)
SD3 = comfy.latent_formats.SD3()


def tiled(**settings):
    return restored(**{"lr": LR, **settings})


class Calls:
    """Each call of the transformer, while ComfyUI samples."""

    def __init__(self, monkeypatch):
        self.calls: list[dict] = []
        transformer, forward = base().model.diffusion_model, base().model.diffusion_model.forward

        def watched(x, t, **rest):
            self.calls.append({"x": x.clone(), **rest})
            return forward(x, t, **rest)

        monkeypatch.setattr(transformer, "forward", watched)

    @property
    def shapes(self):
        return [tuple(call["x"].shape) for call in self.calls]


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def blended(x: Tensor, lr: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    """The velocity of a picture, window by window, by the definitions of both."""
    total, weight = torch.zeros_like(x), torch.zeros(x.shape[-2:])
    for window in windows((x.shape[-2], x.shape[-1]), TILE, OVERLAP):
        part = reference.transformer(
            published(), "r1", window.of(x), window.of(SD3.process_in(lr)), 1000 * sigma, text, pooled
        )
        share = weights(window.height, window.width)
        window.of(total).add_(part * share)
        window.of(weight).add_(share)
    return total / weight


def test_tiles_are_blended_as_the_definition_says():
    """Euler by hand: the velocity is blended before the prompts are combined, in every step on one noise field."""
    noise, cfg = latent(7, SIZE), 4.0
    out = sample(tiled(), 2, noise=noise, cfg=cfg)
    prompts = [(text, values["pooled_output"]) for ((text, values),) in (prompt(), prompt(4))]
    schedule = comfy.samplers.calculate_sigmas(base().get_model_object("model_sampling"), "normal", 2)
    x = schedule[0] * noise + (1 - schedule[0]) * SD3.process_in(torch.zeros_like(noise))
    for now, then in pairwise(schedule):
        positive, negative = (blended(x, LR, now[None], *each) for each in prompts)
        x = x + (then - now) * (negative + cfg * (positive - negative))
    close(out, SD3.process_out(x), 1e-4)


@pytest.mark.parametrize("batch", [2, 3, 8, 50])
def test_tiles_side_by_side_are_those_one_after_the_other(calls, batch):
    """8 windows and two prompts."""
    one_by_one = sample(tiled(), 1, size=SIZE, cfg=3.0)
    assert calls.shapes == [(2, 16, 8, 8)] * 8
    calls.calls.clear()
    close(sample(tiled(tile_batch=batch), 1, size=SIZE, cfg=3.0), one_by_one)
    expected = [2 * min(batch, 8 - done) for done in range(0, 8, batch)]
    assert [shape[0] for shape in calls.shapes] == expected


def test_calls_for_tiles_say_which_prompt_each_row_is_of(calls):
    """For whoever reads it there: as many entries as the batch has prompts, for every window."""
    sample(tiled(tile_batch=3), 1, size=SIZE, cfg=3.0)
    options = calls.calls[0]["transformer_options"]
    assert options["cond_or_uncond"] == [1, 0] * 3
    assert options["uuids"] == options["uuids"][:2] * 3
    assert [tile[:2] for tile in options[TILES]] == [(0, 0), (0, 0), (0, 4), (0, 4), (0, 8), (0, 8)]
    text = calls.calls[0]["context"]
    assert torch.equal(text[:2], text[2:4])
    assert not torch.equal(text[0], text[1])


def test_no_call_is_larger_than_its_tiles(calls):
    sample(tiled(tile_batch=2), 1, size=SIZE, cfg=3.0)
    assert {shape[-2:] for shape in calls.shapes} == {(TILE, TILE)}
    assert max(shape[0] for shape in calls.shapes) == 4


def test_a_picture_of_one_window_is_not_cut(calls):
    whole = sample(restored(tile=0), cfg=3.0)
    calls.calls.clear()
    assert torch.equal(sample(restored(tile=TILE), cfg=3.0), whole)
    assert TILES not in calls.calls[0]["transformer_options"]


def test_tiles_differ_from_one_piece_and_from_each_other():
    """Each window has positions of its own."""
    pieces, tiles = sample(tiled(tile=0), size=SIZE), sample(tiled(), size=SIZE)
    assert (pieces - tiles).abs().mean() > 0.01
    assert (sample(tiled(overlap=2), size=SIZE) - tiles).abs().mean() > 0.001


def test_a_batch_of_pictures_in_tiles():
    lr, noise = latent(30, SIZE, 2), latent(7, SIZE, 2)
    both = sample(tiled(lr=lr, tile_batch=3), noise=noise, cfg=3.0)
    for i in range(2):
        close(sample(tiled(lr=lr[i : i + 1]), noise=noise[i : i + 1], cfg=3.0), both[i : i + 1])


def test_prompts_of_two_lengths_are_cut_each_for_itself(calls):
    out = sample(tiled(), 1, size=SIZE, cfg=3.0, negative=prompt(4, length=9))
    assert calls.shapes == [(1, 16, 8, 8)] * 16
    assert out.isfinite().all()


# Beside other nodes


def area(top: int, left: int, height: int, width: int, seed: int = 5) -> list:
    """A prompt for an area, in cells."""
    return prompt(seed, area=(height, width, top, left))


def test_an_area_sees_its_part_of_the_picture(calls, monkeypatch):
    seen = []
    init = dit4sr_run.Stream.__init__

    def watched(self, settings, base, control, found):
        seen.append(found)
        init(self, settings, base, control, found)

    monkeypatch.setattr(dit4sr_run.Stream, "__init__", watched)
    sample(tiled(tile=0), 1, size=SIZE, positive=[*prompt(), *area(4, 8, 8, 12)])
    found = {tuple(each.shape[-2:]): each for each in seen}
    assert torch.equal(found[(8, 12)], LR[..., 4:12, 8:20])
    assert torch.equal(found[SIZE], LR)


def test_two_areas_side_by_side_in_a_batch_see_their_own_parts(monkeypatch):
    seen = []
    init = dit4sr_run.Stream.__init__

    def watched(self, settings, base, control, found):
        seen.append(found)
        init(self, settings, base, control, found)

    monkeypatch.setattr(dit4sr_run.Stream, "__init__", watched)
    sample(tiled(tile=0), 1, size=SIZE, positive=[*area(0, 0, 8, 8), *area(4, 12, 8, 8, seed=6)])
    (both,) = seen
    parts = {tuple(each.flatten()[:4].tolist()) for each in both}
    assert parts == {tuple(LR[0, :, t : t + 8, w : w + 8].flatten()[:4].tolist()) for t, w in ((0, 0), (4, 12))}


def test_a_large_area_is_cut_into_tiles_at_its_place(calls):
    sample(tiled(), 1, size=SIZE, positive=area(2, 4, 10, 16))
    tiles = [call["transformer_options"][TILES][0] for call in calls.calls]
    assert tiles[0] == Tile(2, 4, SIZE)
    assert tiles[-1] == Tile(4, 12, SIZE)


def covering(seed: int, mask: Tensor) -> list:
    ((text, values),) = prompt(seed)
    return [[text, {**values, "mask": mask, "mask_strength": 1.0}]]


def test_masks_are_left_to_core():
    """Two prompts with masks that cover the picture between them; and a mask of what may change."""
    half = torch.zeros(1, *SIZE)
    half[..., : SIZE[1] // 2] = 1
    masked = [*covering(3, half), *covering(5, 1 - half)]
    out = sample(tiled(), size=SIZE, positive=masked, cfg=3.0)
    assert out.isfinite().all()
    alike = [*covering(3, half), *covering(3, 1 - half)]
    close(sample(tiled(), size=SIZE, positive=alike), sample(tiled(), size=SIZE))
    kept = sample(tiled(), size=SIZE, mask=half[:, None])
    empty = SD3.process_out(torch.zeros_like(kept))
    close(kept[..., SIZE[1] // 2 :], empty[..., SIZE[1] // 2 :])
    assert (kept - empty)[..., : SIZE[1] // 2].abs().mean() > 0.1


def controlled() -> list:
    """A prompt with a ControlNet of SD3, of two random blocks, as core's nodes apply it.

    Core's ControlNet loads again what was loaded, and stumbles over models that other tests have left and let go.
    """
    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [each for each in loaded if not each.is_dead()]
    context = {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 192}}
    network = comfy.cldm.mmdit.ControlNet(
        num_blocks=2, depth=3, control_latent_channels=16, in_channels=16, input_size=None, adm_in_channels=POOLED,
        context_embedder_config=context, num_patches=SIDE**2, pos_embed_max_size=SIDE, qk_norm="rms",
        operations=comfy.ops.disable_weight_init, dtype=torch.float32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    network.load_state_dict({k: weight(k, v.shape, 0.7, generator) for k, v in network.state_dict().items()})
    control = comfy.controlnet.ControlNet(
        network, compression_ratio=1, latent_format=SD3, load_device=torch.device("cpu"), manual_cast_dtype=None
    )
    hint = torch.rand(1, 3, 8 * SIZE[0], 8 * SIZE[1], generator=generator)
    control.set_cond_hint(hint, 1.0, (0.0, 1.0), vae=Vae())
    return prompt(control=control, control_apply_to_uncond=False)


class Vae:
    """8 pixels to one latent pixel, 16 channels."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        return torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8).repeat(1, 6, 1, 1)[:, :16]


def test_what_a_controlnet_adds_goes_with_the_tiles(calls):
    """It looks at the whole picture once, and each window gets its part of that."""
    sample(tiled(tile=0), 1, size=SIZE, positive=controlled())
    whole = calls.calls.pop()["control"]["output"]
    assert {each.shape for each in whole} == {(1, SIZE[0] * SIZE[1] // 4, 192)}
    out = sample(tiled(tile_batch=3), 1, size=SIZE, positive=controlled())
    assert (out - sample(tiled(), 1, size=SIZE)).abs().mean() > 0.01
    found = windows(SIZE, TILE, OVERLAP)
    for number, call in enumerate(calls.calls[:3]):
        for added, all_of_it in zip(call["control"]["output"], whole, strict=True):
            grid = all_of_it.view(SIZE[0] // 2, SIZE[1] // 2, 192)
            for window, part in zip(found[3 * number :], added, strict=False):
                rows, columns = (slice(start // 2, start // 2 + 4) for start in (window.top, window.left))
                close(part, grid[rows, columns].reshape(16, 192), 1e-6)


def test_a_controlnet_acts_in_one_piece_too():
    one = sample(restored(tile=0, lr=LR), size=SIZE, positive=controlled())
    assert (one - sample(restored(tile=0, lr=LR), size=SIZE)).abs().mean() > 0.01


def test_what_adds_something_else_to_the_tokens_is_refused_in_tiles():
    transformer, parts = base().model.diffusion_model, windows(SIZE, 8, 4)
    cut = sd3.control_of_parts({"output": [None, torch.zeros(1, 60, 4)]}, transformer, SIZE, parts)
    assert [None if each is None else each.shape for each in cut["output"]] == [None, (8, 16, 4)]
    with pytest.raises(ValueError, match=r"cannot cut what a ControlNet adds into tiles: .* set 'tile' to 0"):
        sd3.control_of_parts({"output": [torch.zeros(1, 7, 4)]}, transformer, SIZE, parts)


def tiled_by_another(model, size=(8, 8), shift=(0, 0)):
    """As TiledDiffusion does: crops of the latent, several in one batch, nothing said of where they lie."""
    patched = model.clone()

    def wrapper(apply_model, kwargs):
        x, t, c = kwargs["input"], kwargs["timestep"], kwargs["c"]
        out = torch.zeros_like(x)
        rolled = x.roll(shift, (2, 3))
        for top in range(0, x.shape[2], size[0]):
            for left in range(0, x.shape[3], size[1]):
                part = (..., slice(top, top + size[0]), slice(left, left + size[1]))
                out[part] = apply_model(rolled[part], t, **c)
        return out.roll((-shift[0], -shift[1]), (2, 3))

    patched.set_model_unet_function_wrapper(wrapper)
    return patched


def test_tiles_of_another_node_see_their_own_parts():
    """Ours without overlap, in the same places."""
    size = (16, 16)
    lr = latent(12, size)
    ours = sample(restored(lr=lr, overlap=0), size=size, cfg=3.0)
    theirs = sample(tiled_by_another(restored(lr=lr, tile=0)), size=size, cfg=3.0)
    close(theirs, ours)


def test_large_tiles_of_another_node_are_cut_again_at_their_place(calls):
    size = (16, 16)
    sample(tiled_by_another(restored(lr=latent(12, size)), (16, 8)), 1, size=size)
    places = [call["transformer_options"][TILES][0][:2] for call in calls.calls]
    assert places == [(0, 0), (4, 0), (8, 0), (0, 8), (4, 8), (8, 8)]


def test_tiles_of_another_node_whose_place_is_unknown_are_refused():
    size = (16, 16)
    with pytest.raises(ValueError, match="another node cuts the picture into tiles, and does not tell where they lie"):
        sample(tiled_by_another(restored(lr=latent(12, size)), shift=(3, 5)), size=size)


# Progress and interrupts


def test_progress_goes_from_tile_to_tile():
    shown = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: shown.append(value / total))
    try:
        sample(tiled(), 3, size=SIZE)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert shown == sorted(shown)
    assert len(shown) >= 24
    assert shown[0] == pytest.approx(1 / 24)
    assert shown[-1] == 1


def test_progress_counts_the_calls_of_a_step():
    """Two prompts of two lengths: two calls of 8 windows each. How many there are is known from the second step on."""
    shown = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: shown.append(value / total))
    try:
        sample(tiled(), 3, size=SIZE, cfg=3.0, negative=prompt(4, length=9))
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    later = [value for value in shown if value > 1 / 3 + 1e-6]
    assert later == sorted(later)
    assert shown[-1] == 1


def test_an_interrupt_between_tiles_stops_the_run(calls):
    model = tiled()
    expected = sample(model, 2, size=SIZE)
    calls.calls.clear()
    comfy.utils.set_progress_bar_global_hook(lambda *_, **__: comfy.model_management.interrupt_current_processing())
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(model, 2, size=SIZE)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls.calls) == 1
    assert torch.equal(sample(model, 2, size=SIZE), expected)
