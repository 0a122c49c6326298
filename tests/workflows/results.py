"""What the pictures and clips of a workflow must be, whoever ran it."""

import io

import av
import numpy as np
from PIL import Image

from dit_toolkit.scripts.client import Image as Saved
from dit_toolkit.scripts.client import Result
from dit_toolkit.scripts.server import Server
from dit_toolkit.training.score import read_doll

# What the dolls of a workflow's saved pictures wear, shirt and bottom, where its note says so and the prompt does not.
WORN = {
    "CPU 09 consistent character": [("blue", "green"), ("blue", "green")],
    "CPU 10 consistent character, given": [("green", "orange"), ("green", "orange")],
    "CPU 11 subject in a new scene": [("green", "red")],
    "CPU 12 try on clothes": [("red", "blue"), ("purple", "blue")],
    "CPU 15 pose, subject, speed up": [("green", "red")],
}


def check_pictures(server: Server, result: Result) -> None:
    """Every picture shows something."""
    for image in result.images:
        assert pixels(server, image).std() > 8, f"node {image.node_id} made a picture of one colour"


def check_videos(server: Server, result: Result) -> None:
    """Every clip plays, shows something, and moves."""
    for video in result.videos:
        with av.open(io.BytesIO(server.client.fetch(video))) as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert len(frames) > 1
        assert frames[0].std() > 8, f"node {video.node_id} made a clip of one colour"
        assert np.abs(frames[-1].astype(float) - frames[len(frames) // 2]).max() > 40, "nothing moves"


def worn(server: Server, result: Result) -> list[tuple[str, str]]:
    """Colours of shirt and bottom, of every doll in the saved pictures: one in each square, counted from the right."""
    found = []
    for image in (image for image in result.images if image.type == "output"):
        picture = pixels(server, image)
        height, width, _ = picture.shape
        for left in range(width % height, width, height):
            square = Image.fromarray(picture[:, left : left + height]).resize((96, 96), Image.Resampling.LANCZOS)
            doll = read_doll(np.asarray(square))
            assert doll is not None, f"no doll in what node {image.node_id} saved"
            found.append((doll.colour, doll.bottom_colour))
    return found


def pixels(server: Server, image: Saved) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.client.fetch(image))).convert("RGB"))
