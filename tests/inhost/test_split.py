"""Split Concept: its gradient, its two files in the host's own prompts, its scores, and what it leaves behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import test_embedding
import torch
from test_embedding import PROMPTS, as_bytes, encoded, witness
from test_scores import CLIP, encoder
from test_training import pictures

folder, clip = test_embedding.folder, test_embedding.clip  # fixtures


def task(pack, **changes) -> Any:
    Settings = pack.ziplora_core.split.Settings
    settings = {"steps": 2, "learning_rate": 1e-2, "seeds": 2} | {
        k: changes.pop(k) for k in list(changes) if k in Settings.__dataclass_fields__
    }
    defaults = {"pictures": [pictures(2, 128, 128)], "prompts": PROMPTS, "initial": "star", "resolution": 128}
    defaults["drawn"] = 2
    return pack.nodes.bridge.training.split.Task(settings=Settings(**settings), **{**defaults, **changes})


def run(pack, loaded, asked):
    with torch.inference_mode():
        return pack.nodes.bridge.training.split.split_concept(loaded.model, loaded.clip, loaded.vae, asked)


def flat(*given):
    """What words draw, at once: for tests of what comes before."""
    return [torch.zeros(2, 8, 8, 3), torch.ones(2, 8, 8, 3)]


@pytest.fixture
def undrawn(pack, monkeypatch):
    monkeypatch.setattr(pack.nodes.bridge.training.split, "_drawn", flat)


@pytest.fixture
def few_steps(pack, monkeypatch):
    """Of the sampler, for each picture."""
    monkeypatch.setattr(pack.nodes.bridge.drawing.recipes, "STEPS", 3)


def read(folder, name):
    """An embedding file's tensors and what it says of itself."""
    import comfy.utils

    return comfy.utils.load_torch_file(str(folder / name), safe_load=True, return_metadata=True)


def seeds_of(folder):
    return [read(folder, file.name)[1]["ziplora_seed"] for file in sorted(folder.iterdir())]


def test_gradient_equals_autograd_over_copied_weights(pack, miniature, clip, folder):
    found = test_embedding.first_gradient(pack, lambda: run(pack, miniature, task(pack)))
    assert all(len(rows) == 2 for rows in found["start"].values())
    test_embedding.compare_with_autograd(miniature, clip, folder, found, PROMPTS)


def test_both_files_say_in_the_hosts_prompts_what_was_trained(pack, miniature, clip, folder, few_steps):
    """Side by side what training saw, and each alone what its pictures were drawn from."""
    encode = pack.nodes.bridge.network.text_gradient.WordEncoder.encode
    seen = []

    def noted(self, tokens, rows, load=False):
        said = encode(self, tokens, rows, load)
        seen.append(({key: t.detach().clone() for key, t in rows.items()}, said[0][0].detach().clone()))
        return said

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pack.nodes.bridge.network.text_gradient.WordEncoder, "encode", noted)
        done = run(pack, miniature, task(pack, seeds=1, prompts=PROMPTS[:1]))
    assert done.embeddings == ["embedding:split_left_00001_", "embedding:split_right_00001_"]
    assert done.files == ["split_left_00001_.safetensors", "split_right_00001_.safetensors"]
    *_, (both, context), (_, left), (_, right) = seen
    start = seen[0][0]
    for number, name in enumerate(done.files):
        tensors, about = read(folder, name)
        assert {key: tuple(rows.shape) for key, rows in tensors.items()} == {"clip_l": (1, 48), "clip_g": (1, 80)}
        assert all(torch.equal(tensors[key], both[key][number : number + 1]) for key in tensors)
        assert not any(torch.equal(tensors[key], start[key][number : number + 1]) for key in tensors)
        assert about["ss_steps"] == "2"
    used = encoded(clip, PROMPTS[0].replace("*", " ".join(done.embeddings)))
    assert torch.equal(used[0][0], context)
    for name, alone in zip(done.embeddings, (left, right), strict=True):
        assert torch.equal(encoded(clip, name)[0][0], alone)
    assert not torch.equal(left, right)


def numbers(line: str) -> dict[str, float]:
    """Of a line of the report on one seed."""
    return {name: float(value) for name, value in (part.split() for part in line.split(": ", 1)[1].split(", "))}


def pairs_mean(a, b=None) -> float:
    """Mean cosine of each with each; of one set, of all pairs of different pictures."""
    cosines = [
        float(torch.dot(x, y) / (x.norm() * y.norm()))
        for i, x in enumerate(a.double())
        for j, y in enumerate((a if b is None else b).double())
        if b is not None or i < j
    ]
    return sum(cosines) / len(cosines)


def test_the_best_score_is_chosen_of_what_the_hosts_sampler_draws(pack, miniature, clip, folder, tmp_path, few_steps):
    """From the files themselves; and a seed learns among others what it learns alone."""
    import comfy.sample

    eye, asked = encoder(tmp_path, CLIP), {"seed": 7, "learning_rate": 0.3, "drawn": 3}
    done = run(pack, miniature, task(pack, seeds=2, clip_vision=eye, **asked))
    said = [line.rstrip() for line in done.report.splitlines()]
    scores = {seed: numbers(next(line for line in said if line.startswith(f"seed {seed}: "))) for seed in (7, 8)}
    assert scores[7] != scores[8]
    best = max(scores, key=lambda seed: scores[seed]["score"])
    assert f"chosen: seed {best}, the largest score" in said
    assert seeds_of(folder) == [str(best)] * 2
    drawn, features = [], []
    with torch.inference_mode():
        recipe = pack.nodes.bridge.drawing.recipes.of(miniature.model)
        for name in done.embeddings:
            prompt, latents = encoded(clip, name), torch.zeros(3, 4, 16, 16)
            nothing = {"pooled_output": torch.zeros_like(prompt[0][1]["pooled_output"])}
            samples = comfy.sample.sample(
                miniature.model, comfy.sample.prepare_noise(latents, 7), recipe.steps, recipe.cfg, recipe.sampler,
                recipe.scheduler, prompt, [[torch.zeros_like(prompt[0][0]), nothing]], latents, disable_pbar=True,
                seed=7,
            )  # fmt: skip
            drawn.append(miniature.vae.decode(samples))
            features.append(eye.encode_image(drawn[-1])["image_embeds"].float())
    for ours, theirs in zip(done.images, drawn, strict=True):
        assert ours.shape == (3, 128, 128, 3)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)
    within, across = [pairs_mean(one) for one in features], pairs_mean(*features)
    assert [scores[best][side] for side in ("left", "right")] == pytest.approx(within, abs=2e-3)
    assert scores[best]["between"] == pytest.approx(across, abs=2e-3)
    assert scores[best]["score"] == pytest.approx(sum(within) + min(within) - across, abs=5e-3)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pack.nodes.bridge.training.split, "_drawn", flat)
        alone = run(pack, miniature, task(pack, seeds=1, **{**asked, "seed": best, "prefix": "alone"}))
    for one, among in zip(alone.files, done.files, strict=True):
        (theirs, _), (ours, _) = read(folder, one), read(folder, among)
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_both_words_foretell_the_pictures_better_than_their_start(pack, miniature, clip, undrawn):
    """On noise that training has not seen; the report says it."""
    asked: dict[str, Any] = {"pictures": [test_embedding.drawings("octopus")], "prompts": ["a * octopus in flat style"]}
    losses = []
    for rate in (1e-8, 3e-2):
        done = run(pack, miniature, task(pack, **asked, seeds=1, steps=25, batch_size=4, learning_rate=rate))
        losses.append(numbers(next(line for line in done.report.splitlines() if line.startswith("seed 0: ")))["loss"])
    assert losses[1] < 0.95 * losses[0]


LOSSES = [3.0, 1.0, 2.0]


def test_without_eyes_the_least_loss_is_chosen(pack, miniature, clip, folder, undrawn, monkeypatch):
    """And one bar is filled over all seeds."""
    import comfy.utils

    losses, bar = iter(LOSSES), []
    monkeypatch.setattr(pack.ziplora_core.training, "mean_loss", lambda *given: next(losses))
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute", lambda self, value, *_, **__: bar.append((self.total, value))
    )
    done = run(pack, miniature, task(pack, seeds=3, steps=2, seed=5))
    assert bar == [(6, value) for value in range(1, 7)]
    said = [line.rstrip() for line in done.report.splitlines()]
    assert "chosen: seed 6, the least loss; connect clip_vision to score them" in said
    assert [line for line in said if line.startswith("seed ")] == [
        f"seed {5 + i}: loss {loss:.4f}" for i, loss in enumerate(LOSSES)
    ]
    assert seeds_of(folder) == ["6", "6"] and len(done.loss_map["loss"]) == 2


def test_the_score_goes_before_the_loss(pack, miniature, clip, folder, undrawn, monkeypatch):
    core, totals = pack.ziplora_core, iter([0.1, 0.3, 0.2])
    losses = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(core.training, "mean_loss", lambda *given: next(losses))
    monkeypatch.setattr(core.split, "score", lambda *features: core.split.Score(next(totals), 0.5, 0.5))
    eye = SimpleNamespace(encode_image=lambda shown: {"image_embeds": torch.ones(len(shown), 4)})
    done = run(pack, miniature, task(pack, seeds=3, steps=1, clip_vision=eye))
    assert seeds_of(folder) == ["1", "1"] and "chosen: seed 1, the largest score" in done.report


@pytest.mark.parametrize("ends", ["well", "in the second seed", "in the pictures"])
def test_model_and_clip_are_what_they_were(pack, miniature, clip, folder, undrawn, monkeypatch, ends):
    """Bit for bit, also after an interrupt, which leaves both words of one seed that is done."""
    import comfy.model_management as management

    parts = (miniature.model.model, clip.cond_stage_model)
    before = witness(miniature)
    weights = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    core, bridge = pack.ziplora_core.training, pack.nodes.bridge.training.split
    rows, drawn, losses = core.step_rows, bridge._drawn, iter(LOSSES)

    def strike(given, denoiser, settings, step):
        if ends == "in the second seed" and (settings.seed, step) == (1, 1):
            management.interrupt_current_processing()
        return rows(given, denoiser, settings, step)

    def draw(*given):
        if ends == "in the pictures":
            raise management.InterruptProcessingException
        return drawn(*given)

    monkeypatch.setattr(core, "step_rows", strike)
    monkeypatch.setattr(core, "mean_loss", lambda *given: next(losses))
    monkeypatch.setattr(bridge, "_drawn", draw)
    if ends == "well":
        run(pack, miniature, task(pack))
    else:
        with pytest.raises(management.InterruptProcessingException):
            run(pack, miniature, task(pack))
    assert seeds_of(folder) == (["0", "0"] if ends == "in the second seed" else ["1", "1"])
    assert {read(folder, file.name)[1]["ss_steps"] for file in folder.iterdir()} == {"2"}
    for part, kept in zip(parts, weights, strict=True):
        assert [k for k, v in part.state_dict().items() if not torch.equal(as_bytes(v), as_bytes(kept[k]))] == []
        assert not [n for n, m in part.named_modules() if "forward" in vars(m)]
    assert miniature.model.additional_models == {} and "load_model" not in vars(clip)
    assert all(map(torch.equal, witness(miniature), before))


def test_where_memory_runs_out_seeds_that_are_done_are_kept(pack, miniature, clip, undrawn, monkeypatch):
    core, trained = pack.ziplora_core.training, []
    rows = core.step_rows

    def full(given, denoiser, settings, step):
        trained.append((settings.seed, step))
        if trained.count((1, 1)) == 1 and (settings.seed, step) == (1, 1):
            raise torch.OutOfMemoryError("none left")
        return rows(given, denoiser, settings, step)

    monkeypatch.setattr(core, "step_rows", full)
    monkeypatch.setattr(core, "mean_loss", lambda *given: 1.0)
    run(pack, miniature, task(pack))
    assert trained == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 1)]


def test_a_seed_whose_loss_is_no_number_is_not_the_least(pack, miniature, clip, folder, undrawn, monkeypatch):
    losses = iter([float("nan"), 0.5, 0.7])
    monkeypatch.setattr(pack.ziplora_core.training, "mean_loss", lambda *given: next(losses))
    done = run(pack, miniature, task(pack, seeds=3, steps=1))
    assert "chosen: seed 1, the least loss" in done.report and seeds_of(folder) == ["1", "1"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts": ["a star"]}, "lacks the word"),
        ({"word": "two words"}, "expected one word"),
        ({"initial": " "}, "initial_word is empty"),
        ({"drawn": 1}, "drawn_count is 1; expected a number from 2 to 64"),
        ({"seeds": 0}, "seeds is 0"),
        ({"clip_vision": SimpleNamespace(encode_image=lambda pictures: {})}, "image_embeds"),
        ({"prefix": "../above"}, "leads out of the folder"),
        ({"prefix": "my split"}, "at which an embedding's name ends in prompts"),
    ],
)
def test_refused_before_the_work(pack, miniature, clip, folder, monkeypatch, changes, says):
    monkeypatch.setattr(pack.ziplora_core.training, "train", None)
    with pytest.raises((ValueError, KeyError), match=says):
        run(pack, miniature, task(pack, **changes))
    assert list(folder.iterdir()) == []


def test_a_disk_that_takes_no_file_is_an_error(pack, miniature, clip, undrawn, monkeypatch):
    def full(path, tensors, metadata):
        raise OSError("no space left")

    monkeypatch.setattr(pack.nodes.bridge.training.lora_file, "write_tensors", full)
    with pytest.raises(OSError, match="could not be written: no space left"):
        run(pack, miniature, task(pack, seeds=1, steps=1))


def test_words_that_draw_nothing_finite_are_an_error(pack, miniature, clip, folder, monkeypatch):
    monkeypatch.setattr(pack.nodes.bridge.drawing.sampling, "draw_plain", lambda *given: None)
    with pytest.raises(FloatingPointError, match="the left word draws no pictures"):
        run(pack, miniature, task(pack, seeds=1, steps=1))
    assert seeds_of(folder) == ["0", "0"]


def test_the_node_splits_with_what_it_is_given(pack, miniature, clip, folder, undrawn, monkeypatch):
    tasks = []
    bridge = pack.nodes.bridge.training.split
    own = bridge.split_concept
    monkeypatch.setattr(bridge, "split_concept", lambda *a: tasks.append(a[3]) or own(*a))
    given = {
        "prompt": "a * apple\n\nin a * style", "word": "*", "initial_word": "house", "seeds": 2, "steps": 1,
        "learning_rate": 2e-3, "batch_size": 1, "resolution": 128, "seed": 5, "filename_prefix": "mine",
        "sample_every": 0, "drawn_count": 2,
    }  # fmt: skip
    eye = SimpleNamespace(encode_image=lambda shown: {"image_embeds": torch.eye(4)[: len(shown)] + shown.mean()})
    lists = {name: [value] for name, value in given.items()}
    parts = {"model": [miniature.model], "clip": [clip], "vae": [miniature.vae], "clip_vision": [eye]}
    with torch.inference_mode():
        done = pack.nodes.SplitConcept.execute([pictures(1, 128, 96), pictures(2, 96, 128)], **lists, **parts)
    left, right, left_pictures, right_pictures, loss_map, report = done.args
    assert (left, right) == ("embedding:mine_left_00001_", "embedding:mine_right_00001_")
    assert float(left_pictures.max()) == 0 and float(right_pictures.min()) == 1
    assert len(loss_map["loss"]) == 1 and "3 pictures, 2 prompts, both words from 'house'" in report
    (asked,) = tasks
    assert asked.prompts == ["a * apple", "in a * style"] and asked.clip_vision is eye
    settings = asked.settings
    assert (settings.seeds, settings.steps, settings.learning_rate, settings.batch_size) == (2, 1, 2e-3, 1)
    assert (asked.sample_every, asked.drawn, settings.seed) == (0, 2, 5)
