"""What people type into the search of nodes, and what of the pack comes first: ranked by the page's own service."""

import pytest

pytestmark = pytest.mark.comfy

# The word, and the node that it should bring up. The page looks at id, name and aliases, not at descriptions.
FIRST = {
    **dict.fromkeys(
        ("speed", "speed up", "fast", "faster", "accelerate", "cache", "teacache", "wavespeed", "magcache",
         "first block cache", "fbcache", "step cache"),
        "DiTAccelerate",
    ),
    **dict.fromkeys(("autotune", "benchmark"), "DiTAccelerateAutotune"),
    **dict.fromkeys(("taylorseer", "skip steps"), "DiTTaylorSeer"),
    **dict.fromkeys(("cg-taylor", "gate"), "DiTCGTaylor"),
    **dict.fromkeys(("delta-dit", "few steps"), "DiTDeltaDiT"),
    **dict.fromkeys(("sparse attention", "re-ttention"), "DiTReTtention"),
    **dict.fromkeys(("local attention", "4k", "large picture"), "DiTClear"),
    **dict.fromkeys(
        ("easycontrol", "controlnet", "ipadapter", "ip adapter", "style", "style transfer", "ghibli", "reference",
         "canny", "edges", "depth", "scribble", "lineart", "inpainting"),
        "DiTEasyControlApply",
    ),
    **dict.fromkeys(("freecus", "personalization"), "DiTFreeCus"),
    **dict.fromkeys(
        ("in-context lora", "consistent character", "storyboard", "character sheet", "grid"), "DiTPanelLayout"
    ),
    "train lora": "DiTPrepareTraining",
    "dataset": "DiTPanelSets",
    **dict.fromkeys(("vton", "clothes", "outfit", "garment"), "DiTTryOnApply"),
    **dict.fromkeys(("upscale", "super resolution", "restore", "enhance", "supir"), "DiTApplyDiT4SR"),
    **dict.fromkeys(("openpose", "dwpose", "dance", "motion", "animate", "video"), "DiTPoseVideo"),
    "psnr": "DiTImageDifference",
}  # fmt: skip

ASK = """
const root = [...document.querySelectorAll('*')].map(element => element.__vue_app__).find(Boolean);
const { nodeSearchService } = root.config.globalProperties.$pinia._s.get('nodeDef');
return Object.fromEntries(a.map(word => [word, nodeSearchService.searchNode(word).map(node => node.name)]));
"""


@pytest.fixture(scope="module")
def found(page) -> dict[str, list[str]]:
    """All nodes that the page offers for a word, best first."""
    return page.evaluate(ASK, list(FIRST))


@pytest.mark.parametrize("word", FIRST)
def test_the_word_brings_up_the_node_for_it(word, found):
    ours = [name for name in found[word] if name.startswith("DiT")]
    assert ours[:1] == [FIRST[word]], f"{word}: {ours[:3]}"


@pytest.mark.parametrize("word", ["speed", "speed up", "faster"])
def test_no_speed_is_promised_where_usual_sizes_gain_none(word, found):
    assert not {"DiTClear", "DiTReTtention"} & set(found[word])
