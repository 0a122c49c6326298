"""The paper-doll world: procedural scenes with every ground truth that the features need.

A scene is a small frozen value. Rendering it at any size gives the picture and, from the same polygons, its label
map, edge map, keypoints, cut-outs, garment flat, masks and depth order, and a motion clip of the same scene. The same
seed gives the same scene on every machine.

    things      colours, dolls, objects and their outlines
    rendering   scenes as pictures and maps
    captions    scenes and sets in words
    sampling    random scenes and sets
    second      random scenes of the second world, which has more to wear, larger parts and textures
    skeleton    body points of a doll, as OpenPose names them

Coordinates: the canvas is the unit square, x to the right, y down. Angles: degrees, 0 is straight down, positive away
from the body. Pictures: uint8 RGB `[H, W, 3]`; maps: uint8 `[H, W]`.
"""

from . import second
from .captions import caption, set_caption
from .motion import moving
from .rendering import (
    Picture,
    canny,
    clip,
    cut_out,
    depth_map,
    edge_map,
    garment_flat,
    garment_mask,
    keypoints,
    pose_map,
    render,
)
from .sampling import held_out, held_out_set, sample_scene, sample_set, scenes, sets
from .skeleton import openpose
from .things import (
    ARMS,
    BONES,
    BOTTOMS,
    COLOURS,
    CUTS,
    EYE,
    GROUNDS,
    HAIR,
    HAIRSTYLES,
    JOINTS,
    LABELS,
    LEVELS,
    MORE_ARMS,
    MORE_BOTTOMS,
    MORE_HAIRSTYLES,
    MORE_PATTERNS,
    OBJECTS,
    PATTERNS,
    PRINTS,
    SHOE,
    SKINS,
    TEXTURES,
    TRUNK,
    WHITE,
    Part,
    Scene,
    Thing,
    doll_joints,
    doll_parts,
    object_outline,
    parts_of,
)

VERSION = 1  # of how scenes look and read: a change asks for new weights

__all__ = [
    "ARMS",
    "BONES",
    "BOTTOMS",
    "COLOURS",
    "CUTS",
    "EYE",
    "GROUNDS",
    "HAIR",
    "HAIRSTYLES",
    "JOINTS",
    "LABELS",
    "LEVELS",
    "MORE_ARMS",
    "MORE_BOTTOMS",
    "MORE_HAIRSTYLES",
    "MORE_PATTERNS",
    "OBJECTS",
    "PATTERNS",
    "PRINTS",
    "SHOE",
    "SKINS",
    "TEXTURES",
    "TRUNK",
    "VERSION",
    "WHITE",
    "Part",
    "Picture",
    "Scene",
    "Thing",
    "canny",
    "caption",
    "clip",
    "cut_out",
    "depth_map",
    "doll_joints",
    "doll_parts",
    "edge_map",
    "garment_flat",
    "garment_mask",
    "held_out",
    "held_out_set",
    "keypoints",
    "moving",
    "object_outline",
    "openpose",
    "parts_of",
    "pose_map",
    "render",
    "sample_scene",
    "sample_set",
    "scenes",
    "second",
    "set_caption",
    "sets",
]
