"""Faults in other papers' ways on the host: K-LoRA, trained words and layers, Custom Diffusion's merge, CSD."""

from __future__ import annotations

from . import faults

SWITCHED = ("tests/inhost/test_k_lora.py",)
WORDS = ("tests/inhost/test_embedding.py",)
WHOLE = ("tests/inhost/test_custom_diffusion.py",)
DECOMPOSED = ("tests/inhost/test_ed_lora.py",)

MUTANTS = [
    *faults(
        "nodes/bridge/k_lora.py",
        SWITCHED,
        (
            "an update counts twice",
            "return y + update(x, convolution).to(y)",
            "return y + 2 * update(x, convolution).to(y)",
        ),
        ("an update's scale is lost", "_frozen(wide(up) * factors.scale, dtype)", "_frozen(up, dtype)"),
        ("a whole update's scale is lost", "wide(down) * factors.scale if whole else down", "down"),
        ("strides are lost", "convolution_options(module) if is_convolution(module) else {}", "{}"),
        ("the model's levels, not the sampler's", 'options.get("sample_sigmas")', "None"),
        ("the model's levels upside down", "model.model_sampling.sigmas.flip(0)", "model.model_sampling.sigmas"),
        ("rows of any noise", "if low != high:", "if False:"),
        ("a second one takes the first one's place", 'key = f"{_KEY}_{uuid.uuid4()}"', "key = _KEY"),
        (
            "both everywhere",
            "replace(fitted, loras=others), Coefficients.ones(others)",
            "fitted, Coefficients.ones(fitted.loras)",
        ),
        (
            "layers of one LoRA are left out",
            "replace(fitted, loras=others)",
            "replace(fitted, loras=replace(others, layers={}))",
        ),
        ("memory is not counted", "model.set_additional_models(key, [", "list([key, "),
        ("alpha and beta swapped", "k_lora.factor(done, alpha, beta)", "k_lora.factor(done, beta, alpha)"),
        (
            "a merge of the same files is overlooked",
            "if any(loras.one_lora(one, other)",
            "if False and any(loras.one_lora(one, other)",
        ),
        ("text of the prompt switches too", "not name.startswith(_BEFORE)", "name"),
        ("padded with zeros alone", 'if mode == "zeros":', "if True:"),
    ),
    *faults(
        "nodes/bridge/network/text_gradient.py",
        WORDS,
        ("vectors of another encoder", "_Place(self.keys[int(mark[0])]", "_Place(self.keys[0]"),
        ("one vector for all", "int(mark[1]))", "0)"),
        ("a word is found at the end of others", r"(?<!\w)", ""),
        ("a word is found at the start of others", r"(?!\w)", ""),
        ("a sign is a pattern", "{re.escape(word)}", "{word}"),
        ("starts from one vector", "rows[i % len(rows)]", "rows[0]"),
        (
            "hooks are overlooked",
            'is not None:\n            raise ValueError("clip carries',
            'is ...:\n            raise ValueError("clip carries',
        ),
    ),
    *faults(
        "nodes/bridge/training/embedding.py",
        WORDS,
        (
            "one prompt for all pictures",
            "for one in latents for number in range(len(tokens))",
            "for one in latents for number in (0,)",
        ),
        (
            "prompts are encoded once",
            "with_denoiser(model, data, {}, settings, work, make=make,",
            "with_denoiser(model, data, {}, settings, work,",
        ),
        ("a disk that takes no file is fine", "if not file.steps:", "if False:"),
    ),
    *faults(
        "nodes/bridge/training/denoiser.py",
        WORDS,
        ("a word stays what it was", "if key[0] not in self._said}", "if key}"),
    ),
    *faults(
        "nodes/bridge/network/text_gradient.py",
        DECOMPOSED,
        ("random numbers of one size", "float(rows.std()) * torch.randn(", "torch.randn("),
        ("random numbers of no seed", "manual_seed(seed % 2**63)", "manual_seed(0)"),
        (
            "the text encoders' branch is lost",
            "frozen_layers(self._clip.cond_stage_model, layers, branch)",
            "frozen_layers(self._clip.cond_stage_model)",
        ),
    ),
    *faults(
        "nodes/bridge/network/injection.py",
        DECOMPOSED,
        (
            "another pack's layer has no gradient",
            "branch.layer(name, x, Given(y)) + (y - y.detach())",
            "branch.layer(name, x, Given(y))",
        ),
        ("another pack's layer is not trained", "partial(_on_another, branch, name, module.forward)", "module.forward"),
    ),
    *faults(
        "nodes/bridge/training/ed_lora.py",
        DECOMPOSED,
        ("the two vectors swapped", "torch.cat([first[key], rows])", "torch.cat([rows, first[key]])"),
        ("the text encoders' part is not in the file", "**named_tensors(text, self._names)}", "}"),
        (
            "the trigger names no embedding",
            "in_prompts(task.prompts[0], task.word, self.embedding.name)",
            "task.prompts[0]",
        ),
    ),
    *faults(
        "nodes/bridge/lora/text_encoders.py",
        DECOMPOSED,
        ("numbered where there is one", 'name.startswith("lora_te_") == several', 'name.startswith("lora_te_")'),
    ),
    *faults(
        "nodes/bridge/text_fusion.py",
        ("tests/inhost/test_text_fusion.py",),
        ("a clip that has them counts twice", "captured.refuse_twice_on_clip(clip, sources)", "pass"),
        ("what fills up a prompt counts", "of[:end].float()", "of.float()"),
        ("what weighs words counts", "zip(several, own, strict=False)", "zip(several, own * 2, strict=False)"),
        (
            "seen at strength 1",
            "own = with_text_encoder(clip, source, source.of_clip)",
            "own = with_text_encoder(clip, source, 1.0)",
        ),
        ("seen without its LoRA", "own = with_text_encoder(clip, source, source.of_clip)", "own = clip"),
        ("hooks stay", "            hook.remove()\n", "            pass\n"),
        ("another form is thrown away", "weights.get(formats.layer_name(key)) in factors", "True"),
        ("the file's hash stays", "version=None, sha256=None, notes", 'sha256="", notes'),
        (
            "an alpha is forgotten",
            "Factors(own.up.float(), down, own.scale)",
            "Factors(own.up.float(), 2 * down, own.scale)",
        ),
    ),
    *faults(
        "nodes/bridge/training/custom_diffusion.py",
        WHOLE,
        ("the second concept has the first one's word", "words.tokens += [(index,", "words.tokens += [(0,"),
        (
            "class pictures are left out",
            "data.pictures = training.Pictures(sets, priors)",
            "data.pictures = training.Pictures(sets)",
        ),
        ("the rate is of a step", "settings.batch_size, device)", "1.0, device)"),
        ("a number that does not fit is written", "if not bool(torch.isfinite(rounded).all()):", "if False:"),
        ("the words are not written", "partial(file.put, word.learned()", "partial(print, word.learned()"),
        (
            "the trigger names no embedding",
            "in_prompts(first.prompts[0], first.word, embeddings[0].name)",
            "first.prompts[0]",
        ),
    ),
    *faults(
        "nodes/bridge/custom_diffusion.py",
        WHOLE,
        ("shared beginnings are targets", "rows[(far > _ALIKE * rows.norm(dim=1)[:, None]).all(1)]", "rows"),
        ("text encoders go unsaid", "if text_encoders.parts(source):", "if not source:"),
        ("targets are whole captions", "_features(clip, text, True) for", "_features(clip, text, False) for"),
        (
            "ordinary captions are their words",
            "_features(clip, text, False) for text in ordinary",
            "_features(clip, text, True) for text in ordinary",
        ),
        ("other layers are merged too", "if name in readers}", "}"),
        ("lines are not counted", "if len(own) != len(concepts):", "if False:"),
    ),
    *faults(
        "nodes/bridge/csd.py",
        ("tests/inhost/test_csd.py",),
        ("the head is CLIP's own", "tensors[_HEAD]}, _TRUNK", "tensors[_TRUNK + 'proj']}, _TRUNK"),
        ("a pickle may run", "safe_load=True", "safe_load=False"),
    ),
]
