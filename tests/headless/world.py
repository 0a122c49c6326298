"""A small prompt, and what a server would say of its nodes."""

from __future__ import annotations

import copy

KNOWN = {
    "Loader": {"input": {"required": {"file": [["a.safetensors", "b.safetensors"]]}}, "display_name": "Load Model"},
    "Words": {
        "input": {"required": {"text": ["STRING", {"multiline": True}], "clip": ["CLIP"]}},
        "display_name": "Words",
    },
    "LoadImage": {
        "input": {"required": {"image": ["COMBO", {"options": ["old.png"], "image_upload": True}]}},
        "display_name": "Load Image",
    },
    "Control": {
        "input": {
            "required": {"image": ["IMAGE"], "strength": ["FLOAT", {"min": 0.0, "max": 2.0}]},
            "optional": {"mask": ["MASK"]},
        },
        "display_name": "Apply Control",
    },
    "Sampler": {
        "input": {
            "required": {
                "seed": ["INT", {"min": 0, "max": 2**64 - 1}],
                "steps": ["INT", {"min": 1, "max": 100}],
                "model": ["MODEL"],
                "sampler": ["COMBO", {"options": ["euler", "heun", "dpmpp_2m"]}],
                "tiled": ["BOOLEAN", {}],
            }
        },
        "display_name": "KSampler",
    },
    "Save": {
        "input": {"required": {"images": ["IMAGE"], "filename_prefix": ["STRING", {}]}},
        "output_node": True,
        "display_name": "Save Image",
    },
}
PROMPT = {
    "1": {"class_type": "Loader", "inputs": {"file": "a.safetensors"}},
    "2": {"class_type": "Words", "inputs": {"text": "a doll", "clip": ["1", 1]}, "_meta": {"title": "Positive prompt"}},
    "3": {"class_type": "Words", "inputs": {"text": "", "clip": ["1", 1]}},
    "4": {"class_type": "LoadImage", "inputs": {"image": "old.png"}},
    "5": {"class_type": "Control", "inputs": {"image": ["4", 0], "strength": 1.0}},
    "6": {
        "class_type": "Sampler",
        "inputs": {
            "seed": 1,
            "steps": 4,
            "model": ["1", 0],
            "sampler": "euler",
            "tiled": False,
            "positive": ["2", 0],
            "negative": ["3", 0],
            "control": ["5", 0],
        },
    },
    "7": {"class_type": "Save", "inputs": {"images": ["6", 0], "filename_prefix": "ComfyUI"}},
    "8:3": {
        "class_type": "Words",
        "inputs": {"text": "inside", "clip": ["1", 1]},
        "_meta": {"title": "Positive prompt"},
    },
}


def prompt() -> dict:
    made = copy.deepcopy(PROMPT)
    for node in made.values():
        node.setdefault("_meta", {"title": KNOWN[node["class_type"]]["display_name"]})
    return made
