"""The help page of Apply EasyControl: core's own tile nodes give each tile its part of a condition."""

import io

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.comfy

SIDE, TILE = 192, 96
APPLY = dict(kind="spatial", strength=1.0, start_percent=0.0, end_percent=1.0, condition_size=96, pad_color="grey",
             slot=0, influence=1.0, kv_cache="on GPU")  # fmt: skip
SAMPLE = dict(seed=1, steps=3, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=0.7)


def node(class_type: str, /, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def drawn_again(tile: int | None) -> dict:
    """A doll of 192 pixels drawn again in four tiles, after outlines in the same tiles; or one of them alone."""
    side = SIDE if tile is None else TILE
    prompt = {
        "models": node("DiTLoadEmbedded"),
        "text": node("CLIPTextEncode", clip=["models", 1], text="a doll"),
        "lora": node("DiTEasyControlLoader", file="tiny_edge.safetensors"),
        "model": node("DiTEasyControlApply", model=["models", 0], easycontrol=["lora", 0], vae=["models", 2],
                      image=["outlines tiles", 0], **APPLY),
        "latent": node("VAEEncode", pixels=["picture tiles", 0], vae=["models", 2]),
        "sampler": node("KSampler", model=["model", 0], positive=["text", 0], negative=["text", 0],
                        latent_image=["latent", 0], **SAMPLE),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["models", 2]),
        "merged": node("ImageMergeTileList", image_list=["decoded", 0], final_width=side, final_height=side, overlap=0),
        "saved": node("SaveImage", images=["merged", 0], filename_prefix="tiles"),
    }  # fmt: skip
    top, left = divmod(tile or 0, SIDE // TILE)
    for name, file in (("picture", "painted_doll.png"), ("outlines", "drawn_doll.png")):
        prompt |= {
            name: node("DiTExamplePicture", picture=file),
            f"{name} large": node("ImageScale", image=[name, 0], upscale_method="lanczos", width=SIDE, height=SIDE,
                                  crop="disabled"),
            f"{name} part": node("ImageCrop", image=[f"{name} large", 0], width=side, height=side, x=left * TILE,
                                 y=top * TILE),
            f"{name} tiles": node("SplitImageToTileList", image=[f"{name} part", 0], tile_width=TILE, tile_height=TILE,
                                  overlap=0),
        }  # fmt: skip
    return prompt


def picture(server, prompt: dict) -> np.ndarray:
    (image,) = (file for file in server.client.run(prompt).images if file.type == "output")  # nodes show theirs, too
    return np.asarray(Image.open(io.BytesIO(server.client.fetch(image))).convert("RGB"))


def test_tiles_of_picture_and_condition_go_together(server):
    whole = picture(server, drawn_again(None))
    assert whole.shape == (SIDE, SIDE, 3)
    for tile in (1, 2):
        top, left = (place * TILE for place in divmod(tile, SIDE // TILE))
        assert np.array_equal(whole[top : top + TILE, left : left + TILE], picture(server, drawn_again(tile)))
