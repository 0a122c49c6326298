"""Train LoRA of ComfyUI, run as it is, computes the gradients that plain autograd computes on an out-of-place model."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy.conds import CONDRegular
from comfy.model_patcher import ModelPatcher
from comfy_extras import nodes_train
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss

from dit_toolkit.host.control import training
from dit_toolkit.tests.host import tiny
from dit_toolkit.tests.host.families import FAMILIES, RELATIVES, sample
from dit_toolkit.training import flux as plain

pytestmark = pytest.mark.comfy

RANK = 2
CHECKPOINTS = pytest.mark.parametrize("depth", [0, 1, 2, 3], ids=["no checkpoints", "depth 1", "depth 2", "depth 3"])


@pytest.fixture(scope="module", autouse=True)
def unloaded():
    """The models that training made are dropped before ComfyUI is."""
    yield
    comfy.model_management.unload_all_models()
    gc.collect()


@dataclass
class Trained:
    """One step of Train LoRA: weights of the LoRA, their gradients, and what the step was computed from."""

    lora: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    passes: list[tuple[Tensor, Tensor, Tensor, list[int]]]  # sigmas, noise, latents, numbers of the pictures


def train(monkeypatch, model, latents: list[Tensor], positive: list, depth: int = 0, **chosen) -> Trained:
    """One step of ComfyUI's node from a random LoRA. The optimizer notes the gradients and leaves the weights."""
    seen: dict[str, Any] = {}
    passes = []

    class Noting(torch.optim.SGD):
        def step(self, closure=None):
            seen["gradients"] = [None if w.grad is None else w.grad.clone() for w in self.param_groups[0]["params"]]

    def optimizer(_, weights, lr):
        weights = list(weights)
        generator = torch.Generator().manual_seed(5)
        for weight in weights:
            if weight.requires_grad:
                weight.data = torch.randn(weight.shape, generator=generator).to(weight) * 0.1
        return Noting(weights, lr=lr)

    def watched(self, model_wrap, sigmas, noise, latent, cond, pictures, *args, **kwargs):
        passes.append((sigmas.detach().clone().float(), noise.clone().float(), latent.clone().float(), pictures))
        return step(self, model_wrap, sigmas, noise, latent, cond, pictures, *args, **kwargs)

    step = nodes_train.TrainSampler.fwd_bwd
    settings = {"batch_size": len(latents), "grad_accumulation_steps": 1, "steps": 1, "learning_rate": 0.1,
                "rank": RANK, "optimizer": "SGD", "loss_function": "MSE", "seed": 0, "training_dtype": "fp32",
                "lora_dtype": "fp32", "quantized_backward": False, "algorithm": "LoRA",
                "gradient_checkpointing": depth > 0, "checkpoint_depth": max(depth, 1), "offloading": False,
                "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False} | chosen  # fmt: skip
    monkeypatch.setattr(nodes_train, "_create_optimizer", optimizer)
    monkeypatch.setattr(nodes_train.TrainSampler, "fwd_bwd", watched)
    torch.manual_seed(3)
    with torch.inference_mode():  # as ComfyUI runs every node
        inputs = {name: [value] for name, value in settings.items()} | {
            "model": [model],
            "latents": [{"samples": latent.clone()} for latent in latents],
            "positive": [[[text.clone(), about]] for text, about in positive],
        }
        lora = nodes_train.TrainLoraNode.execute(**inputs).args[0]
    monkeypatch.undo()
    lora = {name: weight.float().clone().requires_grad_() for name, weight in lora.items()}
    return Trained(lora, dict(zip(lora, seen["gradients"], strict=True)), passes)


def prepared(load: Callable[[], ModelPatcher]) -> ModelPatcher:
    """A model that Train LoRA can load once more for itself, as those of core's loaders, and the node on it."""
    model = load()
    model.cached_patcher_init = (lambda disable_dynamic: load(), ())
    return training.attach(model)


def expected(tiny_state, step: Trained, positive: list) -> dict[str, Tensor]:
    """Gradients of the LoRA's weights by plain autograd: the LoRA is added to the weights of a plain-torch FLUX.1."""
    size = plain.Size(live=16, hidden=tiny.HIDDEN, double=2, single=2, text_dim=tiny.TEXT, pooled_dim=tiny.POOLED)
    model = plain.Flux(size)
    model.load_state_dict(tiny_state)
    weights = dict(model.named_parameters())
    for name in list(weights):
        at, _, kind = name.rpartition(".")
        of = f"diffusion_model.{at}"
        if kind == "bias" and f"{of}.diff_b" in step.lora:
            weights[name] = weights[name] + step.lora[f"{of}.diff_b"]
        elif f"{of}.diff" in step.lora:
            weights[name] = weights[name] + step.lora[f"{of}.diff"]
        elif f"{of}.lora_up.weight" in step.lora:
            up, down = step.lora[f"{of}.lora_up.weight"], step.lora[f"{of}.lora_down.weight"]
            weights[name] = weights[name] + up @ down * step.lora[f"{of}.alpha"].detach() / RANK
    losses = []
    for sigmas, noise, latent, numbers in step.passes:
        for own, number in enumerate(numbers):  # one by one: texts may differ in length
            (text, about), one = positive[number], slice(own, own + 1)
            sigma = sigmas[one].view(1, 1, 1, 1)
            x = sigma * noise[one] + (1 - sigma) * latent[one]
            given = (x, sigmas[one], text, about["pooled_output"], torch.tensor([about["guidance"]]))
            velocity = torch.func.functional_call(model, weights, given)
            losses.append(mse_loss(x - sigma * velocity, latent[one]))
    loss = torch.stack(losses).mean()
    names = [name for name, weight in step.lora.items() if not name.endswith("alpha")]
    return dict(zip(names, torch.autograd.grad(loss, [step.lora[name] for name in names]), strict=True))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a.flatten().double(), b.flatten().double(), 0))


@pytest.fixture
def flux(tiny_state) -> ModelPatcher:
    return prepared(lambda: tiny.load_flux(tiny_state))


def agree(step: Trained, reference: dict[str, Tensor], least: float = 0.9999) -> None:
    for name, gradient in reference.items():
        found = step.gradients[name]
        assert found is not None, name
        assert cosine(found, gradient) > least, (name, cosine(found, gradient))
        assert found.norm() / gradient.norm() == pytest.approx(1, rel=0.02 if least < 0.9999 else 1e-3), name


def captions(*lengths: int) -> list:
    """A text of its own for each picture."""
    return [tiny.prompt(20 + i, length, guidance=2.0 + i)[0] for i, length in enumerate(lengths)]


def pictures(count: int) -> list[Tensor]:
    return [tiny.latent(30 + i) for i in range(count)]


@CHECKPOINTS
@pytest.mark.parametrize("bypass", [False, True], ids=["weights", "bypass"])
def test_gradients_are_those_of_plain_autograd(monkeypatch, flux, tiny_state, depth, bypass):
    texts = captions(5, 5, 5)
    step = train(monkeypatch, flux, pictures(3), texts, depth, bypass_mode=bypass)
    agree(step, expected(tiny_state, step, texts))


@pytest.mark.parametrize("depth", [2, 3])
def test_with_offloading_every_weight_gets_its_gradient(monkeypatch, flux, tiny_state, depth):
    """Checkpoints of single layers: the first to read the text, the guidance and the pooled text are among them."""
    texts = captions(5, 5)
    step = train(monkeypatch, flux, pictures(2), texts, depth, offloading=True)
    agree(step, expected(tiny_state, step, texts))


def test_texts_of_different_lengths_are_computed_apart(monkeypatch, flux, tiny_state, caplog):
    texts = captions(5, 7, 5)
    with caplog.at_level("INFO"):
        step = train(monkeypatch, flux, pictures(3), texts, 2, steps=2)
    assert caplog.text.count("Captions of a batch differ in length") == 1
    step.passes = step.passes[1:]  # gradients are noted at the last of the two steps
    agree(step, expected(tiny_state, step, texts))


def test_pictures_of_different_sizes(monkeypatch, flux, tiny_state):
    texts = captions(5, 5, 5)
    step = train(monkeypatch, flux, [*pictures(2), tiny.latent(40, size=(8, 4))], texts, 2)
    assert len(step.passes) == 3
    agree(step, expected(tiny_state, step, texts))


def test_buckets(monkeypatch, flux, tiny_state):
    """Two sizes of two pictures each; a batch is drawn from one of them."""
    texts = captions(5, 5, 5, 5)
    buckets = [torch.cat(pictures(2)), tiny.latent(40, size=(8, 4), batch=2)]
    step = train(monkeypatch, flux, buckets, texts, 2, bucket_mode=True, batch_size=2)
    assert len(step.passes[0][3]) == 2
    agree(step, expected(tiny_state, step, texts))


def test_weights_in_fp8(monkeypatch, tiny_state):
    rounded = {name: weight.to(torch.float8_e4m3fn).float() for name, weight in tiny_state.items()}
    model = prepared(lambda: tiny.load_flux(tiny_state, dtype=torch.float8_e4m3fn))
    texts = captions(5, 5)
    step = train(monkeypatch, model, pictures(2), texts, 2)
    agree(step, expected(rounded, step, texts))


def test_autocast_to_bfloat16_is_close(monkeypatch, flux, tiny_state):
    """Smallest cosine measured: 0.9997, with float32 weights under autocast."""
    texts = captions(5, 5, 5)
    step = train(monkeypatch, flux, pictures(3), texts, 2, training_dtype="none")
    agree(step, expected(tiny_state, step, texts), least=0.999)


def test_in_bfloat16_checkpoints_change_nothing(monkeypatch, flux):
    """Rounding is the same both times, so the gradients are too. A stream that was overwritten would show."""
    kept, again = (train(monkeypatch, flux, pictures(3), captions(5, 5, 5), d, training_dtype="bf16") for d in (0, 2))
    for name, gradient in kept.gradients.items():
        if gradient is not None:
            torch.testing.assert_close(again.gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", ["chroma", "hunyuan_video", "flux2"])
def test_relatives_that_add_in_place_train_with_and_without_checkpoints(monkeypatch, name):
    """Autograd itself refuses a value that was overwritten, where nothing is computed a second time."""
    family = (FAMILIES | RELATIVES)[name]
    model = prepared(family.load.__wrapped__)
    latents = [torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    texts = [family.prompt(20 + i)[0] for i in range(2)]
    kept, again = (train(monkeypatch, model, latents, texts, depth) for depth in (0, 2))
    for of, gradient in kept.gradients.items():
        if gradient is not None:
            torch.testing.assert_close(again.gradients[of], gradient, rtol=1e-4, atol=1e-6, msg=of)


class Look:
    """A sampler that asks once for what the model makes of `x` at `sigma` under the conditions it was given."""

    def __init__(self, x: Tensor, sigma: Tensor):
        self.x, self.sigma, self.denoised = x, sigma, x

    def sample(self, model_wrap, sigmas, extra_args, *_):
        self.denoised = model_wrap(self.x, self.sigma, **extra_args)
        return self.x

    def max_denoise(self, *_):
        return True


def looked(model, x: Tensor, sigma: Tensor, texts: list) -> Tensor:
    guider, sampler = nodes_train.TrainGuider(model), Look(x, sigma)
    guider.set_conds(texts)
    with torch.no_grad():
        guider.sample(torch.zeros_like(x), torch.zeros_like(x), sampler, sigma, seed=0)
    return sampler.denoised


@pytest.mark.parametrize("name", sorted({*FAMILIES, *RELATIVES} - {"ltx"}))
def test_every_picture_of_a_batch_gets_its_own_caption(monkeypatch, name):
    family = (FAMILIES | RELATIVES)[name]
    monkeypatch.setattr(comfy.model_management, "in_training", True)
    model = training.attach(family.load())
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(3))
    sampling = model.get_model_object("model_sampling")
    sigma = torch.tensor([float(sampling.percent_to_sigma(at)) for at in (0.2, 0.5)])
    texts = [family.prompt(20)[0], family.prompt(21)[0]]
    together = looked(model, x, sigma, texts)
    alone = torch.cat([looked(model, x[i : i + 1], sigma[i : i + 1], texts[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    swapped = looked(model, x, sigma, texts[::-1])
    assert (swapped - together).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["flux", "chroma", "sd35", "flux2"])
def test_outside_of_training_it_is_no_node(name):
    family = (FAMILIES | RELATIVES)[name]
    batch = {"batch": 2, "cfg": 3.0, "positive": [*family.prompt(3), *family.prompt(5)]}
    assert torch.equal(sample(family, training.attach(family.load()), 2, **batch), sample(family, None, 2, **batch))


def test_after_training_nothing_is_left(monkeypatch, flux):
    before = tiny.sample(flux)
    train(monkeypatch, flux, pictures(1), captions(5), 1)
    assert torch.equal(tiny.sample(flux), before)


def test_models_whose_blocks_overwrite_in_other_ways_are_refused():
    with pytest.raises(ValueError, match="cannot prepare LTXV: its blocks overwrite"):
        training.attach(FAMILIES["ltx"].load())


def test_conditions_that_ask_for_a_place_or_a_time_run_by_themselves():
    plain_one, other = ({"model_conds": {"c": CONDRegular(torch.zeros(1, 2, 3))}} for _ in range(2))
    assert training.grouped([plain_one, other]) == [[0, 1]]
    assert training.grouped([plain_one, {**other, "timestep_start": 0.5}, other]) == [[0, 2], [1]]
    assert training.grouped([plain_one, {"model_conds": {}}]) == [[0], [1]]


def test_captions_that_do_not_match_the_pictures_are_named(monkeypatch, flux):
    monkeypatch.setattr(comfy.model_management, "in_training", True)
    with pytest.raises(RuntimeError, match="2 captions for 3 pictures"):
        looked(flux, tiny.latent(batch=3), torch.full((3,), 0.5), captions(5, 5))
