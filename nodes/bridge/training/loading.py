"""The model of a training run: planned for, loaded frozen, with a denoiser on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ....ziplora_core import training
from ..memory import plan, retry
from ..network import session
from ..network.empty_prompt import zeros
from ..network.injection import Injection
from .denoiser import Denoiser
from .pictures import Prepared

T = TypeVar("T")


def with_denoiser(
    model,
    data: Prepared,
    shapes: dict[str, tuple[int, int]],
    settings: training.Settings,
    work: Callable[[Denoiser, training.Pictures, Any], T],
    loras_at_once: int = 1,
    make: Callable[..., Denoiser] = Denoiser,
    beside: Sequence[Any] = (),
    is_whole: bool = False,
) -> tuple[plan.Plan, T]:
    """Plan memory, load the model frozen, and hand a denoiser, the pictures in its own space, and the device to `work`.

    Returns the plan that worked, and what `work` returned. Where memory runs out, once more with the least.
    loras_at_once: of the rank, which are trained together. make: the denoiser, as `Denoiser` is made. beside:
    ModelPatchers that a step runs too. is_whole: all numbers of the layers are trained.
    """
    rows = settings.batch_size * (2 if data.pictures.priors else 1)
    room = max(0, plan.room_for(model) - plan.taken_beside(model, beside))
    planned = plan.make_for_training(
        model, shapes, data.prompts[0], data.largest, loras_at_once * settings.rank, rows, room, is_whole
    )
    prompts = {str(number): conditioning for number, conditioning in enumerate(data.prompts)}
    prompts["empty"] = zeros(data.prompts[0])

    def attempt(planned: plan.Plan) -> T:
        injection = Injection(shapes, planned.recomputed)

        def prepared(guider, patcher, model_options: dict) -> T:
            def own(examples: Sequence[training.Example]) -> list[training.Example]:
                into = guider.inner_model.process_latent_in
                return [training.Example(into(e.latents.float().clone()), e.prompt) for e in examples]

            given = data.pictures
            scored = None if given.scored is None else own([given.scored])[0]
            pictures = training.Pictures([own(part) for part in given.sets], own(given.priors), scored)
            denoiser = make(guider, model_options, injection)
            return work(denoiser, pictures, patcher.load_device)

        return session.with_network(model, injection, prompts, data.largest.shape[1:], planned.need, prepared, beside)

    less = "lower resolution, batch_size or rank" if shapes and not is_whole else "lower resolution or batch_size"
    return retry.carry_out(planned, attempt, "train", less)
