"""Training and UnZip against the host: what a pass sees, what a sample is, which pictures, prompts and steps count."""

from __future__ import annotations

import re
from types import SimpleNamespace

import oracle
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training import (  # noqa: F401  fixtures
    PixelsAsLatents,
    Words,
    output,
    patcher,
    pictures,
    task,
    train,
    with_denoiser,
)
from test_unzip import PROMPTS
from test_unzip import task as unzip_task

WORDS = Words()


class Watched(PixelsAsLatents):
    """Remembers what it was given."""

    def __init__(self):
        self.seen = []

    def encode(self, pixels):
        self.seen.append(pixels.clone())
        return super().encode(pixels)


class Lengths(Words):
    """Every 'long' in a prompt makes it one block longer."""

    def encode_from_tokens_scheduled(self, text):
        length = 77 * (1 + text.count("long"))
        with torch.inference_mode():
            return tiny.full_size.random_prompt(sum(map(ord, text)), length, width=96)


def lora_of(pack, patcher, trained):  # noqa: F811
    """What is being trained, as a file for the host's loader."""
    with torch.no_grad():
        return pack.nodes.bridge.training.lora_file.lora_tensors(patcher, trained.factors(), torch.float32)


def test_a_pass_is_the_hosts_for_each_picture_and_prompt(pack, patcher):  # noqa: F811
    """Two pictures of two sizes under one prompt and a prompt of their own: sizes, space, LoRA and target."""
    images, found = [pictures(1, 64, 96), pictures(1, 64, 64, 3)], {}
    asked = task(pack, prompts=1, images=images, batch_size=1)

    def work(denoiser, given, trained):
        with torch.no_grad():
            for step in range(12):
                for rows in pack.ziplora_core.training.step_rows(given, denoiser, asked.settings, step):
                    prediction, target = denoiser(rows, trained.branch(rows))
                    found[rows.latents.shape[-2:]] = (rows, prediction.clone(), target.clone())
        found["lora"] = lora_of(pack, patcher, trained)

    with_denoiser(pack, patcher, asked, work)
    loras = [(found.pop("lora"), 1.0)]
    assert len(found) == 2
    vae, prompt = PixelsAsLatents(), WORDS.encode_from_tokens_scheduled("a sks figure 0")
    for image in images:
        size = pack.nodes.bridge.training.pictures.bucket(image.shape[2], image.shape[1], 64)
        rows, prediction, target = found[torch.Size((size[1] // 8, size[0] // 8))]
        space = patcher.model.process_latent_in(torch.ones(1, *rows.latents.shape[1:]))
        latents = rows.latents / space  # back to what a VAE gives
        if image.shape[1] == image.shape[2]:
            torch.testing.assert_close(latents, vae.encode(image), rtol=1e-2, atol=2e-2)
        expected = oracle.raw_prediction(patcher, prompt, latents, rows.noise, int(rows.timesteps), loras)
        bare = oracle.raw_prediction(patcher, prompt, latents, rows.noise, int(rows.timesteps))
        assert (prediction - expected).norm() < 1e-2 * (expected - bare).norm()
        torch.testing.assert_close(target, rows.noise, rtol=1e-2, atol=1e-2)


def test_prompts_of_two_lengths_have_passes_of_their_own(pack, patcher):  # noqa: F811
    bridge, found = pack.nodes.bridge.training, []
    shown = [bridge.pictures.TrainingImages([pictures(2)], ["a sks figure", "a long sks figure"])]
    asked = bridge.concept.Task(shown, pack.ziplora_core.training.Settings(rank=2, batch_size=8), "x", 64)

    def work(denoiser, given, device):
        found.extend(pack.ziplora_core.training.step_rows(given, denoiser, asked.settings, 0))

    with torch.inference_mode():
        made = bridge.concept.prepare(patcher, Lengths(), PixelsAsLatents(), asked)
        bridge.loading.with_denoiser(
            patcher, made, bridge.layers.trained_layers(patcher.model, "attention"), asked.settings, work
        )
    assert sorted(set(rows.prompts) for rows in found) == [{0}, {1}]


@pytest.mark.parametrize(
    ("checkpoint", "how"),
    [("sdxl_base", (20, 4.0, "euler", "normal")), ("sdxl_lightning_4step", (4, 1.0, "euler", "simple"))],
)
def test_a_sample_is_the_hosts_picture_with_that_lora(pack, patcher, monkeypatch, checkpoint, how):  # noqa: F811
    import comfy.sample
    import comfy.sd

    monkeypatch.setattr(pack.nodes.bridge.lora.base_models, "running_checkpoints", lambda: [checkpoint])
    asked, found = task(pack), {}

    def work(denoiser, given, trained):
        example = given.sets[0][0]
        found["ours"] = denoiser.sample(example.prompt, example.latents, trained.branch(None), 11).clone()
        found["lora"] = lora_of(pack, patcher, trained)

    with_denoiser(pack, patcher, asked, work)
    model, _ = comfy.sd.load_lora_for_models(patcher, None, found["lora"], 1.0, 0)
    empty, prompt = torch.zeros(1, 4, 8, 8), WORDS.encode_from_tokens_scheduled("a sks figure 0")
    noise = torch.randn(empty.shape, generator=torch.Generator().manual_seed(11))
    with torch.inference_mode():
        theirs = comfy.sample.sample(
            model, noise, *how, prompt, oracle.emptied(prompt), empty, seed=0, disable_pbar=True
        )
        ours = patcher.model.process_latent_out(found["ours"])
    assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def test_the_picture_of_a_sample_has_the_hosts_colours(pack, patcher):  # noqa: F811
    """A sample is in the model's own space, which is what the host's colour factors are for."""
    form = patcher.model.latent_format
    latents = torch.tensor([0.8, -0.6, 0.3, 0.5]).view(1, 4, 1, 1).expand(1, 4, 8, 8)
    example = SimpleNamespace(prompt=0, latents=latents)
    made = SimpleNamespace(pictures=SimpleNamespace(sets=[[example]]))
    denoiser = SimpleNamespace(sample=lambda *_: latents.clone())
    trained = SimpleNamespace(branch=lambda rows: None)
    shown = pack.nodes.bridge.training.denoiser.picture(patcher, denoiser, made, trained, 0)
    factors, bias = torch.tensor(form.latent_rgb_factors), torch.tensor(form.latent_rgb_factors_bias)
    expected = ((latents[0, :, 0, 0] @ factors + bias + 1) / 2).clamp(0, 1) * 255
    assert shown.getpixel((5, 5)) == pytest.approx(expected.tolist(), abs=4)


def test_pictures_are_cut_to_their_bucket_not_squashed_and_lose_their_alpha(pack, patcher):  # noqa: F811
    """A ramp from left to right: what is cut off its ends is what the bucket's aspect leaves over."""
    height, width = 64, 90
    ramp = torch.linspace(0, 1, width).view(1, 1, width, 1).expand(1, height, width, 4)
    vae = Watched()
    with torch.inference_mode():
        pack.nodes.bridge.training.concept.prepare(patcher, WORDS, vae, task(pack, images=[ramp]))
    (seen,) = vae.seen
    assert seen.shape[-1] == 3
    kept = height * seen.shape[2] / seen.shape[1] / width  # of the picture's width
    assert kept < 0.97, "nothing is cut: this tests nothing"
    ends = seen[0, seen.shape[1] // 2, [0, -1], 0]
    half_a_pixel = 0.5 * kept / seen.shape[2]
    expected = torch.tensor([(1 - kept) / 2 + half_a_pixel, (1 + kept) / 2 - half_a_pixel])
    torch.testing.assert_close(ends, expected, rtol=0, atol=0.012)


def test_class_pictures_of_every_batch_are_others(pack, patcher):  # noqa: F811
    asked = task(pack, class_prompt="a figure", class_count=5)
    with torch.inference_mode():
        made = pack.nodes.bridge.training.concept.prepare(patcher, WORDS, PixelsAsLatents(), asked)
    drawn = [example.latents for example in made.pictures.priors]
    assert len(drawn) == 5
    assert min((a - b).norm() / b.norm() for i, a in enumerate(drawn) for b in drawn[:i]) > 0.01


def test_only_steps_that_were_done_here_count(pack, output):  # noqa: F811
    tensors = {"lora_unet_a.lora_up.weight": torch.zeros(2, 2)}
    (output / "loras").mkdir(exist_ok=True)
    for name, about, steps in (
        ("other", {"ss_steps": "700"}, 0),
        ("mine", {"ss_steps": "700", "ziplora_settings": "x"}, 700),
    ):
        save_file(tensors, output / "loras" / f"{name}.safetensors", about)
        assert pack.nodes.bridge.training.lora_file.steps_done(f"{name}.safetensors") == steps


def test_the_report_tells_the_first_and_the_last_tenth(pack, patcher):  # noqa: F811
    done = train(pack, patcher, task(pack, steps=20, learning_rate=1e-2))
    losses = done.loss_map["loss"]
    first, last = map(float, re.search(r"loss: (\S+) over the first tenth, (\S+) over the last", done.report).groups())
    assert first == pytest.approx(sum(losses[:2]) / 2, abs=1e-4)
    assert last == pytest.approx(sum(losses[-2:]) / 2, abs=1e-4)


def test_a_steady_loss_is_shown_as_it_is(pack):
    smooth = pack.nodes.bridge.training.progress._smooth
    assert smooth([0.5] * 40) == pytest.approx([0.5] * 40)
    assert smooth([0.0] * 40 + [1.0])[-1] == pytest.approx(1 / 25)


def taken_apart(pack, monkeypatch, patcher, asked, clip=WORDS):  # noqa: F811
    """(the UnZip that is trained, contexts of each set of examples, what the run gives)."""
    core, found = pack.ziplora_core.training, []
    real = core.train

    def watch(trained, denoiser, given, *rest, **named):
        found.append((trained, denoiser, given))
        conds = denoiser._guider.conds
        found.append([[conds[str(e.prompt)][0]["cross_attn"].cpu() for e in examples] for examples in given.sets])
        return real(trained, denoiser, given, *rest, **named)

    monkeypatch.setattr(core, "train", watch)
    with torch.inference_mode():
        done = pack.nodes.bridge.unzip.unzip_picture(patcher, clip, PixelsAsLatents(), asked)
    return found[0][0], found[1], done


def said(clip, text):
    return clip.encode_from_tokens_scheduled(text)[0][0]


def test_each_lora_sees_its_own_prompt_and_the_empty_one_is_seldom(pack, monkeypatch, patcher):  # noqa: F811
    trained, sets, _ = taken_apart(pack, monkeypatch, patcher, unzip_task(pack, steps=1))
    for concept in ("content", "style"):
        own = trained._apart.contexts[concept].cpu()
        assert torch.equal(own.reshape(-1, own.shape[-1]), said(WORDS, PROMPTS[concept])[0])
    for contexts in sets:
        empty, full = (sum(torch.equal(c, said(WORDS, t)) for c in contexts) for t in ("", PROMPTS["full"]))
        assert empty + full == len(contexts) and 0 < empty < full
    assert len(sets) == 2


def test_prompts_of_different_lengths_are_repeated_to_one(pack, monkeypatch, patcher):  # noqa: F811
    for name, whole, length in (("content", "long", 154), ("style", "long long", 462)):
        words = {name: "long", "full": whole}
        changed = {n: f"{text} {words[n]}" if n in words else text for n, text in PROMPTS.items()}
        asked = unzip_task(pack, changed, steps=1)
        trained, sets, done = taken_apart(pack, monkeypatch, patcher, asked, Lengths())
        assert {c.shape[-2] for contexts in (trained._apart.contexts.values(), *sets) for c in contexts} == {length}
        other = "style" if name == "content" else "content"
        own, once = trained._apart.contexts[other].cpu(), said(Lengths(), changed[other])
        assert torch.equal(own.reshape(-1, own.shape[-1]), once.repeat(1, length // 77, 1)[0])
        assert all(torch.isfinite(torch.tensor(v)).all() for v in done.loss_map.values())


def test_going_on_counts_the_steps_that_both_files_have(pack, patcher, output):  # noqa: F811
    unzip = pack.nodes.bridge.unzip
    with torch.inference_mode():
        done = unzip.unzip_picture(patcher, WORDS, PixelsAsLatents(), unzip_task(pack, steps=2))
    ahead = output / done.files[1]
    with safe_open(str(ahead), framework="pt") as file:
        about = file.metadata()
    save_file(load_file(ahead), ahead, {**about, "ss_steps": "4"})
    with torch.inference_mode():
        names = [name.replace("\\", "/").removeprefix("loras/") for name in done.files]
        for name in names:
            asked = unzip_task(pack, steps=6, go_on_from=name)
            again = unzip.unzip_picture(patcher, WORDS, PixelsAsLatents(), asked)
            assert "steps 3 to 6" in again.report
