"""The benchmark of systems that train: what could make its figures wrong in silence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def studio(pack):
    from benchmarks.quality_job import studio_of

    return studio_of()


@pytest.fixture
def shop(studio, tmp_path, monkeypatch):
    """Of a short job, with folders of its own."""
    from benchmarks import trained

    monkeypatch.setattr(trained, "own_folders", lambda: (tmp_path, tmp_path))
    kept = list(studio.embeddings)
    subject, style = studio.manifest.quick[0]
    yield trained.Workshop(studio, trained.Job(subject, style, 3, "", 2, 0.01, tmp_path))
    studio.embeddings[:] = kept


def test_a_word_that_is_trained_again_under_its_name_is_read_again(studio, shop):
    sizes = {key: getattr(studio.clip.tokenizer, f"clip_{key[-1]}").embedding_size for key in ("clip_l", "clip_g")}
    said = []
    for seed in (0, 1):
        g = torch.Generator().manual_seed(seed)
        words = {key: torch.randn(1, size, generator=g) for key, size in sizes.items()}
        save_file(words, shop.words / "custom_00001_.safetensors")
        with torch.inference_mode():
            ((context, _),) = studio.prompt("a embedding:custom_00001_ octopus")
        said.append(context)
    assert (said[0] - said[1]).abs().max() > 0.01


def test_each_training_of_a_system_has_a_seed_of_its_own(shop):
    from benchmarks import trained

    kinds = [shop.core.training.Settings, shop.core.training.Settings, shop.core.trained_weights.Settings]
    seeds = [shop._settings(kind, trained.LORA, 1).seed for kind in kinds]
    assert len(set(seeds)) == 3 and seeds[0] == shop.job.seed


def test_memory_of_a_system_does_not_hide_behind_an_earlier_ones(shop, monkeypatch):
    from benchmarks import quality_job, trained

    def takes(megabytes):
        def train(_):
            held = torch.ones(megabytes, 1_000_000, dtype=torch.uint8)
            for _ in range(5):
                held.add_(1)
            return SimpleNamespace(stored=1, draw=lambda count, seed: None)

        return train

    monkeypatch.setattr(trained, "TRAINED", {"large": takes(400), "small": takes(200)})
    for name in ("keep", "of_pair", "beside_truth"):
        monkeypatch.setattr(quality_job, name, lambda *_: {})
    monkeypatch.setattr(quality_job, "line", lambda _: "")
    jobs = [trained.dataclasses.replace(shop.job, method=method) for method in ("large", "small")]
    found = {record["method"]: record["peak"] for job in jobs for record in trained.run_job(job)}
    assert found == {"large": pytest.approx(0.4, abs=0.08), "small": pytest.approx(0.2, abs=0.08)}
