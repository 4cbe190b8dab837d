"""What a LoRA says of its use: headers as each trainer writes them, files beside it as each manager does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ziplora_core import families, formats, tag_counts, triggers


def kohya(folders: dict[str, dict[str, int]], images: dict[str, tuple[int, int]], **more: Any) -> dict[str, str]:
    """Metadata as kohya's scripts write it. images: folder -> (repeats, pictures)."""
    dirs = {name: {"n_repeats": repeats, "img_count": count} for name, (repeats, count) in images.items()}
    made = {"ss_tag_frequency": folders, "ss_dataset_dirs": dirs, "ss_reg_dataset_dirs": {}, **more}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in made.items()}


def counted(captions: list[str]) -> dict[str, int]:
    """Tag counts of captions, in the order of their first appearance and in lower case, as kohya's scripts count."""
    counts: dict[str, int] = {}
    for caption in captions:
        for tag in filter(None, (part.strip().lower() for part in caption.split(","))):
            counts[tag] = counts.get(tag, 0) + 1
    return counts


def test_without_captions_the_folders_words_are_the_prompt() -> None:
    found = triggers.known(kohya({"10_sks dog": counted(["sks dog"] * 5)}, {"10_sks dog": (10, 5)}), {})
    assert (found.prompt, found.source) == ("sks dog", "ss_tag_frequency")


def test_tags_on_nearly_every_picture_join_the_folders_words_and_no_others_do() -> None:
    captions = [f"sks, dog, masterpiece, {scene}" for scene in ("beach", "snow", "beach", "street", "sofa")]
    captions += ["sks, dog, red collar"] * 5
    found = triggers.known(kohya({"4_sks": counted(captions)}, {"4_sks": (4, 10)}), {})
    assert found.prompt == "sks, dog"
    almost = counted([*["szn style, lines"] * 18, "szn style, lines", "szn style"])  # 19 of 20
    assert tag_counts.prompt(kohya({"1_szn style": almost}, {"1_szn style": (1, 20)})) == "szn style, lines"
    half = counted([*["szn style, lines"] * 10, *["szn style"] * 10])
    assert tag_counts.prompt(kohya({"1_szn style": half}, {"1_szn style": (1, 20)})) == "szn style"


def test_a_folders_words_that_no_caption_held_were_never_trained() -> None:
    captions = counted(["kolp, mountain", "kolp, lake", "kolp, house"])
    assert tag_counts.prompt(kohya({"10_images": captions}, {"10_images": (10, 3)})) == "kolp"
    # Where nothing stands on nearly every picture, they are all that is known.
    apart = counted(["mountain", "lake", "house"])
    assert tag_counts.prompt(kohya({"10_my style": apart}, {"10_my style": (10, 3)})) == "my style"


def test_sentences_are_no_tags_and_the_prompt_stays_short() -> None:
    sentence = "a watercolor painting of a small village at the foot of a mountain"
    many = {f"tag {n}": 20 for n in range(60)}
    found = tag_counts.prompt(kohya({"1_wc tag": {sentence: 20, **many}}, {"1_wc tag": (1, 20)}))
    assert found == "wc tag, tag 0, tag 1, tag 2, tag 3"


def test_the_folder_that_was_seen_most_counts_and_no_regularization() -> None:
    folders = {"1_dog": {"dog": 900}, "20_sks dog": {"sks dog": 30}, "2_sks cat": {"sks cat": 40}}
    dirs = {"20_sks dog": (20, 30), "2_sks cat": (2, 40)}
    made = kohya(folders, dirs, ss_reg_dataset_dirs={"1_dog": {"n_repeats": 1, "img_count": 900}})
    assert tag_counts.prompt(made) == "sks dog"


def test_class_words_and_prefix_of_a_table_of_settings() -> None:
    subset = {"image_dir": "data", "class_tokens": "zwx robot", "img_count": 4, "caption_prefix": "zwx style, "}
    made = kohya({"data": {"zwx robot": 4}}, {"data": (1, 4)}, ss_datasets=[{"subsets": [subset]}])
    assert tag_counts.prompt(made) == "zwx style, zwx robot"


def test_ai_toolkit_and_counts_without_pictures() -> None:
    assert tag_counts.prompt({"ss_tag_frequency": '{"1_p3r5on": {"p3r5on": 1}}'}) == "p3r5on"
    caption = counted(["a man, at the sea, in the evening"])  # one caption of many that differ: nothing is usual
    assert tag_counts.prompt({"ss_tag_frequency": json.dumps({"data": caption})}) == ""


@pytest.mark.parametrize(
    ("metadata", "prompt", "source"),
    [
        ({"modelspec.trigger_phrase": "sks dog", "trigger_word": "other"}, "sks dog", "modelspec.trigger_phrase"),
        ({"trigger_words": '["kolp", "hand-drawn"]'}, "kolp, hand-drawn", "trigger_words"),
        ({"instance_prompt": " a photo of\nsks  dog "}, "a photo of sks dog", "instance_prompt"),
        ({"ziplora_prompt": "a sks dog"}, "a sks dog", "ziplora_prompt"),
        ({"modelspec.usage_hint": "Trigger word: mypetcat"}, "mypetcat", "modelspec.usage_hint"),
        ({"modelspec.usage_hint": "Use keyword 'example'"}, "example", "modelspec.usage_hint"),
        ({"modelspec.usage_hint": "Works best at 0.8"}, "", ""),
        ({"modelspec.trigger_phrase": "None"}, "", ""),
        ({"format": "pt"}, "", ""),
    ],
)
def test_explicit_phrases_of_a_header(metadata: dict[str, str], prompt: str, source: str) -> None:
    found = triggers.known(metadata, {})
    assert (found.prompt, found.source) == (prompt, source)


def test_an_explicit_phrase_comes_before_tag_counts_and_a_file_beside_before_both() -> None:
    header = {"modelspec.trigger_phrase": "phrase", **kohya({"1_folder": {"folder": 3}}, {"1_folder": (1, 3)})}
    assert triggers.known(header, {}).prompt == "phrase"
    assert triggers.known(header, {"civitai.info": {"trainedWords": ["site"]}}).prompt == "site"
    assert triggers.known(header, {"civitai.info": {"trainedWords": []}}).prompt == "phrase"


@pytest.mark.parametrize(
    ("kind", "found", "expected"),
    [
        (
            "civitai.info",
            {"id": 1, "trainedWords": ["sks", "dog"], "baseModel": "SDXL 1.0", "images": [{"url": "https://x.test"}]},
            ("sks, dog", "SDXL 1.0", "SDXL", None),
        ),
        (  # two outfits: no prompt is both
            "civitai.info",
            {"trainedWords": ["ana \\(x\\), red dress", "ana \\(x\\), coat"], "baseModel": "Illustrious"},
            ("ana \\(x\\), red dress", "Illustrious", "SDXL", None),
        ),
        (
            "metadata.json",
            {
                "base_model": "Flux.1 D",
                "civitai": {"trainedWords": ["kolp"], "images": []},
                "usage_tips": '{"strength": 0.8, "strength_max": 1.1}',
            },
            ("kolp", "Flux.1 D", "Flux", 0.8),
        ),
        (
            "json",
            {"activation text": "<lora:x:1> sks dog", "preferred weight": 0.65, "notes": "n", "sd version": "SD1"},
            ("sks dog", "SD1", "SD 1.5", 0.65),
        ),
        (  # a page saved without choosing anything
            "json",
            {"activation text": "", "preferred weight": 0, "notes": "", "sd version": "Unknown"},
            ("", "", "", None),
        ),
        ("cm-info.json", {"TrainedWords": ["<b>zwx</b>"], "BaseModel": "Pony"}, ("zwx", "Pony", "SDXL", None)),
        (
            "rgthree-info.json",
            {"trainedWords": [{"word": "zwx", "civitai": True}, {"word": "mech"}], "baseModel": "SD 1.5"},
            ("zwx, mech", "SD 1.5", "SD 1.5", None),
        ),
        ("txt", "sks dog,\n\nwearing a hat\n", ("sks dog, wearing a hat", "", "", None)),
        (
            "README.md",
            triggers.front_matter(
                "---\ntags:\n- flux\nbase_model:\n- black-forest-labs/FLUX.1-dev\ninstance_prompt: 'TOK dog'\n---\n"
                "# x\ninstance_prompt: not this\n"
            ),
            ("TOK dog", "black-forest-labs/FLUX.1-dev", "Flux", None),
        ),
    ],
)
def test_files_beside_a_lora(kind: str, found: Any, expected: tuple[str, str, str, float | None]) -> None:
    known = triggers.known({}, {kind: found})
    assert (known.prompt, known.base_model, known.family, known.strength) == expected
    assert known.source == (kind if expected[0] else "")


def test_a_site_tells_lines_apart_and_the_checkpoints_file_does_where_none_says_it() -> None:
    header = {"ss_base_model_version": "sdxl_base_v1-0", "ss_sd_model_name": "ponyDiffusionV6XL_v6.safetensors"}
    found = triggers.known(header, {})
    assert (found.base_model, found.family, found.line) == ("sdxl_base_v1-0", "SDXL", "Pony")
    coarse = {"json": {"sd version": "SDXL"}, "civitai.info": {"baseModel": "NoobAI"}}
    found = triggers.known({"ss_base_model_version": "sdxl_base_v1-0"}, coarse)
    assert (found.base_model, found.line) == ("NoobAI", "Illustrious or NoobAI")
    assert triggers.known({"ss_base_model_version": "sd_v1", "ss_sd_model_name": "pony.ckpt"}, {}).line == ""


# What trainers write and sites list, by family.
NAMES = {
    "SD 1.5": ["sd_v1", "sd_1.5", "stable-diffusion-v1/lora", "SD 1.4", "SD 1.5 LCM", "SD1", "SD1.5"],
    "SD 2": ["sd_v2", "sd_2.1", "stable-diffusion-v2-768-v/lora", "SD 2.1", "SD2"],
    "SDXL": ["sdxl_base_v1-0", "sdxl_", "sdxl_1.0", "stable-diffusion-xl-v1-base/lora", "SDXL 1.0", "SDXL Lightning"]
    + ["Pony", "Illustrious", "NoobAI", "Animagine XL 3.1", "stabilityai/stable-diffusion-xl-base-1.0"],
    "SDXL refiner": ["stable-diffusion-xl-v1-refiner"],
    "SD 3": ["sd3", "stable-diffusion-3-medium/lora", "SD 3.5 Large", "stable-diffusion-3-5-large"],
    "Flux": ["flux1", "flux-1-dev/lora", "Flux.1 D", "Flux.1 S", "FLUX.1-dev", "black-forest-labs/FLUX.1-dev"],
    "Flux 2": ["Flux.2 D", "Flux.2 Klein 9B"],
    "Chroma": ["chroma", "Chroma"],
    "Qwen-Image": ["Qwen", "qwen_image", "Qwen/Qwen-Image"],
    "Lumina 2 or Z-Image": ["lumina-2/lora", "ZImageTurbo", "Z-Image", "Lumina2"],
    "Wan": ["Wan Video 14B t2v", "wan2.1", "Wan2.2"],
    "HunyuanVideo": ["Hunyuan Video", "hunyuan_video"],
    "HunyuanImage": ["Hunyuan Image 2.1", "hunyuan_image"],
    "HunyuanDiT": ["hunyuan-dit-g2/lora", "HunyuanDiT"],
    "HiDream": ["HiDream", "HiDream-I1-Full"],
    "LTX-Video": ["LTXV", "LTX-Video"],
    "Anima": ["Anima", "circlestone-labs/Anima"],
    "Cosmos Predict2": ["Cosmos-Predict2-2B"],
    "Krea 2": ["Krea 2", "krea2"],
    "": ["Pony V7", "AuraFlow", "Kolors", "custom", "", "my own base", "animated base"],
}


@pytest.mark.parametrize(("name", "family"), [(name, family) for family, names in NAMES.items() for name in names])
def test_families_by_the_names_that_are_written(name: str, family: str) -> None:
    assert families.family(name) == family


def test_families_are_called_as_shapes_call_them() -> None:
    by_shape = {name for name, _ in formats._FAMILIES} | set(formats._CONTEXT_WIDTHS.values())
    assert not {name for name in by_shape - set(NAMES) if not set(name.split(" or ")) <= set(NAMES)}


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    "said",
    ["", "{", "null", "[]", "3", '"text"', deep(200_000), '{"a": ' * 100_000 + "1", "1" * 10_000, '{"1_a": null}']
    + ['{"1_a": {"a": "many"}}', '{"1_a": {"a": NaN}}', '{"1_a": {"a": -1}}', '{"1_a": {"a": true, " ": 3}}'],
)
@pytest.mark.parametrize("key", ["ss_tag_frequency", "ss_dataset_dirs", "ss_datasets", "trigger_words"])
def test_broken_and_hostile_values_say_nothing_or_little(key: str, said: str) -> None:
    good = {} if key == "ss_tag_frequency" else {"ss_tag_frequency": '{"1_sks dog": {"sks dog": 5}}'}
    found = triggers.known({**good, key: said}, {})
    assert len(found.prompt) <= triggers.LONGEST
    if key in ("ss_dataset_dirs", "ss_datasets"):
        assert found.prompt == "sks dog"
    if key == "ss_tag_frequency":
        assert found.prompt in ("", "a")


@pytest.mark.parametrize(
    "found",
    [
        {"trainedWords": "x" * 10**6, "baseModel": ["a"] * 9, "preferred weight": "1e999"},
        {"trainedWords": [{}, None, 3, [["x"]]], "baseModel": {"a": 1}, "preferred weight": [1]},
        {"trainedWords": [["deep"]] * 10**5, "usage_tips": deep(10**5), "civitai": [1]},
        {"activation text": {"a": 1}, "preferred weight": True, "usage_tips": {"strength": float("nan")}},
        {"preferred weight": 10**400, "base_model": None, "civitai": {"trainedWords": None}},
        {"activation text": "<" * 10**5, "preferred weight": -(10**9)},
    ],
)
def test_other_kinds_of_values_in_files_beside_are_passed_over(found: dict[str, Any]) -> None:
    known = triggers.known({"trigger_word": found, "modelspec.usage_hint": found}, {"json": found})
    assert len(known.prompt) <= triggers.LONGEST and len(known.base_model) <= 120 and known.strength is None


@pytest.mark.parametrize(
    ("said", "prompt"),
    [
        ("a photo of <s0><s1>", "a photo of <s0><s1>"),
        ("a <sks> dog, <cat-toy> in <style>", "a <sks> dog, <cat-toy> in <style>"),
        ("<lora:dog:0.8> sks dog <lyco:a> <hypernet:b:1>", "sks dog"),
        ("<LoRA:dog> sks<br/>dog", "sks dog"),
        ("<p class='x'>sks <strong>dog</strong></p>", "sks dog"),
        ("sks dog <svg/onload=alert(1)>", "sks dog"),
    ],
)
def test_of_angle_brackets_only_markup_goes(said: str, prompt: str) -> None:
    assert triggers.known({}, {"civitai.info": {"trainedWords": [said]}}).prompt == prompt
    assert triggers.known({"modelspec.trigger_phrase": said}, {}).prompt == prompt


@pytest.mark.parametrize(
    "said",
    [
        "This LoRA was trained by me. License: CC-BY. Please do not sell.",
        "Use it at 0.8. Good luck",
        "Please credit me",
        "see https://example.test/x for the words",
        "我的模型。请勿出售",
        "it draws a dog that I photographed on many a long walk at the sea and which has become quite famous since",
    ],
)
def test_a_text_to_read_is_no_prompt(said: str) -> None:
    assert triggers.known({}, {"txt": said}) == triggers.Triggers()
    counted = triggers.known({"ss_tag_frequency": '{"1_sks dog": {"sks dog": 5}}'}, {"txt": said})
    assert (counted.prompt, counted.source) == ("sks dog", "ss_tag_frequency")


@pytest.mark.parametrize(
    "said",
    [
        "A photo of sks dog.",
        "St. Bernard dog, v1.0 style",
        "art by h. r. giger",
        "love live! school idol project, 1girl",
    ]
    + ["mrs. smith", "@artist, k-on! yui"],
)
def test_a_text_of_words_is_a_prompt_behind_the_headers_own(said: str) -> None:
    found = triggers.known({"ss_tag_frequency": '{"1_x": {"x": 5}}'}, {"txt": said})
    assert (found.prompt, found.source) == (said, "txt")
    found = triggers.known({"modelspec.trigger_phrase": "phrase"}, {"txt": said})
    assert (found.prompt, found.source) == ("phrase", "modelspec.trigger_phrase")


def test_a_prompt_is_one_printable_line() -> None:
    words = "dog\u202e\x00,\n\ncat &amp; <script>x</script>"
    assert triggers.known({}, {"txt": words}).prompt == "dog, cat & x"
    long = ", ".join(f"tag {n}" for n in range(500))
    cut = triggers.known({}, {"txt": long}).prompt
    assert len(cut) <= triggers.LONGEST and long.startswith(cut + ",")
