"""DynamiCtrl on ComfyUI's CogVideoX: against the reference, and what becomes of poses on their way."""

from __future__ import annotations

import comfy.ldm.common_dit
import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy.context_windows import (
    IndexListContextHandler,
    create_prepare_sampling_wrapper,
    get_matching_context_schedule,
    get_matching_fuse_method,
)
from comfy.ldm.cogvideo.model import CogVideoXLayerNormZero
from comfy.model_base import BaseModel
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

pytestmark = pytest.mark.comfy

from dit_toolkit.host.animate import dynamictrl, dynamictrl_files  # noqa: E402
from dit_toolkit.host.animate.cogvideox_sampling import mended  # noqa: E402
from dit_toolkit.host.animate.dynamictrl_conditions import with_pose  # noqa: E402
from dit_toolkit.host.animate.dynamictrl_settings import Pose  # noqa: E402
from dit_toolkit.host.families import cogvideox  # noqa: E402
from dit_toolkit.host.families.family import Sizes  # noqa: E402
from dit_toolkit.host.part_of_run import PartOfRun  # noqa: E402
from dit_toolkit.host.transformer import transformer_of  # noqa: E402
from dit_toolkit.models.animate.dynamictrl import PoseNorms  # noqa: E402
from dit_toolkit.models.animate.dynamictrl_keys import comfyui_name, lora_names  # noqa: E402
from dit_toolkit.tests.host import families  # noqa: E402
from dit_toolkit.tests.host.animate.tiny_dynamictrl import (  # noqa: E402
    FRAMES,
    SIZE,
    close,
    latent,
    loaded,
    prompt,
    published,
    sample,
)
from dit_toolkit.tests.models.animate import dynamictrl_reference as reference  # noqa: E402

WITH_TABLE = {"table": True, "heads": 3, "blocks": 2}  # ComfyUI divides the width by three there


class Predictions:
    """What the model is asked and answers in a run."""

    def __init__(self, transformer, monkeypatch):
        self.calls = []
        forward = transformer._forward

        def watched(x, timestep, context, *args, **kwargs):
            out = forward(x, timestep, context, *args, **kwargs)
            self.calls.append((x.clone(), timestep.clone(), context.clone(), out.clone()))
            return out

        monkeypatch.setattr(transformer, "_forward", watched)


def angles_of(transformer, frames, height, width):
    """The rotary positions of ComfyUI's 1.0."""
    if not transformer.use_rotary_positional_embeddings:
        return None
    cos, sin = transformer._get_rotary_emb(height, width, frames, "cpu")
    return torch.atan2(sin, cos)[:, ::2]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize(
    ("version", "sizes"), [("1.5", {}), ("1.0", {}), ("1.0", {"table": True, "heads": 3, "blocks": 2})]
)
def test_the_model_is_that_of_the_definition(monkeypatch, version, sizes, strength, batch):
    """Both guidance branches side by side, in every call of a run."""
    model, weights = loaded(version, **sizes), published(version, **sizes)
    transformer, pose = transformer_of(model), latent(20)
    seen = Predictions(transformer, monkeypatch)
    given = Pose(pose, strength)
    sample(model, 2, positive=prompt(3, pose=given), negative=prompt(4, pose=given), cfg=2.0, batch=batch)
    assert len(seen.calls) == 2
    rotary = angles_of(transformer, FRAMES, *(side // 2 for side in SIZE)) if version == "1.0" else None
    scale = model.model.latent_format.scale_factor
    for x, timestep, context, out in seen.calls:
        assert len(x) == 2 * batch
        poses = (pose * scale).expand(len(x), -1, -1, -1, -1)
        expected = reference.forward(weights, x, context, timestep, poses, strength=strength, angles=rotary)
        without = reference.forward(weights, x, context, timestep, angles=rotary)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        assert (expected - without).abs().mean() > 0.01


# Poses on their way


@pytest.fixture
def embedded(monkeypatch):
    """The pose latents that were made tokens of, call by call."""
    seen, tokens = [], cogvideox.tokens

    def watched(base, latent, text_width):
        seen.append(latent)
        return tokens(base, latent, text_width)

    monkeypatch.setattr(cogvideox, "tokens", watched)
    return seen


@pytest.fixture
def apart(monkeypatch):
    """As where memory is short: one condition at a time."""
    monkeypatch.setattr(BaseModel, "memory_required", lambda *args, **kwargs: 1e18)


def both(pose, other=None, **values):
    return {"positive": prompt(3, pose=pose, **values), "negative": prompt(4, pose=pose if other is None else other)}


def test_branches_of_one_pose_share_its_stream(embedded):
    pose = latent(20)
    sample(loaded(), 2, **both(pose), cfg=2.0)
    assert len(embedded) == 2  # one for each step


def test_branches_in_calls_of_their_own_give_the_same(embedded, apart):
    pose = latent(20)
    out = sample(loaded(), 2, **both(pose), cfg=2.0)
    assert len(embedded) == 4
    close(out, together(pose))


def together(pose, steps=2, **values):
    """The same conditions, side by side, whatever a fixture has done to memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseModel, "memory_required", lambda *args, **kwargs: 0)
        return sample(loaded(), steps, **both(pose), cfg=2.0, **values)


def test_equal_poses_of_two_tensors_are_two_streams_and_give_the_same(embedded):
    """Nobody compares values: that would wait for the GPU."""
    pose = latent(20)
    out = sample(loaded(), 2, **both(pose, pose.clone()), cfg=2.0)
    assert len(embedded) == 4
    assert torch.equal(out, together(pose))


def test_an_ofs_of_a_prompts_own_is_not_shared(embedded):
    pose, ofs = latent(20), torch.tensor([5.0])
    out = sample(loaded(), 1, **both(pose, ofs=ofs), cfg=2.0)
    assert len(embedded) == 2
    same = sample(loaded(), 1, **both(pose, pose.clone(), ofs=ofs), cfg=2.0)
    assert torch.equal(out, same)
    assert not torch.equal(out, together(pose, 1))


@pytest.mark.parametrize("other", [None, 21], ids=["none", "another"])
def test_each_prompt_has_its_own_pose_or_none(other):
    """Guidance is a sum, so a run of one step tells the branches apart."""
    pose, cfg = latent(20), 3.0
    second = None if other is None else latent(other)
    mixed = sample(loaded(), 1, positive=prompt(3, pose=pose), negative=prompt(4, pose=second), cfg=cfg)
    positive = sample(loaded(), 1, positive=prompt(3, pose=pose))
    negative = sample(loaded(), 1, positive=prompt(4, pose=second))
    close(mixed, negative + cfg * (positive - negative), atol=1e-2)
    assert (positive - sample(loaded(), 1)).abs().mean() > 0.05


def test_without_poses_it_is_the_base_model():
    weights = {key: tensor.clone() for key, tensor in published().items() if "control_norm1" not in key}
    base = comfy.sd.load_diffusion_model_state_dict({comfyui_name(key): tensor for key, tensor in weights.items()})
    assert torch.equal(sample(loaded(), 2, cfg=2.0), sample(mended(base), 2, cfg=2.0))


def test_strength_and_part_are_each_conditions_own():
    pose = latent(20)
    out = sample(loaded(), 2, **both(Pose(pose), Pose(pose, 0.0)), cfg=2.0)
    close(out, sample(loaded(), 2, positive=prompt(3, pose=pose), cfg=2.0))
    late = Pose(pose, part=PartOfRun(0.9999, 1.0))
    close(sample(loaded(), 2, **both(Pose(pose), late), cfg=2.0), out)
    assert torch.equal(sample(loaded(), 2, **both(late), cfg=2.0), sample(loaded(), 2, cfg=2.0))


def test_a_batch_of_videos_may_have_a_pose_each():
    poses, noise = torch.cat([latent(20), latent(21)]), latent(7, batch=2)
    out = sample(loaded(), 2, **both(poses), cfg=2.0, noise=noise)
    for i in range(2):
        close(out[[i]], sample(loaded(), 2, **both(poses[[i]]), cfg=2.0, noise=noise[[i]]))


def test_blocks_that_another_node_skips_do_not_hold_the_stream_back(monkeypatch):
    """As layer skipping of other packs does it."""
    transformer, pose = transformer_of(loaded()), latent(20)
    seen, run = [], PoseNorms.run
    monkeypatch.setattr(PoseNorms, "run", lambda self, i, c, e: seen.append(i) or run(self, i, c, e))

    def skipped(hidden_states, encoder_hidden_states, **rest):
        return hidden_states, encoder_hidden_states

    monkeypatch.setattr(transformer.blocks[1], "forward", skipped)
    out = sample(loaded(), 1, positive=prompt(3, pose=pose))
    assert seen == [0, 1, 2]
    assert out.isfinite().all()


# What does not go together


def test_poses_without_pose_norms_are_refused():
    base = families.ALL["cogvideox_i2v"]
    posed = with_pose(base.prompt(3), Pose(latent(20)))
    with pytest.raises(ValueError, match="has given a prompt poses, and the model has no pose norms"):
        families.sample(base, base.load(), 1, positive=posed)
    flux = families.ALL["flux"]
    with pytest.raises(ValueError, match="the model has no pose norms to read them"):
        families.sample(flux, flux.load(), 1, positive=with_pose(flux.prompt(3), Pose(latent(20))))


@pytest.mark.parametrize(
    ("pose", "words"),
    [
        (
            latent(20, frames=6),
            "the pose video has a latent of 8 x 6 and 6 frames, and the sampler asks for 8 x 6",
        ),
        (latent(20, size=(6, 6)), "the pose video has a latent of 6 x 6 and 4 frames, and the sampler asks for 8 x 6"),
        (latent(20, batch=2), "there are 2 pose videos for a batch of 1 videos"),
    ],
)
def test_a_pose_of_another_size_is_refused(pose, words):
    with pytest.raises(ValueError, match=words) as refused:
        sample(loaded(), 1, positive=prompt(3, pose=pose))
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("pose", [None, latent(20, frames=3)])
def test_an_odd_number_of_latent_frames_is_refused(pose):
    with pytest.raises(ValueError, match="works on pairs of latent frames, and the sampler asks for 3"):
        sample(loaded(), 1, positive=prompt(3, pose=pose), noise=latent(7, frames=3))


def test_1_0_takes_any_number_of_latent_frames():
    pose = latent(20, frames=3)
    out = sample(loaded("1.0"), 1, positive=prompt(3, pose=pose), noise=latent(7, frames=3))
    assert out.isfinite().all()


def test_core_still_repeats_the_first_frame_for_a_missing_one():
    """TELLS US WHEN COMFYUI MENDS IT: then an odd number of latent frames need not be refused."""
    video = latent(1, frames=3)
    padded = comfy.ldm.common_dit.pad_to_patch_size(video, (2, 2, 2))
    assert torch.equal(padded[:, :, 3], video[:, :, 0])


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_a_strength_that_is_none_is_refused(strength):
    with pytest.raises(ValueError, match="pose_strength must be a number of at least 0"):
        Pose(latent(20), strength)


@pytest.mark.parametrize("broken", [torch.zeros(1, 16, 4, 6), latent(20) * torch.nan, latent(20)[:0]])
def test_a_latent_that_is_no_video_is_refused(broken):
    with pytest.raises(ValueError, match=r"pose video"):
        Pose(broken)


# Nothing stays


def hooks(model):
    """What hangs over the norms. ComfyUI puts a method of theirs back where it took an object patch off."""
    found = [vars(block.norm1).get("forward") for block in transformer_of(model).blocks]
    return [None if getattr(each, "__func__", None) is CogVideoXLayerNormZero.forward else each for each in found]


def test_nothing_stays_on_the_modules(monkeypatch):
    """After a run, after an error, and after an interrupt inside of a block."""
    model, pose = loaded(), latent(20)
    plain = sample(model, 1)
    for error in (None, RuntimeError("broken"), comfy.model_management.InterruptProcessingException()):
        with monkeypatch.context() as patch:
            layer = transformer_of(model).blocks[1].attn_out
            seen, forward = [], layer.forward

            def stop(x, forward=forward, error=error, seen=seen):
                seen.append(hooks(model))
                if error is not None:
                    raise error
                return forward(x)

            patch.setattr(layer, "forward", stop)
            if error is None:
                sample(model, 1, positive=prompt(3, pose=pose))
            else:
                with pytest.raises(type(error)):
                    sample(model, 1, positive=prompt(3, pose=pose))
        assert all(each is not None for each in seen[0])
        assert hooks(model) == [None] * 3
    assert torch.equal(sample(model, 1), plain)


def test_another_packs_override_is_kept():
    """An object patch on the same place: it runs inside of ours, and stays when ours goes."""
    model, pose, seen = loaded().clone(), latent(20), []
    norm = transformer_of(model).blocks[0].norm1
    own = norm.forward

    def foreign(*args):
        seen.append(1)
        return own(*args)

    model.add_object_patch("diffusion_model.blocks.0.norm1.forward", foreign)
    out = sample(model, 1, positive=prompt(3, pose=pose))
    assert seen
    assert vars(norm)["forward"] is foreign
    assert torch.equal(out, sample(loaded(), 1, positive=prompt(3, pose=pose)))


def test_the_model_that_comes_in_has_no_norms_of_its_own():
    with pytest.raises(ValueError, match="The model has the pose norms of DynamiCtrl already"):
        dynamictrl.attach(loaded(), loaded().get_additional_models()[0], Sizes(128, 3), "x")
    with pytest.raises(ValueError, match="x is made for hidden size 64, 3 blocks; the model has hidden size 128"):
        dynamictrl.attach(loaded(), loaded().get_additional_models()[0], Sizes(64, 3), "x")
    with pytest.raises(ValueError, match="Load DynamiCtrl needs a CogVideoX model, got Flux"):
        dynamictrl.attach(families.ALL["flux"].load(), loaded().get_additional_models()[0], Sizes(128, 3), "x")


# Context windows


def windowed(model, length, overlap, schedule="standard_static", fix=False, **more):
    handler = IndexListContextHandler(
        get_matching_context_schedule(schedule), get_matching_fuse_method("pyramid"),
        context_length=length, context_overlap=overlap, dim=2, causal_window_fix=fix, **more,
    )  # fmt: skip
    patched = model.clone()
    patched.model_options["context_handler"] = handler
    create_prepare_sampling_wrapper(patched)
    return patched


LONG = {"noise": latent(7, frames=8), "cfg": 2.0}


def test_a_window_over_everything_is_no_window(monkeypatch):
    pose = latent(20, frames=8)
    plain = sample(loaded(), 2, **both(pose), **LONG)
    model = windowed(loaded(), 8, 2)
    assert torch.equal(sample(model, 2, **both(pose), **LONG), plain)
    monkeypatch.setattr(IndexListContextHandler, "should_use_context", lambda *args: True)
    model.model_options["context_handler"].fuse_method = get_matching_fuse_method("flat")
    close(sample(model, 2, **both(pose), **LONG), plain)


@pytest.mark.parametrize("retain", ["", "0"])
def test_poses_are_cut_as_the_video_is(embedded, retain):
    """Each window has the poses of its own frames, also where its picture is that of the first."""
    pose = latent(20, frames=8)
    sample(windowed(loaded(), 4, 2, cond_retain_index_list=retain), 1, **both(pose), **LONG)
    assert [cut.shape[2] for cut in embedded] == [4, 4, 4]
    for cut, start in zip(embedded, (0, 2, 4), strict=True):
        assert torch.equal(cut, pose[:, :, start : start + 4])


def test_windows_of_the_video_are_those_of_the_pose(monkeypatch):
    """A window is a video of its own: the prediction for it is that for its frames with its poses."""
    pose, noise = latent(20, frames=8), latent(7, frames=8)
    out = sample(windowed(loaded(), 4, 0), 1, positive=prompt(3, pose=pose), noise=noise)
    for frames in (slice(0, 4), slice(4, 8)):
        part = sample(loaded(), 1, positive=prompt(3, pose=pose[:, :, frames]), noise=noise[:, :, frames])
        close(out[:, :, frames], part)


@pytest.mark.parametrize(
    ("length", "overlap", "fix"), [(3, 0, False), (4, 1, False), (4, 2, True)], ids=["length", "overlap", "anchor"]
)
@pytest.mark.parametrize("posed", [True, False])
def test_windows_that_split_pairs_are_refused(length, overlap, fix, posed):
    pose = latent(20, frames=8) if posed else None
    with pytest.raises(ValueError, match="works on pairs of latent frames, and a context window of frames") as refused:
        sample(windowed(loaded(), length, overlap, fix=fix), 1, positive=prompt(3, pose=pose), **LONG)
    assert len(str(refused.value)) < 300


# Beside others


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "res_multistep"])
def test_samplers_with_a_memory_get_through(sampler):
    pose = latent(20)
    out = sample(loaded(), 3, **both(pose), cfg=2.0, sampler=sampler)
    assert out.isfinite().all()
    assert not torch.allclose(out, sample(loaded(), 3, cfg=2.0, sampler=sampler), atol=1e-3)


def test_a_lora_on_the_norms_and_on_the_patch_embedding_acts_on_the_poses_too():
    """They go through the live modules: a LoRA is the same as weights that have it."""
    pose, changed = latent(20), {**published()}
    state = {}
    for key in ("patch_embed.proj", "transformer_blocks.1.norm1.linear", "transformer_blocks.0.attn1.to_q"):
        rows, columns = changed[f"{key}.weight"].shape
        down, up = torch.randn(2, columns) * 0.1, torch.randn(rows, 2) * 0.1
        state |= {f"transformer.{key}.lora_A.weight": down, f"transformer.{key}.lora_B.weight": up}
        changed[f"{key}.weight"] = changed[f"{key}.weight"] + up @ down
    renamed, _ = lora_names(state)
    with_lora = comfy.sd.load_lora_for_models(loaded(), None, renamed, 1.0, 0.0)[0]
    out = sample(with_lora, 1, positive=prompt(3, pose=pose))
    other = dynamictrl_files.from_state(changed, "changed").model
    close(out, sample(other, 1, positive=prompt(3, pose=pose)))
    assert not torch.allclose(out, sample(loaded(), 1, positive=prompt(3, pose=pose)), atol=1e-3)


def test_each_of_a_guiders_two_models_has_its_own_norms():
    pose, other = latent(20), loaded(seed=1)
    made = custom.DualModelGuider.execute(loaded(), prompt(3, pose=pose), 3.0, other, prompt(4, pose=pose))
    sigmas = comfy.samplers.calculate_sigmas(loaded().get_model_object("model_sampling"), "simple", 1)
    noise, euler = latent(7), comfy.samplers.sampler_object("euler")
    out = made.args[0].sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)
    positive = sample(loaded(), 1, positive=prompt(3, pose=pose))
    negative = sample(other, 1, positive=prompt(4, pose=pose))
    close(out, negative + 3 * (positive - negative), atol=1e-2)
    assert (negative - sample(other, 1, positive=prompt(4))).abs().mean() > 0.05
    assert hooks(loaded()) == hooks(other) == [None] * 3


def test_an_area_of_the_video_sees_its_part_of_the_poses(embedded):
    pose = latent(20)
    area = {"area": (4, 4, 4, 0, 2, 4), "strength": 1.0}
    sample(loaded(), 1, positive=prompt(3, pose=pose) + prompt(5, pose=pose, **area))
    assert [tuple(each.shape[2:]) for each in embedded] == [(4, 6, 8), (4, 4, 4)]
    assert torch.equal(embedded[1], pose[..., 2:6, 4:8])


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_sees_poses_that_begin_late_and_change(backend):
    """torch.compile must trace nothing that differs from call to call. Tracing takes seconds a block."""
    torch._dynamo.reset()
    small, part = loaded(blocks=1), PartOfRun(0.3, 0.8)
    compiled = small.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}  # as ComfyUI's TorchCompileModel
    set_torch_compile_wrapper(compiled, backend=backend, options=options)
    for seed in (20, 21):
        posed = both(Pose(latent(seed), part=part))
        close(sample(compiled, 4, **posed), wanted := sample(small, 4, **posed))
        assert (wanted - sample(small, 4)).abs().mean() > 1e-3
    close(sample(compiled, 2), sample(small, 2))
