"""The miniature model inside this process: the pack zips on it, the host samples from it, the judge looks at it."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: in front, the pack's folder `nodes` would hide ComfyUI's module

from devhost.base import find_miniature  # noqa: E402
from devhost.inprocess import load_miniature_extension, load_pack  # noqa: E402

PACK = load_pack()
load_miniature_extension()

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from demo.manifest import Trained, read_manifest  # noqa: E402
from demo.miniature import CFG, STEPS, half_is_fast  # noqa: E402
from demo.truth import Truth  # noqa: E402
from nodes import common_ksampler  # noqa: E402

loras, fitting, zipped_lora = (getattr(PACK.nodes.bridge.lora, n) for n in ("loras", "fitting", "zipped"))
predictor, session = PACK.nodes.bridge.network.predictor, PACK.nodes.bridge.network.session
bridge_apply = PACK.nodes.bridge.apply
core = PACK.ziplora_core
for _name in ("direct", "k_lora", "prompts", "zipper"):
    importlib.import_module(f"{core.__name__}.{_name}")
comfy.utils.set_progress_bar_enabled(False)
OTHERS = 4
TRUE_RENDERINGS = 64
SAMPLING = {"steps": STEPS, "cfg": CFG, "sampler_name": "euler", "scheduler": "normal"}


class Studio:
    """The checkpoint, its LoRAs by name, and what is true of their pictures."""

    def __init__(self) -> None:
        self.files = find_miniature()
        self.manifest = read_manifest()
        self.truth, self.side = Truth(self.manifest), self.manifest.size // 8
        self.embeddings = folder_paths.get_folder_paths("embeddings")
        self.model, self.clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(
            str(self.files.checkpoint), embedding_directory=self.embeddings
        )
        self.concepts = self.manifest.trained()
        self._prompts: dict[str, list] = {}
        self._truth: dict[tuple[str, str], torch.Tensor] = {}
        self._true_pictures: dict[tuple[str, str], torch.Tensor] = {}

    def prompt(self, *texts: str, clip: Any = None) -> list:
        """One CONDITIONING whose rows are the prompts, for a batch of as many pictures. clip: that reads them, None for
        the checkpoint's own. What they name of embedding files is read anew: other trainings give files the same names.
        """
        known, clip = (self._prompts, self.clip) if clip is None else ({}, clip)
        if any("embedding:" in text for text in texts):
            known = {}
        for text in texts:
            if text not in known:
                known[text] = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
        found = [known[text] for text in texts]
        pooled = torch.cat([options["pooled_output"] for _, options in found])
        return [[torch.cat([context for context, _ in found]), {"pooled_output": pooled}]]

    def latents(self, concept: Trained) -> torch.Tensor:
        """A concept's first reference picture, encoded."""
        path = self.files.checkpoint.parent.parent / "pictures" / concept.learned.picture
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
        return self.vae.encode(torch.from_numpy(pixels)[None])

    def set_of(self, concepts: Mapping[str, Trained], strengths: Mapping[str, float] | None = None):
        """LoRAs by concept, each at 1 or at its strength."""
        folder, strengths = self.files.loras[0].parent, strengths or {}
        tensors = {c: core.files.read_lora_file(folder / t.learned.file) for c, t in concepts.items()}
        return loras.LoRASources(
            {c: loras.LoRASource(t.name, tensors[c], strengths.get(c, 1.0)) for c, t in concepts.items()}
        )

    def sources(self, content: Trained, style: Trained, strengths: tuple[float, float] = (1.0, 1.0)):
        return self.set_of({"content": content, "style": style}, {"content": strengths[0], "style": strengths[1]})

    def other_references(self, content: Trained, style: Trained, seed: int):
        """Latents of more renderings of both concepts, for the same prompts: pictures that no LoRA was trained on."""
        rng = random.Random(f"others {content.name} {style.name} {seed}")
        drawn = {"content": self.truth.more(content, OTHERS, rng), "style": self.truth.more(style, OTHERS, rng)}
        latents = {c: self.vae.encode(found.movedim(1, -1)) for c, found in drawn.items()}
        return {c: self.model.model.process_latent_in(found) for c, found in latents.items()}

    def true_pictures(self, subject: str, style: str) -> torch.Tensor:
        """True renderings of a subject in a style, B3HW in 0..1."""
        if (subject, style) not in self._true_pictures:
            rng = random.Random(f"truth {subject} {style}")
            drawn = self.truth.pictures(subject, style, TRUE_RENDERINGS, rng)
            self._true_pictures = {(subject, style): drawn}  # the last pair's: they are large
        return self._true_pictures[subject, style]

    def true_features(self, subject: str, style: str) -> torch.Tensor:
        """The truth's mean features of true renderings of a subject in a style."""
        if (subject, style) not in self._truth:
            self._truth[subject, style] = self.truth.features(self.true_pictures(subject, style)).mean(0)
        return self._truth[subject, style]

    def turned(self, zipped, style_strength: float):
        """A zipped pair with the style dial turned."""
        return zipped.dialled({"style": style_strength})

    def zip(self, pair, content: Trained, style: Trained, work: Callable, prompt: str = "", latents=None) -> Any:
        """`zip_set` for a pair."""
        return self.zip_set(pair, {"content": content, "style": style}, work, prompt, latents)

    def zip_set(self, fitted, concepts: Mapping[str, Trained], work: Callable, prompt: str = "", latents=None) -> Any:
        """What `work(predictor, joined, references)` returns on the loaded model, with each concept's prompt and first
        picture.

        prompt, latents: for all concepts instead.
        """
        conditioning = {c: self.prompt(prompt or t.learned.prompt) for c, t in concepts.items()}
        latents = {c: self.latents(t) if latents is None else latents for c, t in concepts.items()}
        return predictor.with_predictor(self.model, fitted, conditioning, latents, work)

    @torch.inference_mode()
    def draw(self, zipped, prompts: Sequence[str], seed: int, by_step: Sequence | None = None) -> torch.Tensor:
        """A picture of each prompt, B3HW in 0..1, from the model with a merge on it.

        by_step: coefficients for each of the sampler's steps; neighbours that are one object are drawn in one go.
        """
        latent = self._empty(len(prompts))
        for start, end, coefficients in _runs(by_step or [zipped.coefficients] * STEPS):
            model, _ = bridge_apply.apply(self.model, None, replace(zipped, coefficients=coefficients), 1.0)
            latent = self._sampled(model, prompts, seed, latent, start, end)
        return self._seen(latent)

    @torch.inference_mode()
    def drawn_by(self, model: Any, prompts: Sequence[str], seed: int, clip: Any = None) -> torch.Tensor:
        """The same from any model of the host's that is on this one. clip: as `prompt`'s."""
        return self._seen(self._sampled(model, prompts, seed, self._empty(len(prompts)), clip=clip))

    @torch.inference_mode()
    def guided_by(self, guider: Any, count: int, seed: int) -> torch.Tensor:
        """The same by a GUIDER, which has a prompt for each picture; noise as the other ways have."""
        latent, steps = self._empty(count)["samples"], SAMPLING["steps"]
        schedule = self.model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(schedule, str(SAMPLING["scheduler"]), steps)
        sampler = comfy.samplers.sampler_object(str(SAMPLING["sampler_name"]))
        options = guider.model_patcher.model_options["transformer_options"]
        options["optimized_attention_override"] = session.attention_with_gradient
        noise = comfy.sample.prepare_noise(latent, seed)
        with self._as_users_sample():
            return self._seen({"samples": guider.sample(noise, latent, sampler, sigmas, seed=seed)})

    def _empty(self, count: int) -> dict[str, torch.Tensor]:
        return {"samples": torch.zeros(count, 4, self.side, self.side)}

    def _as_users_sample(self) -> torch.autocast:
        device = self.model.load_device.type
        return torch.autocast(device, torch.bfloat16, enabled=half_is_fast(device))

    def _seen(self, latent: dict[str, torch.Tensor]) -> torch.Tensor:
        with self._as_users_sample():
            return self.vae.decode(latent["samples"]).movedim(-1, 1).float().clamp(0, 1)

    def _sampled(
        self,
        model,
        prompts: Sequence[str],
        seed: int,
        latent: dict,
        start: int = 0,
        end: int = STEPS,
        clip: Any = None,
    ) -> dict:
        """Steps `start` to `end` of the sampler."""
        options = model.model_options["transformer_options"]
        # the host's choice for a CPU cuts these tiny attentions into pieces, ten times slower
        options["optimized_attention_override"] = session.attention_with_gradient
        with self._as_users_sample():
            (latent,) = common_ksampler(
                model,
                seed,
                positive=self.prompt(*prompts, clip=clip),
                negative=self.prompt("", clip=clip),
                latent=latent,
                disable_noise=start > 0,
                start_step=start,
                last_step=end,
                force_full_denoise=end == STEPS,
                **SAMPLING,
            )
        return latent


def _runs(by_step: Sequence) -> Iterator[tuple[int, int, Any]]:
    """(first step, step after the last, coefficients) of each run of steps that have one object."""
    start = 0
    for end in range(1, len(by_step) + 1):
        if end == len(by_step) or by_step[end] is not by_step[start]:
            yield start, end, by_step[start]
            start = end
