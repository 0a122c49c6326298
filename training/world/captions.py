"""Scenes and sets in plain English."""

from __future__ import annotations

from .things import Scene, Thing


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _object_words(thing: Thing) -> str:
    return f"{_article(thing.colour)} {thing.colour} {thing.kind}"


def doll_words(doll: Thing, pose: str) -> str:
    pattern = "" if doll.pattern == "plain" else f"{doll.pattern} "
    bottom = doll.bottom_colour + " " + doll.bottom
    bottom = bottom if doll.bottom == "trousers" else f"{_article(bottom)} {bottom}"
    arms = "" if not pose else (", waving" if pose == "waving" else f", arms {pose}")
    return (
        f"a doll with {doll.hairstyle} {doll.hair} hair, {_article(doll.colour)} {doll.colour} {pattern}shirt "
        f"and {bottom}{arms}"
    )


def caption(scene: Scene) -> str:
    """The scene in plain English. Says nothing that the picture does not show; silent on an empty relation or pose."""
    ground = f"on a {scene.ground} ground"
    side = f" on the {scene.relation}" if scene.relation else ""
    first, *rest = scene.things
    if first.kind == "doll" and not rest:
        return f"{doll_words(first, scene.pose)}, {ground}"
    if first.kind == "doll" and rest[0].kind != "doll":
        return f"{doll_words(first, scene.pose)}, {_object_words(rest[0])}{side}, {ground}"
    if first.kind == "doll":
        short = [f"a doll in {_article(d.colour)} {d.colour} shirt" for d in (first, rest[0])]
        return f"{short[0]} left of {short[1]}, {ground}"
    if not rest:
        return f"{_object_words(first)}{side}, {ground}"
    link = {"left": "left of", "right": "right of", "": "and"}.get(scene.relation, scene.relation)
    return f"{_object_words(first)} {link} {_object_words(rest[0])}, {ground}"


def set_caption(scenes: tuple[Scene, Scene], named: bool) -> str:
    """One sentence for two panels with the same doll. `named`: the first panel says what the doll wears."""

    def pose(scene: Scene) -> str:
        return {"": "", "waving": " waving"}.get(scene.pose, f", arms {scene.pose}")

    first, second = scenes
    doll = doll_words(first.things[0], first.pose) if named else f"a doll{pose(first)}"
    return f"[LEFT] {doll}, on a {first.ground} ground; [RIGHT] the doll{pose(second)}, on a {second.ground} ground"
