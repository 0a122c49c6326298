"""Train an In-Context LoRA for the embedded default with ComfyUI's own nodes: `python -m training in_context`.

In-Context LoRA, arXiv:2410.23775: sets of related pictures as panels of one canvas, one joint caption per canvas, an
ordinary LoRA. Here a set is one doll in two scenes, side by side on 192 x 96 pixels. Most captions are silent on what
the doll wears, so that the panels must take it from each other.

There is no trainer here. The sets are written to a folder as a user would keep them, and the nodes run one after the
other: Panel Layout, Panel Sets From Folder, Make Training Dataset, Prepare Model for Train LoRA, Train LoRA, Save
LoRA. Only that the small world has fewer channels than FLUX.1 is put right by `trainable`.

`python -m training.in_context` measures the result with Load LoRA and the sampler.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dit_toolkit.scripts import places

from . import data, train, world
from .evaluate import pictures
from .score import OUTFIT, agreement, ground_of, pose_of, read_doll

SIDE = 96
NAME = "loras/dit_toolkit_demo_in_context.safetensors"
STEPS, CFG = 20, 2.5  # of the sampler, as in the example workflows
JUDGED = 200  # sets on which the reader of dolls is tried

SILENCE = "A picture."  # filler to the tiny text encoder, which reads it as the empty prompt

Set = tuple[world.Scene, world.Scene]
Pictures = np.ndarray  # uint8 RGB `[N, H, W, 3]`


@dataclass(frozen=True)
class InContextRecipe:
    """`named`, `empty`: shares of captions that say what the doll wears, and that say nothing."""

    sets: int = 1000
    named: float = 0.3
    empty: float = 0.1
    rank: int = 16
    lr: float = 3e-3
    steps: int = 900
    batch: int = 32
    seed: int = 0


@cache
def comfyui() -> SimpleNamespace:
    """ComfyUI's nodes and ours, in this process, on the CPU. Its folders are a base of their own under `.cache/`."""
    # ComfyUI has a nodes.py of its own. With the repository on sys.path, `import nodes` would find ours.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != places.ROOT]
    if str(places.comfyui()) not in sys.path:
        sys.path.append(str(places.comfyui()))
    from comfy.cli_args import args

    if args.base_directory is None:  # tests have one already
        args.cpu = True
        args.base_directory = str(places.prepare_base(places.CACHE / "in_context"))
    import comfy.patcher_extension
    import folder_paths
    import nodes  # ComfyUI's
    from comfy_extras.nodes_dataset import MakeTrainingDataset
    from comfy_extras.nodes_train import SaveLoRA, TrainLoraNode

    from dit_toolkit.host import embedded
    from dit_toolkit.host.model_files import offer_loras
    from dit_toolkit.nodes.in_context_lora import (
        PanelLatent,
        PanelLayout,
        PanelSets,
        PrepareTraining,
        SplitPanels,
    )

    offer_loras()
    return SimpleNamespace(
        comfy=comfy, folder_paths=folder_paths, nodes=nodes, embedded=embedded, PanelLayout=PanelLayout,
        PanelSets=PanelSets, PanelLatent=PanelLatent, SplitPanels=SplitPanels, PrepareTraining=PrepareTraining,
        MakeTrainingDataset=MakeTrainingDataset, TrainLora=TrainLoraNode, SaveLora=SaveLoRA,
    )  # fmt: skip


def layout(given: str = "") -> Any:
    """Two panels of 96 x 96 side by side, from the node. `given`: numbers of the panels that come as pictures."""
    return comfyui().PanelLayout.execute("custom", 1, 2, SIDE, SIDE, "auto", "", "", "", given).result[0]


# -------------------------------------------------------------------------------------------------------- training


def captions(sets: Sequence[Set], recipe: InContextRecipe) -> list[str]:
    """A caption per set, in the shares that the recipe asks for."""
    rolls = np.random.default_rng(recipe.seed).random(len(sets))
    named = recipe.empty + recipe.named
    return [
        SILENCE if r < recipe.empty else world.set_caption(s, named=r < named) for s, r in zip(sets, rolls, strict=True)
    ]


def write_sets(folder: Path, recipe: InContextRecipe) -> None:
    """`recipe.sets` folders with 1.png, 2.png and caption.txt. What lay in `folder` is overwritten."""
    sets = list(islice(world.sets(recipe.seed + 1), recipe.sets))
    for number, (scenes, text) in enumerate(zip(sets, captions(sets, recipe), strict=True)):
        place = folder / f"set_{number:05}"
        place.mkdir(parents=True, exist_ok=True)
        for panel, scene in enumerate(scenes, 1):
            cv2.imwrite(str(place / f"{panel}.png"), world.render(scene, SIDE).image[..., ::-1])
        (place / "caption.txt").write_text(text, encoding="utf-8")


def trainable(model: Any, live: int) -> Any:
    """`model`, a MODEL, as Prepare Model for Train LoRA gives it, with `live` channels that count.

    Of the 16 latent channels only `live` carry anything. The base leaves noise in the others; the LoRA must not spend
    itself on removing it. Here they count as right.
    """
    host = comfyui()

    def alive(run: Callable, *args: Any) -> list[Tensor]:
        denoised, *rest = run(*args)
        return [torch.cat([denoised[:, :live], torch.zeros_like(denoised[:, live:])], 1), *rest]

    (patched,) = host.PrepareTraining.execute(model).result
    wrapper = host.comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
    patched.add_wrapper_with_key(wrapper, "dit_toolkit.live_channels", alive)
    return patched


def train_in_context(recipe: InContextRecipe) -> list[float]:
    """The LoRA of `recipe` in `weights/`, by way of ComfyUI's nodes. Returns the loss of every step."""
    host = comfyui()
    name = f"dolls_{train.digest(world.VERSION, recipe)}"
    write_sets(Path(host.folder_paths.get_input_directory()) / name, recipe)
    clip, vae, model = host.embedded.load_clip(), host.embedded.load_vae(), host.embedded.load_model()
    live = vae.first_stage_model.live
    with torch.inference_mode():  # as ComfyUI runs every node
        canvases, texts = host.PanelSets.execute(folder=name, panels=layout(), fit="crop").result
        latents, conditioning = host.MakeTrainingDataset.execute(canvases, [vae], [clip], texts).result
        torch.manual_seed(recipe.seed)  # Train LoRA draws batches, noise levels and first weights from torch's own
        lora, losses, steps = host.TrainLora.execute(**one_each(
            model=trainable(model, live), batch_size=recipe.batch, steps=recipe.steps, grad_accumulation_steps=1,
            learning_rate=recipe.lr, rank=recipe.rank, optimizer="AdamW", loss_function="MSE", seed=recipe.seed,
            training_dtype="bf16", lora_dtype="fp32", quantized_backward=False, algorithm="LoRA",
            gradient_checkpointing=False, checkpoint_depth=1, offloading=False, existing_lora="[None]",
            bucket_mode=False, bypass_mode=False,
        ), latents=latents, positive=conditioning).result  # fmt: skip
        host.SaveLora.execute(lora, f"loras/{name}", steps)
    export(Path(host.folder_paths.get_output_directory()) / "loras", f"{name}_{steps}_steps_*.safetensors")
    train.WORK.mkdir(exist_ok=True)
    train.plot(train.WORK / f"{name}.png", losses["loss"])
    return losses["loss"]


def one_each(**inputs: Any) -> dict[str, list]:
    """Inputs as a node with `is_input_list` gets them."""
    return {name: [value] for name, value in inputs.items()}


def export(folder: Path, pattern: str) -> Path:
    """The newest file that Save LoRA wrote, as float16 in `weights/`."""
    newest = max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    return train.write(NAME, load_file(newest), {})


# --------------------------------------------------------------------------------------------------- what it does


class Drawer:
    """Draws with ComfyUI's Load LoRA and KSampler on the embedded models. `strength` 0 is without the LoRA."""

    def __init__(self, strength: float = 1.0, name: str = Path(NAME).name):
        host = comfyui()
        self.clip, self.vae = host.embedded.load_clip(), host.embedded.load_vae()
        base = host.embedded.load_model()
        (self.model,) = host.nodes.LoraLoaderModelOnly().load_lora_model_only(base, name, strength)

    def words(self, texts: Sequence[str]) -> list:
        """CONDITIONING with a row per text."""
        rows = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0] for text in texts]
        pooled = torch.cat([about["pooled_output"] for _, about in rows])
        return [[torch.cat([context for context, _ in rows]), {"pooled_output": pooled}]]

    @torch.inference_mode()
    def draw(self, texts: Sequence[str], seed: int, latent: dict[str, Tensor]) -> Pictures:
        (drawn,) = (
            comfyui()
            .nodes.KSampler()
            .sample(self.model, seed, STEPS, CFG, "euler", "simple", self.words(texts), self.words([""]), latent)
        )
        return (self.vae.decode(drawn["samples"]) * 255).round().byte().numpy()

    def single(self, texts: Sequence[str], seed: int) -> Pictures:
        """Pictures of 96 x 96."""
        return self.draw(texts, seed, {"samples": torch.zeros(len(texts), 16, SIDE // 8, SIDE // 8)})

    @torch.inference_mode()
    def panels(self, texts: Sequence[str], seed: int, left: Pictures | None = None) -> tuple[Pictures, Pictures]:
        """Left and right panels, by our nodes. `left`: pictures that are given."""
        host = comfyui()
        plan = layout("" if left is None else "1")
        how = dict(panels=plan, vae=self.vae, fit="crop", encode="per panel", start="neutral")
        if left is None:
            latent = host.PanelLatent.execute(**how, batch_size=len(texts)).result[0]
        else:
            shown = [{"image_1": torch.from_numpy(one)[None] / 255} for one in left]
            latents = [host.PanelLatent.execute(**how, batch_size=1, images=one).result[0] for one in shown]
            latent = {**latents[0], "samples": torch.cat([one["samples"] for one in latents])}
        canvas = torch.from_numpy(self.draw(texts, seed, latent)).float()
        split = host.SplitPanels.execute(panels=plan, inset=0, image=canvas).result[0].byte().numpy()
        return split[0::2], split[1::2]


def tally(left: Pictures, right: Pictures, sets: Sequence[Set]) -> dict[str, float]:
    """Shares of cases in which the dolls of the two panels agree, by part and in the whole outfit; and, over both
    panels, the shares of dolls that can be read, and of poses and grounds that are as the caption says."""
    agreed, asked = Counter(), Counter()

    def count(**facts: bool) -> None:
        for name, fact in facts.items():
            agreed[name] += fact
            asked[name] += 1

    for a, b, scenes in zip(left, right, sets, strict=True):
        dolls = read_doll(a), read_doll(b)
        common = agreement(*dolls)
        count(outfit=all(common[part] for part in OUTFIT), **common)
        for image, doll, scene in zip((a, b), dolls, scenes, strict=True):
            count(dolls=doll is not None, pose=doll is not None and pose_of(doll.arms) == scene.pose,
                  ground=ground_of(image) == scene.ground)  # fmt: skip
    return {name: round(agreed[name] / asked[name], 3) for name in asked}


def cases(count: int, seed: int = 5) -> list[Set]:
    return list(islice(world.sets(seed, test=True), count))


def alone(scene: world.Scene) -> str:
    """The caption of one panel by itself, silent on what the doll wears."""
    pose = "waving" if scene.pose == "waving" else f"arms {scene.pose}"
    return f"a doll, {pose}, on a {scene.ground} ground"


def chance(left: Pictures, right: Pictures, sets: Sequence[Set]) -> dict[str, float]:
    """The right panels beside the left panels of other cases."""
    return tally(np.roll(left, 1, 0), right, sets)


def judge(sets: Sequence[Set]) -> dict[str, dict[str, float]]:
    """What the reader of dolls says of the world's own pictures: the best that it could say of drawn ones."""
    _, vae = train.load_shipped()
    panels = [np.stack([world.render(scenes[k], SIDE).image for scenes in sets]) for k in range(2)]
    coded = [pictures(vae, data.encode(vae, shown)) for shown in panels]
    return {"world's own pictures": tally(*panels, sets), "after the autoencoder": tally(*coded, sets)}


def measure(count: int = 32, seed: int = 1, drawn: int = 5) -> dict[str, dict[str, float]]:
    """What the model card says of the LoRA: the same held-out prompts and seeds with and without it.

    Args:
        seed: of the noise. drawn: of the sets.
    """
    sets = cases(count, drawn)
    silent = [world.set_caption(scenes, named=False) for scenes in sets]
    named = [world.set_caption(scenes, named=True) for scenes in sets]
    given = np.stack([world.render(first, SIDE).image for first, _ in sets])
    found = judge(cases(JUDGED, drawn))
    for name, drawer in (("with", Drawer()), ("without", Drawer(0.0))):
        for kind, texts, shown in (("silent", silent, None), ("named", named, None), ("given", silent, given)):
            panels = drawer.panels(texts, seed, shown)
            found[f"{name}, {kind}"] = tally(*panels, sets)
            if name == "with":
                found[f"{name}, {kind}, left panel of another case"] = chance(*panels, sets)
    apart = Drawer(0.0)
    pair = [apart.single([alone(scenes[k]) for scenes in sets], seed + k) for k in range(2)]
    found["two separate pictures"] = tally(*pair, sets)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1, help="of the noise")
    parser.add_argument("--drawn", type=int, default=5, help="seed of the cases")
    options = parser.parse_args()
    print(json.dumps(measure(options.count, options.seed, options.drawn), indent=1))


if __name__ == "__main__":
    main()
