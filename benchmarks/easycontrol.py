"""What EasyControl costs per step: cached keys, against encoding in each step, against one joint sequence.

    python -m benchmarks.easycontrol                                 two CPU cores, about a minute
    python -m benchmarks.easycontrol --hidden 512 --double 4 --single 8
    python -m benchmarks.easycontrol --size flux1                    FLUX.1's size with random weights, on a GPU

All forms run on the same live modules and with the same attention kernel, torch's scaled_dot_product_attention, through
ComfyUI's own sampler, in one process, and must agree: the table's last column is the largest difference of their
pictures from the joint form. Results go to benchmarks/results as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import re
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_toolkit.scripts import places

RESULTS = places.ROOT / "benchmarks" / "results"
HEAD = 128
ROUNDS = 2
JOINT = "one joint sequence"
CACHES = (("encoded in each step", "off"), ("offloaded keys", "offload to CPU"), ("cached keys", "on GPU"))


@dataclass(frozen=True)
class Size:
    """Of the transformer, and of what it is given: tokens of picture, of each condition, of text."""

    hidden: int = 256
    double: int = 1
    single: int = 3
    rank: int = 32
    text_dim: int = 256
    pooled_dim: int = 64
    picture: int = 1024
    condition: int = 1024
    text: int = 128


FLUX1 = Size(3072, 19, 38, 128, 4096, 768, picture=4096, condition=1024, text=512)


def side(tokens: int) -> int:
    """Latent pixels on a side of a square picture of so many tokens."""
    return 2 * math.isqrt(tokens)


def build(size: Size, dtype: torch.dtype, device: torch.device):
    """A MODEL with random weights, loaded as ComfyUI loads a file."""
    import comfy.ldm.flux.model
    import comfy.ops
    import comfy.sd

    empty = comfy.ldm.flux.model.Flux(
        in_channels=16,
        out_channels=16,
        vec_in_dim=size.pooled_dim,
        context_in_dim=size.text_dim,
        hidden_size=size.hidden,
        mlp_ratio=4.0,
        num_heads=size.hidden // HEAD,
        depth=size.double,
        depth_single_blocks=size.single,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        operations=comfy.ops.disable_weight_init,
        device="meta",
    )
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, weight in empty.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator, device=device)
        scaled = 1 + 0.1 * noise if name.endswith("_norm.weight") else noise * 0.5 / weight.shape[-1] ** 0.5
        state[name] = scaled.to(dtype).cpu()
    return comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype})


def random_lora(size: Size, dtype: torch.dtype, seed: int):
    from dit_toolkit.host.control.easycontrol_files import from_state
    from dit_toolkit.models.control.easycontrol import ConditionLora, published_state

    lora = ConditionLora(size.hidden, size.double, size.single, size.rank, operations=torch.nn, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for weight in lora.parameters():
        weight.data = (torch.randn(weight.shape, generator=generator) * 0.4 / weight.shape[-1] ** 0.5).to(dtype)
    return from_state(published_state([lora]), f"random{seed}")


class Joint:
    """The paper's definition without a cache: [text ; picture ; conditions] as one sequence under the causal mask.

    The base layers run over picture and conditions together, LoRAs are added on the conditions' rows, attention is
    torch's own with a mask.
    """

    def __init__(self, base, conditions: list[tuple[Tensor, object]]):
        self.base = base
        self.conditions = conditions  # latent, ConditionLora

    def __call__(self, executor, x, timestep, context, y=None, guidance=None, *args, **kwargs) -> Tensor:
        from dit_toolkit.host.families import flux
        from dit_toolkit.models.control.positions import spatial_ids

        model = executor.class_obj
        img, ids = model.process_img(x)
        grid = flux.grid_size(model, *x.shape[-2:])
        tokens = [flux.latent_tokens(self.base, latent.to(x.device), 16) for latent, _ in self.conditions]
        places_of = [spatial_ids(flux.grid_size(model, *c.shape[-2:]), grid, x.device) for c, _ in self.conditions]
        loras = [lora for _, lora in self.conditions]
        for lora in loras:
            lora.to(x.device)

        own = img.shape[1]
        img = model.img_in(torch.cat([img, *tokens], 1))
        txt = model.txt_in(context)
        vec = flux.modulation_vector(model, float(timestep[0]), guidance, y, img)
        vec0 = flux.modulation_vector(model, 0.0, guidance, y, img)
        zeros = torch.zeros(1, txt.shape[1], 3, device=x.device)
        pe = model.pe_embedder(torch.cat([zeros, ids[:1], *[p[None] for p in places_of]], 1))
        lengths = [t.shape[1] for t in tokens]
        seen = torch.block_diag(*[torch.ones(n, n) for n in (txt.shape[1] + own, *lengths)]).bool()
        seen[: txt.shape[1] + own] = True
        mask = seen.to(x.device)

        def modulated(norm, h, main, zero):
            h = norm(h)
            first = h[:, :own] * (1 + main.scale) + main.shift
            return torch.cat([first, h[:, own:] * (1 + zero.scale) + zero.shift], 1)

        def gated(h, out, main, zero):
            return h + torch.cat([out[:, :own] * main.gate, out[:, own:] * zero.gate], 1)

        def with_lora(part, out, given, block):
            """`out` plus each condition's LoRA on its rows of `given`."""
            rows = given[:, own:].split(lengths, 1)
            deltas = [low[part](h) for low, h in zip(block, rows, strict=True)]
            return torch.cat([out[:, :own], out[:, own:] + torch.cat(deltas, 1)], 1)

        def heads(qkv, h, block, count):
            parts = [with_lora(name, q, h, block) for name, q in zip("qkv", qkv.chunk(3, -1), strict=True)]
            return [p.unflatten(-1, (count, -1)).transpose(1, 2) for p in parts]

        def attend(q, k, v):
            q, k = flux.apply_rope(q, pe), flux.apply_rope(k, pe)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

        for i, block in enumerate(model.double_blocks):
            low = [lora.double_blocks[i] for lora in loras]
            (m1, m2), (z1, z2), (t1, t2) = block.img_mod(vec), block.img_mod(vec0), block.txt_mod(vec)
            h = modulated(block.img_norm1, img, m1, z1)
            q, k, v = heads(block.img_attn.qkv(h), h, low, block.num_heads)
            q, k = block.img_attn.norm(q, k, v)
            t = block.txt_norm1(txt) * (1 + t1.scale) + t1.shift
            tq, tk, tv = block.txt_attn.qkv(t).unflatten(-1, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)
            tq, tk = block.txt_attn.norm(tq, tk, tv)
            out = attend(*[torch.cat(pair, 2) for pair in ((tq, q), (tk, k), (tv, v))])
            projected = block.img_attn.proj(out[:, txt.shape[1] :])
            img = gated(img, with_lora("proj", projected, projected, low), m1, z1)
            img = gated(img, block.img_mlp(modulated(block.img_norm2, img, m2, z2)), m2, z2)
            txt = txt + t1.gate * block.txt_attn.proj(out[:, : txt.shape[1]])
            txt = txt + t2.gate * block.txt_mlp(block.txt_norm2(txt) * (1 + t2.scale) + t2.shift)

        own += txt.shape[1]
        x_all = torch.cat([txt, img], 1)
        for i, block in enumerate(model.single_blocks):
            low = [lora.single_blocks[i] for lora in loras]
            (m, _), (z, _) = block.modulation(vec), block.modulation(vec0)
            h = modulated(block.pre_norm, x_all, m, z)
            qkv, mlp = block.linear1(h).split([3 * block.hidden_size, block.mlp_hidden_dim_first], -1)
            q, k, v = heads(qkv, h, low, block.num_heads)
            q, k = block.norm(q, k, v)
            x_all = gated(x_all, block.linear2(torch.cat([attend(q, k, v), block.mlp_act(mlp)], 2)), m, z)
        out = model.final_layer(x_all[:, txt.shape[1] : own], vec)
        return out.unflatten(1, grid).unflatten(-1, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class Clock:
    """PREDICT_NOISE: seconds of every evaluation, waiting for the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, executor, *args, **kwargs):
        start = self.now()
        out = executor(*args, **kwargs)
        self.seconds.append(self.now() - start)
        return out


@dataclass
class Measured:
    """What was seen of one form, over all rounds."""

    form: str
    conditions: int
    seconds: list[float] = field(default_factory=list)  # of the evaluations that count
    first: list[float] = field(default_factory=list)  # of each run's first, with the encoding where there is one
    peak: int | None = None  # bytes
    difference: float | None = None  # of the picture, from the joint form's

    def row(self, plain: float) -> dict:
        median = statistics.median(self.seconds)
        return {
            "conditions": self.conditions,
            "form": self.form,
            "milliseconds": round(1000 * median, 3),
            "fastest": round(1000 * min(self.seconds), 3),
            "slowest": round(1000 * max(self.seconds), 3),
            "first": round(1000 * min(self.first), 3),
            "relative": round(median / plain, 3),
            "peak_mib": None if self.peak is None else round(self.peak / 2**20),
            "difference": self.difference,
        }


def measure(model, size: Size, repeats: int, device: torch.device, into: Measured) -> Tensor:
    """One sampling of `repeats` evaluations that count, after two to warm up. Returns the picture."""
    import comfy.sample
    from comfy.patcher_extension import WrappersMP

    clock = Clock(device)
    timed = model.clone()
    timed.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "bench", clock)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 16, side(size.picture), side(size.picture), generator=generator)
    text = torch.randn(1, size.text, size.text_dim, generator=generator)
    prompt = [[text, {"pooled_output": torch.randn(1, size.pooled_dim, generator=generator), "guidance": 3.5}]]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    empty = torch.zeros_like(noise)
    picture = comfy.sample.sample(
        timed, noise, repeats + 2, 1.0, "euler", "simple", prompt, prompt, empty, disable_pbar=True, seed=0
    )
    into.seconds += clock.seconds[2:]
    into.first.append(clock.seconds[0])
    if device.type == "cuda":
        into.peak = max(into.peak or 0, torch.cuda.max_memory_allocated(device))
    return picture


def forms(model, size: Size, dtype: torch.dtype):
    """(name, number of conditions, MODEL): the joint form comes before those that are held to it."""
    from comfy.patcher_extension import WrappersMP

    from dit_toolkit.host.control.easycontrol import attach

    files = [random_lora(size, dtype, seed) for seed in (1, 2)]
    shape = (1, 16, side(size.condition), side(size.condition))
    latents = [torch.randn(shape, generator=torch.Generator().manual_seed(10 + i)) for i in range(2)]

    yield "no condition", 0, model
    for count in (1, 2):
        joint = model.clone()
        pairs = [(latents[i], random_lora(size, dtype, i + 1).patchers[0].model) for i in range(count)]
        joint.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "joint", Joint(model.model, pairs))
        yield JOINT, count, joint
        for name, cache in CACHES:
            controlled = model
            for file, latent in zip(files[:count], latents[:count], strict=True):
                controlled = attach(controlled, file, 0, latent, kind="spatial", cache=cache)
            yield name, count, controlled


def table(rows: list[dict]) -> str:
    """Markdown, one row per form."""
    head = "| conditions | form | ms per step | x no condition | first step, ms | peak MiB | max difference |"
    lines = [head, "|---:|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        drift = "" if row["difference"] is None else f"{row['difference']:.1e}"
        lines.append(
            f"| {row['conditions']} | {row['form']} | {row['milliseconds']:.1f} | {row['relative']:.2f} | "
            f"{row['first']:.1f} | {row['peak_mib'] or ''} | {drift} |"
        )
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def save(report: dict, device: torch.device) -> str:
    """benchmarks/results/easycontrol-<date>-<device>.json; returns the name."""
    label = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") if device.type == "cuda" else "cpu"
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"easycontrol-{report['date']}-{label}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path.name


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["small", "flux1"], default="small", help="a ready-made size")
    for name, of in Size.__dataclass_fields__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default of --size small: {of.default}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on a CPU, else bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="evaluations that count, at least 5")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(argv)
    if options.repeats < 5:
        parser.error(f"--repeats must be at least 5, got {options.repeats}")
    for name in Size.__dataclass_fields__:
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.hidden and options.hidden % HEAD:
        parser.error(f"--hidden must be a multiple of {HEAD}, the size of a head, got {options.hidden}")
    for name in ("picture", "condition"):
        tokens = getattr(options, name)
        if tokens and math.isqrt(tokens) ** 2 != tokens:
            parser.error(f"--{name} must be the square of a number of tokens, as 1024 is of 32, got {tokens}")
    return options


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    sys.path.append(str(places.comfyui()))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.use_pytorch_cross_attention = True  # the joint form's kernel; on a CPU core would take another one
    import comfy.ldm.modules.attention
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    chosen = {name: value for name in Size.__dataclass_fields__ if (value := getattr(options, name)) is not None}
    size = Size(**{**(FLUX1 if options.size == "flux1" else Size()).__dict__, **chosen})
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    per_round = math.ceil(options.repeats / ROUNDS)

    models = list(forms(build(size, dtype, device), size, dtype))
    found = [Measured(form, count) for form, count, _ in models]
    for _ in range(ROUNDS):  # whatever else the machine does hits all forms alike
        joint: dict[int, Tensor] = {}
        for (form, count, model), measured in zip(models, found, strict=True):
            picture = measure(model, size, per_round, device, measured)
            if form == JOINT:
                joint[count] = picture
            elif count:
                measured.difference = float((picture - joint[count]).abs().max())
    rows = [measured.row(statistics.median(found[0].seconds)) for measured in found]

    report = {
        "benchmark": "easycontrol",
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": comfy.ldm.modules.attention.optimized_attention.__name__,
        "repeats": per_round * ROUNDS,
        "size": size.__dict__,
        "rows": rows,
    }
    print(table(rows))
    if not options.no_save:
        print(f"\nSaved as {save(report, device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
