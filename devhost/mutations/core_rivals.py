"""Faults in other papers' ways: K-LoRA's choice, Custom Diffusion's merge, trained words, the page of a study."""

from __future__ import annotations

from . import faults

CHOICE = ("tests/core/test_k_lora.py",)
MERGED = ("tests/core/test_custom_diffusion.py",)
WORDS = ("tests/inhost/test_embedding.py",)
WHOLE = ("tests/inhost/test_custom_diffusion.py",)
STUDY = ("tests/core/test_study.py", "tests/browser/test_study.py")

DECOMPOSED = ("tests/inhost/test_ed_lora.py",)
DIRECT = ("tests/core/test_direct_papers.py",)

MUTANTS = [
    *faults(
        "ziplora_core/trained_ed_lora.py",
        DECOMPOSED,
        ("the text encoders at the network's rate", "self._settings.text_encoder_rate", "learning_rate"),
        ("the word at the network's rate", "self._settings.word_rate", "learning_rate"),
        ("the text encoders' factors are forgotten", "*self.text.tensors(), *self.word", "*self.word"),
    ),
    *faults(
        "ziplora_core/k_lora.py",
        CHOICE,
        ("a rank instead of a product", "layer[CONTENT].rank * layer[STYLE].rank", "layer[CONTENT].rank"),
        ("the smallest numbers count", "sizes.numel()), sorted=False)", "sizes.numel()), largest=False, sorted=False)"),
        ("the LoRAs are not made equal", "gamma * top[STYLE]", "top[STYLE]"),
        ("a tie is the subject's", "CONTENT if ratio > factor", "CONTENT if ratio >= factor"),
        ("time runs backward", "alpha * progress + beta", "alpha * (1 - progress) + beta"),
        ("signs cancel", "_update(layer[concept], device).abs_()", "_update(layer[concept], device)"),
        ("the scale is forgotten", "return (up @ down).mul_(factors.scale)", "return up @ down"),
        ("half precision overflows", "wide(m.to(device))", "m.to(device)"),
        ("a step begins early", "(1 - _SAME)", "(1 - 0.5)"),
        ("a level is no other by a rounding error", "(1 - _SAME)", "1"),
        ("time starts at one", "max(begun - 1, 0)", "max(begun, 0)"),
        ("layers of one LoRA are chosen for", "if len(layer) > 1}", "if layer}"),
    ),
    *faults(
        "ziplora_core/custom_diffusion.py",
        MERGED,
        (
            "the moment is a sum",
            "rows.T @ rows / len(rows)",
            "rows.T @ rows",
            "the ridge is a share of it, and its scale cancels in what answers",
        ),
        ("no ridge", ".add_(ridge * moment", ".add_(0 * moment"),
        ("ordinary captions do not count", "torch.linalg.cholesky(moment.double())", "torch.eye(len(moment)).double()"),
        ("an update's scale is forgotten", "return factors.scale * (factors.up", "return (factors.up"),
        ("the other's captions, scaled", "answer(factors, rows))", "answer(factors, 2 * rows))"),
    ),
    *faults(
        "ziplora_core/trained_embedding.py",
        WORDS,
        ("the words that it starts from are changed", "torch.float32, copy=True)", "torch.float32)"),
    ),
    *faults(
        "ziplora_core/trained_weights.py",
        WHOLE,
        ("the rate is not of each picture", "learning_rate * self._scale", "learning_rate"),
        ("the words are not trained", "*(rows for word in self.words for rows in word.tensors())", "*()"),
        ("the update is not heard", "frozen(x, base) + F.linear", "frozen(x, base) + 0 * F.linear"),
    ),
    *faults(
        "ziplora_batch/study.py",
        STUDY,
        ("pictures stand in one order", 'chosen.shuffle(one["shown"])', "one"),
        ("questions stand in one order", "    chosen.shuffle(asked)\n", ""),
        ("a seed makes another study", "[methods, asked, question,", "[methods, asked, question, seed,"),
        ("other pictures are the same study", "question, pictures.digests]", "question]"),
    ),
    *faults(
        "ziplora_batch/study.html",
        STUDY[1:],
        ("Wilson's interval is around the share", "Math.max(0, middle - half)", "Math.max(0, share - half)"),
        ("Wilson's interval is too narrow", "count + Z * Z / (4 * count * count))", "count)"),
        ("lots are drawn once", "Math.floor(draw() * of.length)", "Math.floor(0.5 * of.length)"),
    ),
    *faults(
        "ziplora_core/direct/tsv.py",
        DIRECT,
        ("scales are lost", "factors.scale * factors.up.double()", "factors.up.double()"),
        ("all of each is kept", "-(-rank // share)", "rank"),
        ("half is rounded down", "-(-rank // share)", "max(1, rank // share)"),
        ("not turned apart", "left[:, :count] @ right[:count]", "vectors"),
        ("directions that none has", "values.max() * SMALLEST).sum())\n    found", "-1).sum())\n    found"),
        ("one LoRA alone is cut", "if len(layer) > 1 else layer", "if layer else layer"),
    ),
]
