"""Two samplers on one accelerated model, two reports: each is of the run that it is wired to."""

import pytest

pytestmark = pytest.mark.comfy

SEER = dict(interval=3, order=1, first_full=3, last_full=0, spacing="to the last step", tap="auto",
            forecast="Taylor (paper)", schedule="", start_percent=0.0, end_percent=1.0, offload=False,
            max_memory=0.0)  # fmt: skip


def node(class_type: str, /, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def two_stages(seed: int, first_report: str) -> dict:
    """`first_report`: the id of the first sampler's report node, which decides when ComfyUI runs it."""

    def sampler(latent, steps, seed, denoise):
        return node("KSampler", model=["seer", 0], positive=["text", 0], negative=["text", 0], latent_image=latent,
                    seed=seed, steps=steps, cfg=1.0, sampler_name="euler", scheduler="simple",
                    denoise=denoise)  # fmt: skip

    return {
        first_report: node("DiTAccelerationReport", report=["seer", 1], after=["first picture", 0]),
        f"{first_report} shown": node("PreviewAny", source=[first_report, 0]),
        "models": node("DiTLoadEmbedded"),
        "text": node("CLIPTextEncode", clip=["models", 1], text="a doll"),
        "seer": node("DiTTaylorSeer", model=["models", 0], **SEER),
        "empty": node("EmptySD3LatentImage", width=96, height=96, batch_size=1),
        "first": sampler(["empty", 0], 12, seed, 1.0),
        "first picture": node("VAEDecode", samples=["first", 0], vae=["models", 2]),
        "second": sampler(["first", 0], 20, seed, 0.6),
        "report of the second": node("DiTAccelerationReport", report=["seer", 1], after=["second", 0]),
        "second shown": node("PreviewAny", source=["report of the second", 0]),
        "report of none": node("DiTAccelerationReport", report=["seer", 1], after=["empty", 0]),
        "none shown": node("PreviewAny", source=["report of none", 0]),
    }


def shown(result, name: str) -> str:
    (text,) = result.outputs[name]["text"]
    return text


@pytest.mark.parametrize("first_report", ["a report", "z report"])
def test_each_report_is_of_the_sampler_that_it_is_wired_to(server, first_report):
    result = server.client.run(two_stages(11, first_report))
    assert "TaylorSeer: 12 evaluations" in shown(result, f"{first_report} shown")
    assert "20 evaluations" not in shown(result, f"{first_report} shown")
    assert "TaylorSeer: 20 evaluations" in shown(result, "second shown")
    assert "12 evaluations" not in shown(result, "second shown")


def test_a_report_that_no_sampler_is_wired_to_says_so(server):
    text = shown(server.client.run(two_stages(12, "report")), "none shown")
    assert "evaluations" not in text
    assert "No sampler" in text
