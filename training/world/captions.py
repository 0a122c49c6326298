"""Scenes and sets in plain English."""

from __future__ import annotations

from .things import OBJECTS, SMALL, Scene, Thing


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def object_words(thing: Thing) -> str:
    small = "small " if thing.edition == 2 and thing.size < SMALL else ""
    return f"{_article(small + thing.colour)} {small}{thing.colour} {thing.kind}"


def garment_words(doll: Thing) -> str:
    """What a doll wears above, or all over: "a red striped dress"."""
    pattern = "" if doll.pattern == "plain" else f"{doll.pattern} "
    shown = "" if not doll.print else f" printed with {'a' if doll.print in OBJECTS else 'the letter'} {doll.print}"
    return f"{_article(doll.colour)} {doll.colour} {pattern}{doll.cut}{shown}"


def plain_shirt(doll: Thing) -> str:
    """All that the first world says of a doll beside another one."""
    return f"{_article(doll.colour)} {doll.colour} shirt"


def pose_words(pose: str) -> str:
    """With the comma before it; "" for a caption that is silent on the pose."""
    return "" if not pose else (f", {pose}" if pose in ("waving", "pointing") else f", arms {pose}")


def doll_words(doll: Thing, pose: str) -> str:
    bottom = doll.bottom_colour + " " + doll.bottom
    bottom = bottom if doll.bottom in ("trousers", "shorts") else f"{_article(bottom)} {bottom}"
    below = "" if doll.cut == "dress" else f" and {bottom}"
    return f"a doll with {doll.hairstyle} {doll.hair} hair, {garment_words(doll)}{below}{pose_words(pose)}"


def caption(scene: Scene) -> str:
    """The scene in plain English. Says nothing that the picture does not show; silent on an empty relation or pose."""
    texture = f"{scene.texture} " if scene.texture else ""
    ground = f"on a {texture}{scene.ground} ground"
    side = f" on the {scene.relation}" if scene.relation else ""
    first, *rest = scene.things
    if first.kind == "doll" and not rest:
        return f"{doll_words(first, scene.pose)}, {ground}"
    if first.kind == "doll" and rest[0].kind != "doll":
        return f"{doll_words(first, scene.pose)}, {object_words(rest[0])}{side}, {ground}"
    if first.kind == "doll":
        short = [f"a doll in {garment_words(d) if d.edition == 2 else plain_shirt(d)}" for d in (first, rest[0])]
        return f"{short[0]} left of {short[1]}, {ground}"
    if not rest:
        return f"{object_words(first)}{side}, {ground}"
    link = {"left": "left of", "right": "right of", "": "and"}.get(scene.relation, scene.relation)
    return f"{object_words(first)} {link} {object_words(rest[0])}, {ground}"


def set_caption(scenes: tuple[Scene, Scene], named: bool) -> str:
    """One sentence for two panels with the same doll. `named`: the first panel says what the doll wears."""

    def pose(scene: Scene) -> str:
        return {"": "", "waving": " waving"}.get(scene.pose, f", arms {scene.pose}")

    first, second = scenes
    doll = doll_words(first.things[0], first.pose) if named else f"a doll{pose(first)}"
    return f"[LEFT] {doll}, on a {first.ground} ground; [RIGHT] the doll{pose(second)}, on a {second.ground} ground"
