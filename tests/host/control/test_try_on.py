"""Try-on on a tiny FLUX.1, sampled by ComfyUI itself: what two branches add to a condition image."""

from __future__ import annotations

import copy
import logging

import comfy.ldm.flux.model
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_custom_sampler import Guider_DualModel
from safetensors.torch import save_file

from dit_toolkit.host.control import try_on, try_on_files
from dit_toolkit.host.control.conditions_run import Encoder
from dit_toolkit.host.control.try_on_files import TryOnFile
from dit_toolkit.models.control.mc_vton import BranchLora, layers
from dit_toolkit.models.control.mc_vton_keys import Branch, Checkpoint, Settings, parse, write, write_metadata
from dit_toolkit.tests.host.control.dense_flux import Image, grid, random_transformer, velocity
from dit_toolkit.tests.host.tiny import (
    DOUBLE,
    HIDDEN,
    SINGLE,
    WIDE,
    close,
    flux_state,
    latent,
    load_flux,
    prompt,
    sample,
)

pytestmark = pytest.mark.comfy

PERSON, GARMENT = latent(20, (8, 8)), latent(21, (8, 6))


SCALES = {name: (0.25, 1.0, 1.75)[i % 3] for i, name in enumerate(layers(DOUBLE, SINGLE))}


def random_branch(seed, size=1.0, ranks=None, scales=None, hidden=HIDDEN) -> Branch:
    """Every layer of the image stream, strong enough to show. `scales`: alpha / rank, by layer."""
    ranks = ranks or dict.fromkeys(layers(DOUBLE, SINGLE), 4)
    lora = BranchLora(hidden, DOUBLE, SINGLE, ranks, scales, operations=torch.nn)
    generator = torch.Generator().manual_seed(seed)
    for weight in lora.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.5 * size / weight.shape[-1] ** 0.5
    return lora.branch()


def checkpoint(person=1, garment=2, size=1.0, scales=None, hidden=HIDDEN, **settings) -> Checkpoint:
    """Seeds of the branches; None leaves one out."""
    seeds = {"person": person, "garment": garment}
    branches = {
        name: random_branch(seed, size, None, scales, hidden) for name, seed in seeds.items() if seed is not None
    }
    return Checkpoint(branches, hidden, 4 * hidden, DOUBLE, SINGLE, Settings(**settings))


def file_of(*args, **options) -> TryOnFile:
    return TryOnFile("random.safetensors", checkpoint(*args, **options))


@pytest.fixture(scope="module")
def file() -> TryOnFile:
    return file_of()


def dressed(model, file, person=PERSON, garment=GARMENT, **settings):
    return try_on.attach(model, file, person, garment, **settings)


def keys_of(monkeypatch, model, **options):
    """Keys and values of each image, by its class, in a run of one step."""
    found, encode = {}, Encoder.encode

    def watched(self, *given):
        found[type(self.settings).__name__] = encode(self, *given)
        return found[type(self.settings).__name__]

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", watched)
        sample(model, 1, **options)
    return found


def same_keys(a, b) -> bool:
    return all(torch.equal(x, y) for block in a for x, y in zip(a[block], b[block], strict=True))


def test_a_branch_of_strength_0_is_away(tiny_flux, file, encodings):
    alone = sample(dressed(tiny_flux, file, garment_strength=0))
    assert len(encodings) == 1
    assert torch.equal(alone, sample(dressed(tiny_flux, file, garment=latent(31, (8, 6)), garment_strength=0)))
    assert (alone - sample(dressed(tiny_flux, file))).abs().mean() > 0.003


def test_the_garment_lies_where_the_file_or_the_user_says(tiny_flux, file):
    beside, below = (sample(dressed(tiny_flux, file, position=position)) for position in ("beside", "below"))
    assert (beside - below).abs().mean() > 0.001
    assert torch.equal(sample(dressed(tiny_flux, file)), beside)
    assert torch.equal(sample(dressed(tiny_flux, file_of(position="below"))), below)


@pytest.mark.parametrize("cache", ["offload to CPU", "off"])
def test_how_keys_are_kept_does_not_show(tiny_flux, file, cache):
    kept = sample(dressed(tiny_flux, file), cfg=3.0)
    assert torch.equal(sample(dressed(tiny_flux, file, cache=cache), cfg=3.0), kept)


@pytest.mark.parametrize(("cache", "times"), [("on GPU", 2), ("off", 8)])
def test_each_picture_is_encoded_once_per_prompt_and_run(tiny_flux, file, encodings, cache, times):
    model = dressed(tiny_flux, file, cache=cache)
    sample(model, 4)
    assert len(encodings) == times
    sample(model, 4, cfg=3.0)  # two prompts
    assert len(encodings) == 3 * times
    if cache == "on GPU":
        sample(model, 4, sampler="heun")  # asks seven times
        assert len(encodings) == 4 * times


def test_loras_of_zeros_are_plain_tokens_and_so_is_a_missing_branch(tiny_flux):
    zeros = file_of()
    for branch in zeros.checkpoint.branches.values():
        for name, weight in branch.weights.items():
            branch.weights[name] = torch.zeros_like(weight) if ".up." in name else weight
    plain = file_of(person=None)
    assert torch.equal(
        sample(dressed(tiny_flux, zeros, garment_strength=0)), sample(dressed(tiny_flux, plain, garment_strength=0))
    )
    garment_only = sample(dressed(tiny_flux, file_of(person=None)))
    assert (garment_only - sample(dressed(tiny_flux, file_of()))).abs().mean() > 0.003
    assert (garment_only - sample(dressed(tiny_flux, file_of(person=None), person_strength=0))).abs().mean() > 0.003


def test_a_branch_changes_its_own_tokens_only(tiny_flux, monkeypatch):
    one, other = (keys_of(monkeypatch, dressed(tiny_flux, file_of(person=seed))) for seed in (1, 7))
    assert same_keys(one["Garment"], other["Garment"])
    assert not same_keys(one["Person"], other["Person"])
    no_person = keys_of(monkeypatch, dressed(tiny_flux, file_of(), person_strength=0))
    assert same_keys(one["Garment"], no_person["Garment"])
    moved = keys_of(monkeypatch, dressed(tiny_flux, file_of(), garment=latent(31, (8, 6))))
    assert same_keys(one["Person"], moved["Person"])


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_batch_of_garments_on_one_person_is_one_run_each(tiny_flux, file, encodings, cfg):
    noise, garments = latent(7, (8, 8), 3), latent(40, (8, 6), 3)
    together = sample(dressed(tiny_flux, file, garment=garments), noise=noise, cfg=cfg)
    prompts = 1 if cfg == 1 else 2
    assert [source.rows for source in encodings] == [1] * prompts + [3] * prompts  # the person is shared
    alone = [sample(dressed(tiny_flux, file, garment=garments[[i]]), noise=noise[[i]], cfg=cfg) for i in range(3)]
    close(together, torch.cat(alone), atol=1e-4)
    assert (together[0] - together[1]).abs().mean() > 0.003


def test_persons_and_garments_that_do_not_go_together_are_refused(tiny_flux, file):
    persons, garments = latent(41, (8, 8), 2), latent(40, (8, 6), 3)
    with pytest.raises(ValueError, match=r"Got 2 persons and 3 garments\. Give one of either, or as many of both"):
        dressed(tiny_flux, file, persons, garments)
    model = dressed(tiny_flux, file, garment=garments)
    with pytest.raises(ValueError, match=r"Apply Try-On got 3 garment pictures for a batch of 2 pictures\. Give one"):
        sample(model, batch=2)


def merged(transformer, branch: Branch, strength: float):
    """A copy of diffusers' transformer with the branch's LoRA in its weights."""
    whole = copy.deepcopy(transformer)
    state = write(Checkpoint({"person": branch}, WIDE, 4 * WIDE, DOUBLE, SINGLE))
    for name in {key.removeprefix("person.").rsplit(".lora_", 1)[0] for key in state if ".lora_" in key}:
        down, up = (state[f"person.{name}.lora_{letter}.weight"] for letter in "AB")
        alpha = state.get(f"person.{name}.alpha", down.shape[0])
        layer = whole.get_submodule(name)
        layer.weight.data = layer.weight.data + strength * float(alpha) / down.shape[0] * (up @ down)
    return whole


class Branched(Image):
    """A condition whose tokens go through a transformer of their own."""

    def __init__(self, x, ids, transformer):
        super().__init__(x, ids)
        self.transformer = transformer

    def modules(self, model):
        return self.transformer


@pytest.mark.parametrize(
    ("position", "strengths", "scales"),
    [("beside", (1.0, 1.0), None), ("below", (0.7, 1.2), None), ("beside", (1.0, 0.8), SCALES)],
)
def test_it_equals_diffusers_modules_in_one_masked_sequence(position, strengths, scales):
    """Picture and text see both conditions, each condition itself alone; each has its LoRA merged into its weights."""
    diffusers = pytest.importorskip("diffusers")
    transformer = random_transformer(diffusers)
    flux, file = load_flux(transformer.state_dict()), file_of(scales=scales, hidden=WIDE, position=position)
    assert bool(file.checkpoint.branches["person"].alphas) == (scales is not None)
    scaled = flux.model.process_latent_in
    noise, ((text, about),) = latent(7, (8, 12)), prompt()
    person, garment = latent(20, (6, 6)), latent(21, (4, 6))
    lies = grid(4, 6) + torch.tensor([0.0, 0.0, 6.0]) if position == "beside" else grid(4, 6, offset=64.0)
    images = [
        Branched(
            scaled(person),
            grid(6, 6, 4 / 3, 2.0),
            merged(transformer, file.checkpoint.branches["person"], strengths[0]),
        ),
        Branched(scaled(garment), lies, merged(transformer, file.checkpoint.branches["garment"], strengths[1])),
    ]
    guidance = torch.tensor([about["guidance"]])
    expected = velocity(transformer, noise, text, about["pooled_output"], guidance, images)
    plain = velocity(transformer, noise, text, about["pooled_output"], guidance, [])
    model = dressed(flux, file, person, garment, person_strength=strengths[0], garment_strength=strengths[1])
    got = noise - scaled(sample(model, 1, noise=noise))  # one step from 1 to 0 ends at noise - velocity
    assert (expected - plain).abs().mean() > 0.02 * plain.abs().mean()
    close(got, expected)


def test_alpha_in_a_file_scales_its_layer(tiny_flux, tmp_path):
    """A file with alphas is the file without them whose `up` has been multiplied by alpha / rank."""
    made, path = checkpoint(scales=SCALES), str(tmp_path / "alphas.safetensors")
    save_file(write(made), path, write_metadata(made))
    loaded = TryOnFile("alphas", try_on_files.read(path, "alphas"), path)
    assert len(loaded.checkpoint.branches["garment"].alphas) == sum(scale != 1 for scale in SCALES.values())
    folded, bare = checkpoint(), file_of()
    for branch in folded.branches.values():
        for layer, scale in SCALES.items():
            branch.weights[f"{layer}.up.weight"] = branch.weights[f"{layer}.up.weight"] * scale
    out = sample(dressed(tiny_flux, loaded), 1)
    close(out, sample(dressed(tiny_flux, TryOnFile("folded", folded)), 1))
    assert (out - sample(dressed(tiny_flux, bare), 1)).abs().mean() > 0.003


@pytest.mark.parametrize("person", [1, None])
def test_a_guider_with_two_models_dresses_the_one_that_was_asked(tiny_flux, person):
    """Plain tokens have no adapter by which to tell."""
    negative_model = load_flux(flux_state(seed=9))

    def run(model):
        guider = Guider_DualModel(model, negative_model)
        guider.set_conds(prompt(), prompt(4))
        guider.set_cfg(2.0)
        noise = latent(7, (8, 8))
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0])
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)

    file = file_of(person=person)
    gained = run(dressed(tiny_flux, file)) - run(tiny_flux)
    close(gained, 2 * (sample(dressed(tiny_flux, file), 1) - sample(tiny_flux, 1)), atol=1e-4)


def test_half_precision_runs_and_keeps_its_cache_exact(tiny_flux, file):
    model = tiny_flux.clone()
    model.set_model_compute_dtype(torch.bfloat16)
    kept = sample(dressed(model, file), 2)
    assert torch.equal(kept, sample(dressed(model, file, cache="off"), 2))
    exact = sample(dressed(tiny_flux, file), 2)
    assert 0 < (kept - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_one_line_per_picture_says_what_is_kept(tiny_flux, file, caplog):
    with caplog.at_level(logging.INFO):
        sample(dressed(tiny_flux, file))
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Try-On")]
    assert [line.split(",")[0] for line in lines] == [
        "Try-On random.safetensors (person): over",
        "Try-On random.safetensors (garment): beside",
    ]


def test_too_large_a_picture_names_the_knob_that_helps(tiny_flux, file, monkeypatch):
    model = dressed(tiny_flux, file)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, dev: 1)
    with pytest.raises(ValueError, match=r"of Try-On random\.safetensors \(person\) need .* or lower person_size"):
        sample(model)


def test_a_file_may_know_fewer_blocks_than_the_model_has(tiny_flux, tmp_path):
    """Without metadata it counts to the last block it touches. Core can load its adapters again."""
    branch = random_branch(3, ranks={"double_blocks.0.q": 2, "single_blocks.0.out": 3})
    state = write(Checkpoint({"garment": branch}, HIDDEN, 4 * HIDDEN, DOUBLE, SINGLE))
    short = TryOnFile("short.safetensors", parse(state, "short.safetensors"))
    assert (short.checkpoint.double, short.checkpoint.single) == (1, 1)
    out = sample(dressed(tiny_flux, short), 1)
    assert (out - sample(dressed(tiny_flux, file_of(None, None)), 1)).abs().mean() > 1e-4

    path = str(tmp_path / "whole.safetensors")
    save_file(write(checkpoint()), path, write_metadata(checkpoint(fill="black")))
    loaded = TryOnFile("whole", try_on_files.read(path, "whole"), path)
    assert loaded.checkpoint.settings.fill == "black"
    adapter = loaded.adapter("person", (DOUBLE, SINGLE))
    assert adapter is loaded.adapter("person", (DOUBLE, SINGLE))
    factory, arguments = adapter.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True).model.state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in adapter.model.state_dict().items())
    assert torch.equal(sample(dressed(tiny_flux, loaded), 1), sample(dressed(tiny_flux, file_of()), 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"person_strength": float("nan")}, "strength must be a finite number, got nan"),
        ({"position": "above"}, "garment_position must be one of beside, below, got 'above'"),
        ({"cache": "maybe"}, "kv_cache must be one of on GPU, offload to CPU, off"),
        ({"garment": torch.full((1, 16, 4, 4), float("nan"))}, "holds NaN or infinite values"),
        ({"person": torch.zeros(1, 4, 4, 4)}, r"must be \[N, 16, h, w\], got \(1, 4, 4, 4\)"),
    ],
)
def test_what_means_nothing_is_refused_with_a_sentence(tiny_flux, file, change, message):
    with pytest.raises(ValueError, match=message):
        dressed(tiny_flux, file, **change)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((HIDDEN, 4 * HIDDEN, 19, 38), r"made for hidden size 128 and 19\+38 blocks, the model has 128 and 2\+2"),
        ((WIDE, 1024, DOUBLE, SINGLE), r"made for hidden size 256 and 2\+2 blocks, the model has 128"),
        ((HIDDEN, 256, DOUBLE, SINGLE), "made for 256 channels in the MLP, the model has 512"),
    ],
)
def test_a_lora_for_another_model_is_refused(tiny_flux, sizes, message):
    with pytest.raises(ValueError, match=message):
        dressed(tiny_flux, TryOnFile("other", Checkpoint(checkpoint().branches, *sizes)))
