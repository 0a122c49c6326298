"""Sheets of what the nodes do, drawn by the embedded models on the real server. Seeds were chosen among a few."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from ..demo import OUTLINE, PHOTO, ROWS
from ..places import DEMO_INPUTS, ROOT
from . import sheet
from .studio import Graph, Node, Picture, Studio

SPOTTED = "a doll with long black hair, a purple spotted shirt and a yellow skirt, waving, on a white ground"
GREEN = "a doll with short brown hair, a green shirt and pink trousers, waving, on a white ground"
YELLOW = "a doll with short black hair, a yellow spotted shirt and blue trousers, waving, on a dark ground"
STEPS = 28


def example(name: str) -> Picture:
    return Image.open(DEMO_INPUTS / name).convert("RGB")


def psnr(a: Picture, b: Picture) -> float:
    away = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
    return math.inf if away == 0 else 10 * math.log10(255**2 / away)


def likeness(a: Picture, b: Picture) -> str:
    near = psnr(a, b)
    return "the same" if math.isinf(near) else f"{near:.0f} dB"


def accelerated(
    studio: Studio, variants: dict[str, tuple[str, dict] | None], text: str, seed: int, cfg: float = 2.5
) -> Picture:
    """One prompt with one seed, two by two. Labels say how near each is to the first."""
    graph = studio.graph()
    model, clip, vae = graph.embedded()
    for name, node in variants.items():
        used = model if node is None else graph.add(node[0], model=model, **node[1])
        graph.show(name, graph.drawn(used, clip, vae, text, seed, STEPS, cfg))
    made = [pictures[0] for pictures in studio.run(graph).values()]
    labels = [
        name if number == 0 else f"{name}: {likeness(made[0], picture)}"
        for number, (name, picture) in enumerate(zip(variants, made, strict=True))
    ]
    return sheet.sheet(made, labels)


def accelerate(studio: Studio) -> Picture:
    levels = {quality: ("DiTAccelerate", {"quality": quality}) for quality in ("quality", "balanced", "fast")}
    return accelerated(studio, {"off": None, **levels}, GREEN, 3)


def taylorseer(studio: Studio) -> Picture:
    every = {f"1 in {n}": ("DiTTaylorSeer", {"interval": n}) for n in (2, 3, 5)}
    return accelerated(studio, {"all computed": None, **every}, YELLOW, 16)


def delta_dit(studio: Studio) -> Picture:
    """A doll and a fish, computed in full and at interval 3."""
    graph = studio.graph()
    model, clip, vae = graph.embedded()
    fast = graph.add("DiTDeltaDiT", model=model, interval=3)
    for text, seed in ((GREEN, 3), ("an orange fish, on a pale ground", 5)):
        graph.show(f"{seed} in full", graph.drawn(model, clip, vae, text, seed, STEPS))
        graph.show(f"{seed} fast", graph.drawn(fast, clip, vae, text, seed, STEPS))
    made = [pictures[0] for pictures in studio.run(graph).values()]
    return sheet.sheet(made, ["in full", likeness(made[0], made[1]), "in full", likeness(made[2], made[3])])


def re_ttention(studio: Studio) -> Picture:
    how = {"first_full": 6, "min_tokens": 0, "interval": 5}
    variants = {
        "full attention": None,
        "a quarter": ("DiTReTtention", {**how, "keep": 0.25}),
        "an eighth": ("DiTReTtention", {**how, "keep": 0.125}),
        "quarter, share only": ("DiTReTtention", {**how, "keep": 0.25, "storage": "share only"}),
    }
    return accelerated(studio, variants, YELLOW, 16)


def clear(studio: Studio) -> Picture:
    """The mask alone, on a model that was not trained for it."""
    variants = {f"radius {n}": ("DiTClear", {"radius": n, "min_tokens": 0}) for n in (8, 4, 2)}
    return accelerated(
        studio, {"dense": None, **variants}, "a doll with a red shirt and a blue skirt, on a grey ground", 4
    )


def cg_taylor(studio: Studio) -> Picture:
    """The gate's errors over a run at two thresholds, each with its picture."""
    graph = studio.graph()
    model, clip, vae = graph.embedded()
    texts = {}
    for threshold in (0.03, 0.13):
        node = graph.add("DiTCGTaylor", model=model, threshold=threshold)
        picture = graph.drawn(node, clip, vae, SPOTTED, 16, STEPS)
        report = graph.add("DiTAccelerationReport", after=picture, report=node[1])
        texts[threshold] = graph.add("PreviewAny", source=report[1]).id
        graph.show(str(threshold), picture)
    result = studio.server.client.run(graph.prompt)
    shown = studio.pictures(result)
    cells, labels = [], []
    for threshold, name in texts.items():
        run = json.loads(result.outputs[name]["text"][0])
        entries = entries_of(run)
        computed = sum(entry["computed"] for entry in entries)
        cells += [gate_chart(entries, threshold), shown[graph.shown[str(threshold)]][0]]
        labels += [f"threshold {threshold}", f"{computed} of {len(entries)} computed"]
    return sheet.sheet(cells, labels)


def entries_of(report) -> list[dict]:
    """The evaluations of the first run in a report."""
    if isinstance(report, list):
        return report if report and "computed" in report[0] and "index" in report[0] else entries_of(report[0])
    for key in ("evaluations", "entries"):
        if isinstance(report.get(key), list):
            return report[key]
    return entries_of(report["runs"])


def gate_chart(entries: list[dict], threshold: float, side: int = 278) -> Picture:
    made = Image.new("RGB", (side, side), "white")
    draw, step = ImageDraw.Draw(made), side / len(entries)
    most = max([threshold * 1.2, *(min(entry["error"] or 0, 0.3) for entry in entries)])
    for number, entry in enumerate(entries):
        error = entry["error"]
        high = side if error is None else max(4, round(min(error, most) / most * (side - 12)))
        fill = "#2f6fd0" if entry["computed"] else "#3aa981"
        if error is None:
            fill = "#c9d6ea"
        draw.rectangle((round(number * step) + 1, side - high, round((number + 1) * step) - 1, side), fill=fill)
    level = side - round(threshold / most * (side - 12))
    draw.line((0, level, side, level), fill="#d04030", width=3)
    return made


def autotune(studio: Studio) -> Picture:
    graph = studio.graph()
    model, clip, vae = graph.embedded()
    latent = graph.add("EmptySD3LatentImage", width=96, height=96, batch_size=1)
    tuned = graph.add(
        "DiTAccelerateAutotune", model=model, positive=graph.words(clip, GREEN), negative=graph.words(clip),
        latent=latent, vae=vae, floor=40.0, trials=9, seed=3, steps=STEPS, cfg=2.5,
    )  # fmt: skip
    graph.show("chart", tuned[3])
    return studio.run(graph)["chart"][0]


def easycontrol(studio: Studio) -> Picture:
    """Two rows of the demo: the outline and the photo, and what is drawn from them."""
    cells = []
    for row in (next(r for r in ROWS if r.workflow == OUTLINE), next(r for r in ROWS if r.workflow == PHOTO)):
        graph = studio.graph()
        model, clip, vae = graph.embedded()
        graph.show("result", graph.drawn(edges(graph, model, vae, row.control), clip, vae, row.prompt, row.seed))
        cells += [example(row.control), studio.run(graph)["result"][0]]
    return sheet.sheet(cells, ["outline", "drawn by it", "photo", "drawn by it"])


def edges(graph: Graph, model, vae, name: str) -> Node:
    """Apply EasyControl by an example picture; Canny first for photographs."""
    image = graph.example(name)
    if name.startswith("photo"):
        image = graph.add("Canny", image=image, low_threshold=0.3, high_threshold=0.6)
    lora = graph.add("DiTEasyControlLoader", file="tiny_edge.safetensors")
    return graph.add("DiTEasyControlApply", model=model, vae=vae, easycontrol=lora, image=image, condition_size=96)


def freed(studio: Studio, graph: Graph, number: int) -> tuple[Picture, Node]:
    """A held-out doll, and what Apply FreeCus draws of it for words that name neither clothes nor colours."""
    from dit_toolkit.training.measure import freecus as measure

    model, clip, vae = graph.embedded()
    doll = measure.cases((0, 0, 1.0, 0), 11, number + 1)[number].reference
    mask = np.abs(doll.astype(int) - measure.GREY).max(-1) > 255 * measure.MASK
    pictures = {"doll": Image.fromarray(doll), "mask": Image.fromarray(np.uint8(mask * 255)).convert("RGB")}
    shown, hidden = (
        graph.add("LoadImage", image=studio.upload(picture, f"freecus_{number}_{name}.png"))
        for name, picture in pictures.items()
    )
    free = graph.add("DiTFreeCus", model=model, vae=vae, reference=shown[0],
                     subject=graph.add("ImageToMask", image=hidden[0], channel="red"))  # fmt: skip
    return pictures["doll"], graph.drawn(free, clip, vae, "a doll, arms up, on a pale ground", 5)


def freecus(studio: Studio) -> Picture:
    """Two dolls, and the same dolls in a scene that the prompt says nothing of colours for."""
    graph = studio.graph()
    references = []
    for number in range(2):
        reference, drawn = freed(studio, graph, number)
        references.append(reference)
        graph.show(str(number), drawn)
    made = [pictures[0] for pictures in studio.run(graph).values()]
    return sheet.sheet([*references, *made], ["reference", "reference", "with FreeCus", "with FreeCus"])


def embedded(studio: Studio) -> Picture:
    graph = studio.graph()
    model, clip, vae = graph.embedded()
    for text, seed in ((SPOTTED, 16), ("a red star, on a white ground", 8), ("an orange fish, on a pale ground", 5),
                       (YELLOW, 16)):  # fmt: skip
        graph.show(text, graph.drawn(model, clip, vae, text, seed))
    return sheet.sheet([pictures[0] for pictures in studio.run(graph).values()])


def examples(_: Studio) -> Picture:
    names = ("drawn_doll.png", "painted_doll.png", "photo_coin.jpg", "painted_person.png")
    return sheet.sheet([example(name) for name in names], [name.partition(".")[0] for name in names])


def image_difference(studio: Studio) -> Picture:
    graph = studio.graph()
    model, clip, vae = graph.embedded()
    whole = graph.drawn(model, clip, vae, YELLOW, 16, STEPS)
    fast = graph.drawn(graph.add("DiTTaylorSeer", model=model, interval=6), clip, vae, YELLOW, 16, STEPS)
    found = graph.add("DiTImageDifference", reference=whole, image=fast, threshold=0.05, heat_range=0.25)
    for name, image in {"reference": whole, "image": fast, "heat_map": found[0], "marked": found[1]}.items():
        graph.show(name, image)
    made = studio.run(graph)
    return sheet.sheet([pictures[0] for pictures in made.values()], list(made))


LINES = "a doll waving, on a grey ground\nthe doll, arms up, on a white ground"
DEMO_LORA = "dit_toolkit_demo_in_context.safetensors"


def canvas(graph: Graph, model, clip, vae, lines: str, seed: int, given: str = "") -> tuple[Node, Node, Node]:
    """The layout, its latent, and the finished canvas."""
    layout = graph.add("DiTPanelLayout", rows=1, columns=2, panel_width=96, panel_height=96, panel_prompts=lines,
                       given="1" if given else "")  # fmt: skip
    images = {"images.image_1": graph.example(given)} if given else {}
    latent = graph.add("DiTPanelLatent", panels=layout[0], vae=vae, **images)
    drawn = graph.drawn(model, clip, vae, layout[1], seed, latent=latent[0])
    return layout, latent, drawn


def in_context(studio: Studio) -> Picture:
    """The first two of the held-out sets' seeds, with the LoRA, and one without it."""
    graph = studio.graph()
    model, clip, vae = graph.embedded()
    lora = graph.add("LoraLoaderModelOnly", model=model, lora_name=DEMO_LORA, strength_model=1.0)
    for seed in (1, 2):
        graph.show(f"with the LoRA, seed {seed}", canvas(graph, lora, clip, vae, LINES, seed)[2])
    graph.show("without it, seed 1", canvas(graph, model, clip, vae, LINES, 1)[2])
    made = studio.run(graph)
    return sheet.sheet([pictures[0] for pictures in made.values()], list(made), columns=1)


def panels(studio: Studio) -> Picture:
    """One canvas of two panels, by the LoRA that ships."""
    graph = studio.graph()
    model, clip, vae = graph.embedded()
    lora = graph.add("LoraLoaderModelOnly", model=model, lora_name=DEMO_LORA, strength_model=1.0)
    graph.show("canvas", canvas(graph, lora, clip, vae, LINES, 7)[2])
    return sheet.sheet([studio.run(graph)["canvas"][0]], columns=1)


def panels_given(studio: Studio) -> Picture:
    graph = studio.graph()
    model, clip, vae = graph.embedded()
    lora = graph.add("LoraLoaderModelOnly", model=model, lora_name=DEMO_LORA, strength_model=1.0)
    lines = "a doll, arms down, on a grey ground\nthe doll, arms up, on a white ground"
    _, latent, drawn = canvas(graph, lora, clip, vae, lines, 10, "painted_scene.png")
    graph.show("before", latent[1])
    graph.show("after", drawn)
    made = studio.run(graph)
    return sheet.sheet([made["before"][0], made["after"][0]], ["panel 1 is given", "the finished canvas"], columns=1)


def panel_sets(studio: Studio) -> Picture:
    """Two of the sets that ship, a row for each."""
    folder = ROOT / "web" / "examples" / "panel_sets"
    cells = [Image.open(folder / f"set_{number:02d}" / f"{k}.png").convert("RGB") for number in (1, 2) for k in (1, 2)]
    return sheet.sheet(cells, ["set_01/1.png", "set_01/2.png", "set_02/1.png", "set_02/2.png"])


def dressed(graph: Graph, garment: str, seed: int = 1) -> tuple[Node, Node]:
    """What Try-On Prepare makes of the example person and a garment, and the finished picture."""
    model, clip, vae = graph.embedded()
    person = graph.example("painted_person.png")
    mask = graph.add("ImageToMask", image=graph.example("mask_person_shirt.png"), channel="red")
    ready = graph.add("DiTTryOnPrepare", person=person, mask=mask, garment=graph.example(garment), size="fixed",
                      width=96, height=96, margin=0.6)  # fmt: skip
    lora = graph.add("DiTLoadTryOn", file="tiny_try_on.safetensors")
    worn = graph.add("DiTTryOnApply", model=model, vae=vae, person=ready[0], garment=ready[1], try_on=lora)
    drawn = graph.drawn(worn, clip, vae, "a doll", seed, cfg=1.0)
    return ready, graph.add("DiTTryOnComposite", result=drawn, person=person, crop=ready[6], mask=ready[2], feather=6)


def try_on(studio: Studio) -> Picture:
    """The person, masked; the garment, worn."""
    graph = studio.graph()
    ready, worn = dressed(graph, "garment_spotted.png")
    graph.show("masked", ready[0])
    graph.show("worn", worn)
    made = studio.run(graph)
    cells = [square(example("painted_person.png")), made["masked"][0], example("garment_spotted.png"),
             square(made["worn"][0])]  # fmt: skip
    return sheet.sheet(cells, ["person", "masked", "garment", "worn"])


def try_on_prepare(studio: Studio) -> Picture:
    graph = studio.graph()
    ready, _ = dressed(graph, "garment_striped.png")
    graph.show("person", ready[0])
    graph.show("garment", ready[1])
    made = studio.run(graph)
    person, mask = example("painted_person.png"), example("mask_person_shirt.png").convert("L")
    over = Image.composite(Image.blend(person, Image.new("RGB", person.size, "#ff3030"), 0.6), person, mask)
    cells = [square(person), square(over), made["person"][0], made["garment"][0]]
    return sheet.sheet(cells, ["person", "mask", "for the model", "for the model"])


def restored(studio: Studio, graph: Graph, number: int) -> tuple[Picture, Node]:
    """A held-out scene, worn and made four times smaller, and what DiT4SR makes of it."""
    from dit_toolkit.training.measure import dit4sr as measure

    case = measure.scenes(number + 1)[number]
    small = Image.fromarray(case.small)
    image = graph.add("LoadImage", image=studio.upload(small, f"dit4sr_{number}.png"))
    return small, upscaled(graph, *graph.embedded("SD3.5"), image, case.text)


def dit4sr(studio: Studio) -> Picture:
    graph = studio.graph()
    smalls = []
    for number in (1, 2):
        small, made = restored(studio, graph, number)
        smalls.append(small)
        graph.show(str(number), made)
    large = [pictures[0] for pictures in studio.run(graph).values()]
    cells = [picture for pair in zip(smalls, large, strict=True) for picture in pair]
    return sheet.sheet(cells, ["small picture", "restored"] * 2)


def upscaled(graph: Graph, model, clip, vae, image, text: str, seed: int = 7) -> Node:
    patch = graph.add("DiTLoadDiT4SR", file="tiny_dit4sr.safetensors")
    applied = graph.add("DiTApplyDiT4SR", model=model, vae=vae, image=image, dit4sr=patch, cross_stream_scale=1.0,
                        min_side=16, tile=16, overlap=6, tile_batch=4)  # fmt: skip
    how = graph.add("DiTDiT4SRSampling", model=applied[0], steps=20, cfg=1.0)
    sampled = graph.add(
        "SamplerCustom", model=how[0], positive=graph.words(clip, text), negative=graph.words(clip), cfg=how[3],
        sampler=how[1], sigmas=how[2], latent_image=applied[1], add_noise=True, noise_seed=seed,
    )  # fmt: skip
    return graph.add("VAEDecode", samples=sampled, vae=vae)


STANDING = (  # the joints of the painted dancer, as a part of the picture
    '{"length": 1, "canvas": [512, 512], "key_poses": [{"frame": 0, "joints": {'
    '"nose": [0.5, 0.185], "neck": [0.5, 0.302],'
    '"right_shoulder": [0.396, 0.352], "right_elbow": [0.368, 0.465], "right_wrist": [0.34, 0.579],'
    '"left_shoulder": [0.604, 0.352], "left_elbow": [0.632, 0.465], "left_wrist": [0.66, 0.579],'
    '"right_hip": [0.437, 0.573], "right_knee": [0.415, 0.729], "right_ankle": [0.394, 0.885],'
    '"left_hip": [0.563, 0.573], "left_knee": [0.585, 0.729], "left_ankle": [0.606, 0.885]}}]}'
)


def movement(name: str = "wave_and_step") -> str:
    return (DEMO_INPUTS / "poses" / f"{name}.json").read_text(encoding="utf-8")


def posed(graph: Graph, name: str = "wave_and_step", size: int = 96) -> Node:
    """The written movement, moved to the painted dancer."""
    poses = graph.add("DiTPoseKeyframes", text=movement(name))
    standing = graph.add("DiTPoseKeyframes", text=STANDING)
    return graph.add("DiTPoseVideo", poses=poses[0], reference=standing[0], width=size, height=size, length=21,
                     style="bold")  # fmt: skip


def dancing(graph: Graph, video: Node | None, seed: int = 7) -> Node:
    """The painted dancer's clip."""
    model, clip, vae = graph.embedded("CogVideoX")
    text = "a doll with short brown hair, a red striped shirt and yellow trousers, on a grey ground"
    made = graph.add(
        "DiTDynamiCtrlConditioning", positive=graph.words(clip, text), negative=graph.words(clip), vae=vae,
        reference=graph.example("painted_dancer.png"), width=96, height=96, length=21,
        pose=None if video is None else video[0],
    )  # fmt: skip
    how = graph.add("DiTCogVideoXSampling", model=model, sampler="DDIM", steps=12)
    sampled = graph.add(
        "SamplerCustom", model=how[0], positive=made[0], negative=made[1], latent_image=made[2], sampler=how[1],
        sigmas=how[2], cfg=1.0, add_noise=True, noise_seed=seed,
    )  # fmt: skip
    return graph.add("VAEDecode", samples=sampled, vae=vae)


def dynamictrl(studio: Studio) -> Picture:
    """Two frames, with the poses drawn over them, and as they come out."""
    graph = studio.graph()
    video = posed(graph)
    clip = dancing(graph, video)
    over = graph.add("DiTPosePreview", image=clip, poses=video[2], frames=21, columns=21, tile=278, dim=0.2)
    graph.show("clip", clip)
    graph.show("over", over)
    made = studio.run(graph)
    row = made["over"][0]
    wide = row.width / 21
    frames = (1, 12)
    top = [row.crop((round(k * wide), 0, round(k * wide + wide), row.height)) for k in frames]
    return sheet.sheet([*top, *(made["clip"][k] for k in frames)], ["frame 2", "frame 13"] * 2)


def dynamictrl_frames(studio: Studio) -> Picture:
    """Three frames: their poses, drawn by them, and drawn without them."""
    graph = studio.graph()
    video = posed(graph)
    graph.show("poses", video[0])
    graph.show("with", dancing(graph, video))
    graph.show("without", dancing(graph, None))
    made = studio.run(graph)
    return sheet.stacked([sheet.sheet([made[name][k] for k in (1, 6, 14)], columns=3) for name in made])


def pose_preview(studio: Studio) -> Picture:
    """Two frames of each written movement."""
    graph = studio.graph()
    for name in ("wave_and_step", "jumping_jack"):
        preview = graph.add("DiTPosePreview", image=graph.example("painted_dancer.png"),
                            poses=posed(graph, name, 384)[2], frames=5, columns=5, tile=278)  # fmt: skip
        graph.show(name, preview)
    made = [pictures[0] for pictures in studio.run(graph).values()]
    wide = made[0].width // 5
    return sheet.sheet([row.crop((k * wide, 0, (k + 1) * wide, row.height)) for row in made for k in (0, 1)])


def pose_video(studio: Studio) -> Picture:
    graph = studio.graph()
    video = posed(graph, size=384)
    graph.show("video", video[0])
    graph.show("mask", graph.add("MaskToImage", mask=video[3]))
    made = studio.run(graph)
    cells = [example("painted_dancer.png"), made["video"][4], made["video"][10], made["mask"][0]]
    return sheet.sheet(cells, ["picture", "frame 5", "frame 11", "where it moves"])


def overview(studio: Studio) -> Picture:
    """The README's: six things that the pack does, each with what goes in and what comes out."""
    graph = studio.graph()
    model, clip, vae = graph.embedded()
    row = ROWS[0]
    graph.show("outline", graph.drawn(edges(graph, model, vae, row.control), clip, vae, row.prompt, row.seed))
    doll, scene = freed(studio, graph, 1)
    graph.show("scene", scene)
    graph.show("worn", dressed(graph, "garment_spotted.png")[1])
    lora = graph.add("LoraLoaderModelOnly", model=model, lora_name=DEMO_LORA, strength_model=1.0)
    graph.show("panels", canvas(graph, lora, clip, vae, LINES, 2)[2])
    small, large = restored(studio, graph, 2)
    graph.show("large", large)
    video = posed(graph)
    graph.show("poses", video[0])
    graph.show("clip", dancing(graph, video))
    made = studio.run(graph)
    both = made["panels"][0]
    pairs = {
        "follow an outline": (example(row.control), made["outline"][0]),
        "a subject in a new scene": (doll, made["scene"][0]),
        "try on clothes": (example("garment_spotted.png"), square(made["worn"][0])),
        "the same character twice": (both.crop((0, 0, 96, 96)), both.crop((96, 0, 192, 96))),
        "upscale": (small, made["large"][0]),
        "poses to video": (made["poses"][10], made["clip"][10]),
    }
    cells = [sheet.sheet(pictures, width=388) for pictures in pairs.values()]
    return sheet.sheet(cells, list(pairs), columns=3, width=1200, size=26)


def square(picture: Picture) -> Picture:
    """The middle of a wide picture."""
    left = (picture.width - picture.height) // 2
    return picture.crop((left, 0, left + picture.height, picture.height))


HELP = {  # on help pages, whose captions say what is where
    "accelerate": accelerate,
    "cg_taylor": cg_taylor,
    "clear": clear,
    "delta_dit": delta_dit,
    "dit4sr": dit4sr,
    "dynamictrl": dynamictrl,
    "easycontrol": easycontrol,
    "embedded": embedded,
    "examples": examples,
    "freecus": freecus,
    "image_difference": image_difference,
    "panel_sets": panel_sets,
    "panels": panels,
    "panels_given": panels_given,
    "pose_preview": pose_preview,
    "pose_video": pose_video,
    "re_ttention": re_ttention,
    "taylorseer": taylorseer,
    "try_on": try_on,
    "try_on_prepare": try_on_prepare,
}
DOCS = {  # in README and docs
    "autotune": autotune,
    "dynamictrl": dynamictrl_frames,
    "in_context": in_context,
    "overview": overview,
}


def files() -> dict[str, Callable[[Studio], Picture]]:
    help_pages = {f"web/docs/{name}.jpg": function for name, function in HELP.items()}
    return {**help_pages, **{f"docs/pictures/{name}.jpg": function for name, function in DOCS.items()}}
