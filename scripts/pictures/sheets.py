"""Sheets of what the nodes do, drawn by the embedded models on the real server. Seeds were chosen among a few."""

from __future__ import annotations

import json
import math
from pathlib import Path

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
        name if number == 0 else f"{name}: {psnr(made[0], picture):.0f} dB"
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
    every = {f"interval {n}": ("DiTDeltaDiT", {"interval": n}) for n in (2, 3, 4)}
    return accelerated(studio, {"all computed": None, **every}, "an orange fish, on a pale ground", 5)


def re_ttention(studio: Studio) -> Picture:
    how = {"first_full": 6, "min_tokens": 0, "interval": 5}
    variants = {
        "full attention": None,
        "a quarter": ("DiTReTtention", {**how, "keep": 0.25}),
        "an eighth": ("DiTReTtention", {**how, "keep": 0.125}),
        "quarter, share only": ("DiTReTtention", {**how, "keep": 0.25, "storage": "share only"}),
    }
    return accelerated(studio, variants, YELLOW, 16)


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


def contact_sheet(studio: Studio) -> Picture:
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


def subject(graph: Graph, model, vae) -> Node:
    mask = graph.add("ImageToMask", image=graph.example("mask_doll.png"), channel="red")
    return graph.add("DiTFreeCus", model=model, vae=vae, reference=graph.example("painted_doll.png"), subject=mask)


def freecus(studio: Studio) -> Picture:
    graph = studio.graph()
    model, clip, vae = graph.embedded()
    free = subject(graph, model, vae)
    first = "a doll, arms up, on a pale ground"
    graph.show("alone", graph.drawn(model, clip, vae, first, 5))
    graph.show("with", graph.drawn(free, clip, vae, first, 5))
    graph.show("other", graph.drawn(free, clip, vae, "a doll waving, on a dark ground", 6))
    made = studio.run(graph)
    cells = [example("painted_doll.png"), *(made[name][0] for name in ("alone", "with", "other"))]
    return sheet.sheet(cells, ["reference", "prompt alone", "with FreeCus", "another scene"])


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


def panels_given(studio: Studio) -> Picture:
    graph = studio.graph()
    model, clip, vae = graph.embedded()
    lora = graph.add("LoraLoaderModelOnly", model=model, lora_name=DEMO_LORA, strength_model=1.0)
    lines = "a doll, arms down, on a grey ground\nthe doll, arms up, on a white ground"
    layout, latent, drawn = canvas(graph, lora, clip, vae, lines, 10, "painted_scene.png")
    split = graph.add("DiTPanelSplit", panels=layout[0], image=drawn)
    for name, image in {"canvas": latent[1], "drawn": drawn, "panels": split}.items():
        graph.show(name, image)
    made = studio.run(graph)
    cells = [made["canvas"][0], made["drawn"][0], *made["panels"]]
    return sheet.stacked([
        sheet.sheet(cells[:2], ["canvas, panel 1 given", "drawn"]), sheet.sheet(cells[2:], ["panel 1", "panel 2"])
    ])  # fmt: skip


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
    graph = studio.graph()
    for name in ("garment_striped.png", "garment_spotted.png"):
        graph.show(name, dressed(graph, name)[1])
    made = studio.run(graph)
    cells = []
    for name, pictures in made.items():
        cells += [example(name), square(pictures[0])]
    return sheet.sheet(cells, ["garment", "worn", "garment", "worn"])


def try_on_prepare(studio: Studio) -> Picture:
    graph = studio.graph()
    ready, _ = dressed(graph, "garment_striped.png")
    graph.show("person", ready[0])
    graph.show("garment", ready[1])
    made = studio.run(graph)
    person, mask = example("painted_person.png"), example("mask_person_shirt.png").convert("L")
    over = Image.composite(Image.blend(person, Image.new("RGB", person.size, "#ff3030"), 0.6), person, mask)
    cells = [over, made["person"][0], example("garment_striped.png"), made["garment"][0]]
    return sheet.sheet(cells, ["person and mask", "cropped, hidden", "garment", "as the model sees it"])


def dit4sr(studio: Studio) -> Picture:
    """A held-out scene: worn and small, enlarged plainly, by DiT4SR, and as it was."""
    from dit_toolkit.training.measure import dit4sr as measure

    case = measure.scenes(3)[2]
    small, truth = Image.fromarray(case.small), Image.fromarray(case.picture)
    graph = studio.graph()
    model, clip, vae = graph.embedded("SD3.5")
    image = graph.add("LoadImage", image=studio.upload(small, "dit4sr_small.png"))
    graph.show("made", upscaled(graph, model, clip, vae, image, case.text))
    made = studio.run(graph)["made"][0]
    plain = small.resize(truth.size, Image.Resampling.BICUBIC)
    cells = [small.resize(truth.size, Image.Resampling.NEAREST), plain, made, truth]
    return sheet.sheet(cells, ["small picture", "enlarged plainly", "with DiT4SR", "the truth"])


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


WORN = (  # what the worn example shows
    "a doll with short brown hair, a purple spotted shirt and a yellow skirt, arms down, a green heart on the left, "
    "on a grey ground"
)
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
    """Three frames under their poses, drawn by them, and drawn without them."""
    graph = studio.graph()
    video = posed(graph)
    graph.show("poses", video[0])
    graph.show("with", dancing(graph, video))
    graph.show("without", dancing(graph, None))
    made = studio.run(graph)
    return sheet.stacked([sheet.sheet([made[name][k] for k in (4, 10, 16)], columns=3) for name in made])


def pose_preview(studio: Studio) -> Picture:
    graph = studio.graph()
    preview = graph.add("DiTPosePreview", image=graph.example("painted_dancer.png"), poses=posed(graph, size=384)[2],
                        frames=4, columns=2, tile=278)  # fmt: skip
    graph.show("preview", preview)
    return studio.run(graph)["preview"][0]


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
    free = subject(graph, model, vae)
    graph.show("subject", graph.drawn(free, clip, vae, "a doll, arms up, on a pale ground", 5))
    graph.show("garment", dressed(graph, "garment_spotted.png")[1])
    lora = graph.add("LoraLoaderModelOnly", model=model, lora_name=DEMO_LORA, strength_model=1.0)
    graph.show("panels", canvas(graph, lora, clip, vae, LINES, 7)[2])
    second = graph.embedded("SD3.5")
    graph.show("large", upscaled(graph, *second, graph.example("worn_doll.png"), WORN))
    video = posed(graph)
    graph.show("poses", video[0])
    graph.show("clip", dancing(graph, video))
    made = studio.run(graph)
    worn = made["garment"][0]
    pairs = [
        ("follow an outline", [example(row.control), made["outline"][0]]),
        ("a subject in a new scene", [example("painted_doll.png"), made["subject"][0]]),
        ("try on clothes", [example("garment_spotted.png"), square(worn)]),
        (
            "the same character twice",
            [made["panels"][0].crop((0, 0, 96, 96)), made["panels"][0].crop((96, 0, 192, 96))],
        ),
        ("upscale", [example("worn_doll.png"), made["large"][0]]),
        ("poses to video", [made["poses"][10], made["clip"][10]]),
    ]
    cells = [sheet.sheet(pictures, width=388) for _, pictures in pairs]
    return sheet.sheet(cells, [name for name, _ in pairs], columns=3, width=1200, size=26)


def square(picture: Picture) -> Picture:
    """The middle of a wide picture."""
    left = (picture.width - picture.height) // 2
    return picture.crop((left, 0, left + picture.height, picture.height))


def files() -> dict[str, object]:
    folder = Path("web/examples")
    return {
        str(folder / name): function
        for name, function in {
            "accelerate.jpg": accelerate,
            "autotune.png": autotune,
            "cg_taylor.png": cg_taylor,
            "contact_sheet.jpg": contact_sheet,
            "delta_dit.jpg": delta_dit,
            "dit4sr.jpg": dit4sr,
            "dynamictrl.jpg": dynamictrl,
            "freecus.jpg": freecus,
            "image_difference.png": image_difference,
            "in_context.jpg": in_context,
            "overview.jpg": overview,
            "panel_sets.png": panel_sets,
            "panels_given.png": panels_given,
            "pose_preview.png": pose_preview,
            "pose_video.png": pose_video,
            "re_ttention_quarter.png": re_ttention,
            "taylorseer.jpg": taylorseer,
            "try_on.jpg": try_on,
            "try_on_prepare.png": try_on_prepare,
        }.items()
    }
